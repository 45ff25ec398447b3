"""TexQ: images of rich texture say what each class looks like inside, and guide the generator."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.job import Job
from onnxq.learning.augmentation import mixed
from onnxq.learning.losses import distillation
from onnxq.learning.zero_shot import ZeroShot, ZeroShotKnobs
from onnxq.synthesis.centers import MatchCenters
from onnxq.synthesis.game import GameTerm
from onnxq.synthesis.terms import deep_from


@dataclass(frozen=True, kw_only=True)
class TexQ(ZeroShotKnobs):
    """Fine-tuning on images of a generator that is led by calibration images of every class; no data is needed.

    1. Quantize with ranges from inputs that were made before.
    2. Make calibration images: cross-entropy of their class, loose statistics in shallow layers and tight ones in deep
       layers, and no texture element that outweighs or misses. Each class's statistics in the deep layers are its
       center.
    3. In every step the generator makes images for drawn classes, and learns: their cross-entropy, the distance to
       what BatchNormalization remembers, and to the center of each image's class.
    4. The student learns the float network's prediction of these images and of mixtures of their pairs.
    5. Store weights as codes, lint, check.

    Source: X. Chen, Y. Wang, R. Yan, Y. Liu, T. Guan, Y. He, TexQ: Zero-shot Network Quantization with Texture
    Feature Distribution Calibration, NeurIPS 36 (2023), pp. 274–287.
    There is no code by the authors, and only the abstract and what later work (SynQ, ICLR 2025) says of it were at
    hand. From these are the three stages, the images' rate, steps and weights; **inferred** are the formula of the
    texture term, what a center holds, and the weight of its term.

    Departures: those of the recipe ``gdfq``, and
        - Classes without a calibration image have no center and no term; there are fewer images than classes for
          ImageNet unless ``--set class_images=1000`` says otherwise.
        - A class is what the float network takes an image for.
        - Calibration images match standard deviations; with variances, as SynQ's code has them, students ended a point
          lower (ResNet-20 at three bits, 84.0 instead of 85.2 %).

    Attributes:
        weight_rate: Rate of weights and biases, ten times that of the other games: they lose by it, this one gains.
        class_images: How many calibration images are made, of all classes in turn.
        batch: Images of the generator in a step.
        statistics: Weight of the distance to remembered statistics in the generator's loss.
        centers: Weight of the distance to the classes' centers.
        mix: Whether the student sees mixtures of pairs too.
        temperature: Of the logits.
        generator_rate: Adam's rate of the generator.
    """

    weight_rate: float = 1e-4
    class_images: int = 128
    statistics: float = 0.4
    centers: float = 0.04
    mix: bool = True
    temperature: float = 20.0
    generator_rate: float = 1e-3

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        zero_shot = ZeroShot(job, self, classes=True, statistics=True, made=("texq", self.class_images))
        centers = zero_shot.centers()
        terms: list[tuple[float, GameTerm]] = [
            (1.0, zero_shot.classes()),
            (self.statistics, zero_shot.statistics()),
            (self.centers, MatchCenters(centers, deep_from(len(centers.layers)))),
        ]
        game = zero_shot.game(zero_shot.player(self.generator_rate, conditional=True), terms, reads_student=False)
        zero_shot.finetune(
            mixed(game, job.settings.seed) if self.mix else game,
            distillation(zero_shot.outputs, self.temperature),
            companions=[game],
        )
