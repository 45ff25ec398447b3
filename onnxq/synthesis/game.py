"""A generator and a quantized network that learn from one another: where fine-tuning without data gets its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxq.learning.finetune import Batch
from onnxq.synthesis.player import Player

Array = np.ndarray[Any, Any]
Values = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Move:
    """What the generator's terms look at.

    Attributes:
        images: As the generator makes them, [samples, channels, height, width].
        labels: The classes they were drawn for, [samples].
        teacher: The float network's values: outputs, features, inputs of BatchNormalization.
        student: The quantized network's; empty where no term reads them.
    """

    images: Tensor
    labels: Tensor
    teacher: Mapping[str, Tensor]
    student: Mapping[str, Tensor]


GameTerm = Callable[[Move], Tensor]


class Game:
    """Gives a student its batches, and lets the generator move before it does.

    Args:
        player: The generator.
        inputs: From the generator's images to what both networks read, by name.
        teacher: The float network's values for some images.
        student: The quantized network's values for some images; ``None`` where no term reads them.
        terms: What the generator minimises, with weights.
        batch: Images in a step.
        warm_up: Moves of the generator before the student's first step.
        student_steps: Steps of the student for each move of the generator. With one it learns from the images that
            were just judged, with more from new ones.

    Attributes:
        labels: The classes of the last batch.
    """

    def __init__(
        self,
        player: Player,
        inputs: Callable[[Tensor], dict[str, Tensor]],
        teacher: Values,
        student: Values | None,
        terms: Sequence[tuple[float, GameTerm]],
        *,
        batch: int,
        warm_up: int = 0,
        student_steps: int = 1,
        on_move: Callable[[int], None] | None = None,
    ) -> None:
        self.player, self.inputs, self.teacher, self.student, self.terms = player, inputs, teacher, student, terms
        self.batch, self.warm_up, self.student_steps, self.on_move = batch, warm_up, student_steps, on_move
        self.labels = torch.zeros(0, dtype=torch.int64)
        self._number = 0

    def __call__(self, step: int) -> Batch:
        """The student's batch for a step."""
        if step == 0:
            for move in range(self.warm_up):
                self.move()
                if self.on_move is not None:
                    self.on_move(move + 1)
        made = self.move() if step % self.student_steps == 0 else None
        if made is not None and self.student_steps == 1:
            self.labels = made.labels
            return Batch(self.inputs(made.images.detach()), {key: item.detach() for key, item in made.teacher.items()})
        with torch.no_grad():
            images, self.labels = self._draw()
        return Batch(self.inputs(images))

    def move(self) -> Move:
        """One step of the generator; what it made before the step."""
        images, labels = self._draw()
        made = Move(images, labels, self.teacher(images), {} if self.student is None else self.student(images))
        self.player.step(torch.stack([weight * term(made) for weight, term in self.terms]).sum())
        return made

    def state(self) -> dict[str, Array]:
        """For a checkpoint."""
        return {"number": np.asarray(self._number), **self.player.state()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take up what :meth:`state` gave."""
        self._number = int(state["number"])
        self.player.restore(state)

    def _draw(self) -> tuple[Tensor, Tensor]:
        self._number += 1
        return self.player.draw(self.batch, self._number)
