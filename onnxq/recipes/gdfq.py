"""GDFQ: a generator learns what the float network knows, the quantized one learns from what it makes."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.job import Job
from onnxq.learning.losses import distillation
from onnxq.learning.zero_shot import ZeroShot, ZeroShotKnobs, labelled


@dataclass(frozen=True, kw_only=True)
class Gdfq(ZeroShotKnobs):
    """Fine-tuning on images from a generator that is trained beside; no data is needed.

    1. Quantize with ranges from inputs that were made before.
    2. In every step the generator makes images for drawn classes, and learns: cross-entropy of what the float network
       predicts, plus 0.1 times the distance to what BatchNormalization remembers.
    3. The student learns from the same images: the divergence from the float network's prediction, plus the
       cross-entropy with the classes.
    4. Store weights as codes, lint, check.

    Source: S. Xu, H. Li, B. Zhuang, J. Liu, J. Cao, C. Liang, M. Tan, Generative Low-bitwidth Data Free Quantization,
    ECCV 2020 (arXiv 2003.03603), sections 3.2 and 3.3.

    Departures:
        - Ranges come from inputs made before (`--synthesis`), not from a moving average over the first epochs; the
          authors' overshoots by orders of magnitude before some 150 updates. They learn as LSQ's steps do
          (``step_rate=0`` keeps them).
        - Biases start where they take back the mean error of the rounded weights (``bias_correction=False``: the
          authors' do not).
        - Classes are added to latent codes, not multiplied with them (see :class:`onnxq.synthesis.player.Player`).
        - Before the student's first step the generator moves alone, half as often as the student will but 100, 400 or
          800 times at most, by ``--budget``; the authors' for 4 of 400 epochs.
        - Adam at a rate that falls along a cosine; the authors' SGD has a rate for each data set. Fewer steps, unless
          ``--budget paper``.
        - BatchNormalization is folded, so its scale and shift train in weights and biases. Weights are symmetric, and
          first and last layers have the width of the others unless ``--first-last int8`` says so (the paper's).

    Attributes:
        statistics: Weight of the distance to remembered statistics in the generator's loss.
        labels: Weight of the cross-entropy with drawn classes in the student's loss.
        temperature: Of the logits.
        generator_rate: Adam's rate of the generator.
    """

    statistics: float = 0.1
    labels: float = 1.0
    temperature: float = 1.0
    generator_rate: float = 1e-3

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        zero_shot = ZeroShot(job, self, classes=True, statistics=True)
        player = zero_shot.player(self.generator_rate, conditional=True)
        terms = [(1.0, zero_shot.classes()), (self.statistics, zero_shot.statistics())]
        game = zero_shot.game(player, terms, reads_student=False)
        loss = labelled(distillation(zero_shot.outputs, self.temperature), game, zero_shot.logits, self.labels)
        zero_shot.finetune(game, loss, companions=[game])
