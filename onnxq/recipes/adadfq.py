"""AdaDFQ: the generator keeps the disagreement of float and quantized network within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from onnxq.job import Job
from onnxq.learning.zero_shot import ZeroShot, ZeroShotKnobs
from onnxq.synthesis.disagreement import Balance, Band, disagreement


@dataclass(frozen=True, kw_only=True)
class AdaDfq(ZeroShotKnobs):
    """A game of a generator and the quantized network over how far the latter disagrees; no data is needed.

    1. Quantize with ranges from inputs that were made before.
    2. In every step the generator makes images for drawn classes, and learns: agreement of the two networks between
       two bounds; the class in what they disagree about and in what they agree about; the distance to what
       BatchNormalization remembers.
    3. The student learns from the same images to differ from the float network by a constant alone.
    4. Store weights as codes, lint, check.

    Source: B. Qian, Y. Wang, R. Hong, M. Wang, Adaptive Data-Free Quantization, CVPR 2023 (arXiv 2303.06869),
    sections 3.2 to 3.4.

    Departures: those of the recipe ``gdfq`` on ranges, biases, statistics, optimiser and BatchNormalization, and
        - For large images too classes are in the code, where the authors' make the generator's BatchNormalization
          depend on them.
        - The least agreement of a batch is its zero (the authors' code).

    Attributes:
        lower: The least agreement that costs nothing.
        upper: The largest.
        disagreeing: Weight of the class in what the networks disagree about.
        agreeing: Weight of the class in what they agree about.
        statistics: Weight of the distance to remembered statistics in the generator's loss.
        temperature: Of the logits.
        generator_rate: Adam's rate of the generator.
    """

    lower: float = 0.1
    upper: float = 0.8
    disagreeing: float = 0.2
    agreeing: float = 0.1
    statistics: float = 1.0
    temperature: float = 20.0
    generator_rate: float = 1e-3

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        zero_shot = ZeroShot(job, self, classes=True, statistics=True)
        logits = zero_shot.logits
        player = zero_shot.player(self.generator_rate, conditional=True)
        game = zero_shot.game(
            player,
            [
                (1.0, Band(logits, self.lower, self.upper)),
                (self.disagreeing, Balance(logits, -1)),
                (self.agreeing, Balance(logits, 1)),
                (self.statistics, zero_shot.statistics()),
            ],
            reads_student=True,
        )

        def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
            return disagreement(student[logits], teacher[logits], self.temperature)

        zero_shot.finetune(game, loss, companions=[game])
