"""LSQ: weights and steps fine-tuned after the float network, block by block or end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnxq.autograd.blocks import cut
from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.augmentation import Augmentation
from onnxq.learning.columnwise import BEST, rounded_apart
from onnxq.learning.distillation import distil_blocks, distil_network
from onnxq.learning.finetune import FineTuning
from onnxq.learning.losses import compared_outputs
from onnxq.learning.smoothing import level
from onnxq.synthesis.network import channels_first, require_images

# Steps of the optimiser: over the whole network, or for each block.
STEPS = {
    "network": {"quick": 100, "default": 500, "paper": 10000},
    "blocks": {"quick": 50, "default": 200, "paper": 2000},
}


@dataclass(frozen=True)
class Lsq:
    """Fine-tuning with learned steps on unlabelled samples; the float network says what is right.

    1. Rewrite the graph, insert Q/DQ, calibrate activations; weight steps by the least error.
    2. Train float weights behind straight-through rounding, biases, and the steps of weights (per channel) and
       activations, whose gradient is equation 3; where the target has zero points, LSQ+'s offsets too. ``distil``
       says after what: ``blocks``, the float network's values at the end of each block in turn (LKD of ZeroQuant), or
       ``network``, its outputs (KL of logits; squared error where there are none).
    3. Store weights as codes, lint, check.

    Source: S. K. Esser, J. L. McKinstry, D. Bablani, R. Appuswamy, D. S. Modha, Learned Step Size Quantization,
    ICLR 2020 (arXiv 1902.08153), equations 1 to 3; offsets: Y. Bhalgat, J. Lee, M. Nagel, T. Blankevoort, N. Kwak,
    LSQ+, CVPR workshops 2020 (arXiv 2004.09576), equations 3 to 6; blocks: Z. Yao et al., ZeroQuant, NeurIPS 2022
    (arXiv 2206.01861), section 4.3.

    Departures:
        - With activations of 8 bits, channels that stick out far are levelled first, as in the recipe int8.
        - A few hundred unlabelled samples and the float network's outputs instead of training on labels; so few
          steps, and rates so small, that the network stays near itself.
        - Steps are learned as logarithms, which keeps them positive, and weights have one per channel. LSQ's gradient
          scale 1/√(N·Q) is applied with ``optimizer=sgd``; Adam would divide it out.
        - Steps start at the least error of what is rounded, not at 2·mean|v|/√Q.
        - LSQ+'s offset is a zero point, a whole number.
        - First and last layers have the width of the others unless ``--first-last int8`` says so (the papers').
        - BatchNormalization is folded: its scale and shift train in weights and biases.
        - Block by block unless ``distil=network`` says so: of a few hundred samples it makes the better network
          (ResNet-20 at W4A4). The papers of LSQ train end to end.
        - LKD reads what the quantized network makes (``block_inputs=student``); the paper reads the float network's.

    Attributes:
        distil: ``blocks`` or ``network``.
        start: Where weights and biases start: ``nearest``, at the float network's; ``gptq``, at GPTQ's.
        crop: With ``network``: the smallest part of an image in a random crop, half of them flipped; 1: whole images.
        mix: With ``network``: whether as many mixtures of pairs of images come along.
        steps: Steps of the optimiser (for each block with ``blocks``); 0: what ``--budget`` says.
        batch: Samples in a step.
        optimizer: ``adam`` or ``sgd``.
        weight_rate: Rate of weights and biases; 0 keeps them.
        step_rate: Rate of steps and zero points; 0 keeps them.
        loss: ``auto``, ``kl`` or ``mse``, for ``network``.
        temperature: Of the logits.
        block_inputs: ``student`` or ``teacher``.
        observer: How the first range follows from the statistics of an activation.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
        samples: How many samples to learn from, at most.
        cache_mib: Memory for samples and activations; what is more goes to files.
    """

    distil: str = choice("blocks", "network")
    start: str = choice("nearest", "gptq")
    crop: float = 1.0
    mix: bool = False
    steps: int = 0
    batch: int = 32
    optimizer: str = choice("adam", "sgd")
    weight_rate: float = 1e-4
    step_rate: float = 1e-3
    loss: str = choice("auto", "kl", "mse")
    temperature: float = 1.0
    block_inputs: str = choice("student", "teacher")
    observer: str = "mse"
    weight_ranges: str = "mse"
    samples: int = 1024
    cache_mib: int = 1024

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        if self.distil != "network" and (self.crop < 1 or self.mix):
            raise OnnxqError(
                f"expected distil=network with crop or mix, found distil={self.distil}",
                hint="use --set distil=network; blocks learn on what the network makes of the samples themselves",
            )
        augment = None
        if self.crop < 1 or self.mix:
            image = require_images(job.model, "crops and mixtures", "leave crop and mix out")
            axes = channels_first(job.model, image.name)[1]
            augment = Augmentation(axes, self.crop, self.mix, job.settings.seed)
        observe, search = observers.get(self.observer), weight_ranges.get(self.weight_ranges)
        job.prepare()
        level(job)
        blocks = cut(job.model.graph)
        outputs = compared_outputs(job.model, self.loss)
        insert_calibrated(job, observe, search)
        options = FineTuning(
            self.steps or STEPS[self.distil][job.settings.budget],
            self.batch,
            self.optimizer,
            self.weight_rate,
            self.step_rate,
        )
        samples = min(self.samples, len(job.source), job.settings.samples or self.samples)
        memory: dict[str, Any] = {"samples": samples, "cache_mib": self.cache_mib}
        starts = rounded_apart(job, blocks, BEST, **memory) if self.start == "gptq" else {}
        if self.distil == "blocks":
            distil_blocks(job, blocks, options, inputs=self.block_inputs, starts=starts, **memory)
        else:
            distil_network(
                job, outputs, options, temperature=self.temperature, starts=starts, augment=augment, **memory
            )
        job.lower()
