"""The best state of a student, judged by inputs that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from onnxq.learning.student import Student

Array = np.ndarray[Any, Any]

BEST = "best/"


class KeepBest:
    """Looks at a student before its first step and every few steps, and remembers what it was when it did best.

    Images that a network makes up are not those it will see: a student may grow better on them and worse on all
    others. What was made in another way tells.

    Args:
        student: What learns.
        judge: The loss on inputs that it does not learn from.
        every: Steps between two looks.

    Attributes:
        first: The loss before the first step.
        least: The least loss.
        step: After how many steps it was least.
    """

    def __init__(self, student: Student, judge: Callable[[], float], every: int) -> None:
        self.student, self.judge, self.every = student, judge, max(1, every)
        self.first = self.least = judge()
        self.step = 0
        self._best = _copied(student.learned())

    def __call__(self, step: int) -> None:
        """Look, if it is time to."""
        if step % self.every:
            return
        loss = self.judge()
        if loss < self.least:
            self.least, self.step, self._best = loss, step, _copied(self.student.learned())

    def learned(self) -> dict[str, Array]:
        """The new initializers of the best state, by name."""
        return self._best

    def state(self) -> dict[str, Array]:
        """For a checkpoint."""
        arrays = {BEST + name: array for name, array in self._best.items()}
        return {"losses": np.asarray([self.first, self.least]), "step": np.asarray(self.step), **arrays}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take up what :meth:`state` gave."""
        self.first, self.least = (float(loss) for loss in state["losses"])
        self.step = int(state["step"])
        self._best = {key.removeprefix(BEST): array for key, array in state.items() if key.startswith(BEST)}


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
