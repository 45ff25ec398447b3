"""ZAQ: a generator looks for inputs that float and quantized network disagree about, the student agrees there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxq.job import Job
from onnxq.learning.zero_shot import ZeroShot, ZeroShotKnobs
from onnxq.synthesis.game import Move
from onnxq.synthesis.relations import output_gap, relation_gap


@dataclass(frozen=True, kw_only=True)
class Zaq(ZeroShotKnobs):
    """An adversarial game that needs no data, no classes and no BatchNormalization.

    1. Quantize with ranges from inputs that were made before.
    2. After every ``student_steps`` steps of the student the generator moves once: it raises the mean absolute
       difference of the outputs, that of channel relations at the ends of the network's stages, and the float
       network's last activations.
    3. The student lowers both differences on new images.
    4. Store weights as codes, lint, check.

    Source: Y. Liu, W. Zhang, J. Wang, Zero-shot Adversarial Quantization, CVPR 2021 (arXiv 2103.15263), sections 3.1
    to 3.4.

    Departures: those of the recipe ``gdfq`` on ranges, biases, optimiser and BatchNormalization, and
        - Ranges do not widen while the network is judged; in the authors' code test images widen them.
        - Relations are the paper's, cosines of pairs of channels, all stages weighing the same; the code compares
          spatial and channel attention. Norms below 0.01 count as 0.01, or their gradient explodes where rounding
          left nothing of a channel.
        - Outputs are compared as they are; where a classifier ends in a Softmax, its logits.

    Attributes:
        student_steps: Steps of the student for each move of the generator.
        relations: Weight of the difference of channel relations, in both losses.
        activations: What strong activations are worth to the generator.
        generator_rate: Adam's rate of the generator.
    """

    student_steps: int = 5
    relations: float = 1.0
    activations: float = 0.1
    generator_rate: float = 1e-3

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        zero_shot = ZeroShot(job, self, classes=False, statistics=False)
        stages, outputs = zero_shot.stages, list(zero_shot.outputs)

        def gap(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
            return output_gap(student, teacher, outputs) + self.relations * relation_gap(student, teacher, stages)

        def strength(move: Move) -> Tensor:
            return move.teacher[stages[-1]].abs().mean() if stages else torch.zeros(())

        game = zero_shot.game(
            zero_shot.player(self.generator_rate, conditional=False),
            [(-1.0, lambda move: gap(move.student, move.teacher)), (-self.activations, strength)],
            reads_student=True,
            features=stages,
            student_steps=self.student_steps,
        )
        zero_shot.finetune(game, gap, features=stages, companions=[game])
