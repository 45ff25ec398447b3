"""HAST: hard samples are made, made harder, and learned from until the student's features agree too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from onnxq.job import Job
from onnxq.learning.attention_transfer import attention_gap
from onnxq.learning.augmentation import cropped, perturbed
from onnxq.learning.losses import distillation
from onnxq.learning.zero_shot import ZeroShot, ZeroShotKnobs


@dataclass(frozen=True, kw_only=True)
class Hast(ZeroShotKnobs):
    """Fine-tuning on hard images; no data is needed.

    1. Quantize with ranges from inputs that were made before.
    2. Make images whose batch matches BatchNormalization, of drawn classes; the less sure the float network is of a
       sample, the more it weighs.
    3. In every step take crops of them, and the same moved to where the two networks differ more; the student lowers
       the divergence from the float network's prediction, and the distance between channel attentions at the ends of
       residual branches.
    4. Store weights as codes, lint, check.

    Source: H. Li, X. Wu, F. Lv, D. Liao, T. H. Li, Y. Zhang, B. Han, M. Tan, Hard Sample Matters a Lot in Zero-Shot
    Quantization, CVPR 2023 (arXiv 2303.13826), sections 3.2 to 3.4.

    Departures: those of the recipe ``gdfq`` on biases, statistics, optimiser and BatchNormalization, and
        - Ranges come from other made inputs; the authors train a generator for them alone, which is dropped afterwards.
        - Fewer images (5,120 in the paper) unless ``--set hard_images=5120``; no crops while they are made.
        - The divergence weighs 1, and attention what it weighs relative to it in the paper: a common factor is
          nothing to Adam.
        - The radius of the perturbation is in standard deviations of the inputs, so that it means the same for bytes.
        - With ``--data``, ranges come from those samples.

    Attributes:
        hard_images: How many images are made to learn from.
        batch: Images in a step, each of which comes twice.
        attention: Weight of the distance between channel attentions.
        perturbation: How far images are moved, in standard deviations; 0: they are not.
        crop: The smallest part of an image in a crop; 1: images stay whole.
        temperature: Of the logits.
        cache_mib: Memory for the images; what is more goes to a file.
    """

    hard_images: int = 256
    attention: float = 100.0
    perturbation: float = 0.01
    crop: float = 0.5
    temperature: float = 20.0
    cache_mib: int = 1024

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        zero_shot = ZeroShot(job, self, classes=True, statistics=True, made=("hast", self.hard_images))
        features = zero_shot.branches
        prediction = distillation(zero_shot.outputs, self.temperature)

        def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
            return prediction(student, teacher) + self.attention * attention_gap(student, teacher, features)

        with zero_shot.samples(self.cache_mib) as batches:
            if self.crop < 1:
                batches = cropped(batches, zero_shot.network.axes, self.crop, job.settings.seed)
            if self.perturbation:
                wanted = [*zero_shot.outputs, *features]
                batches = perturbed(batches, zero_shot.student, wanted, loss, self.perturbation)
            zero_shot.finetune(batches, loss, features=features)
