"""Learned rounding: a number between 0 and 1 for every weight, which ends at one of the two."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxq.learning.quantizers import Grid

START_FROM_CODE = 0.2  # how far towards the neighbour a weight starts that has been rounded before
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # gamma and zeta: the sigmoid reaches 0 and 1, and has no gradient beyond


class LearnedRounding:
    """W = s · (clip(⌊W/s₀⌋ + h(V) + z, low, high) − z) with the rectified sigmoid h.

    The floor is that of the first step size and stays, so that the step s can be learned beside V without changing
    which two codes a weight chooses from (GENIE, section 3.3).

    Source: M. Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020
    (arXiv 2004.10568), equations 21 to 24.

    Args:
        grid: The weight's grid.
        learn_step: Whether the step is learned too.
        rounded: What another method has made of the weight: the two codes are then its own and the neighbour on the
            side of the float weight, wherever that is.
    """

    def __init__(self, grid: Grid, learn_step: bool = False, rounded: Tensor | None = None) -> None:
        self.grid = grid
        ratio = grid.weight / grid.spread(grid.scale)
        if rounded is None:
            self.floor = ratio.floor()
            rest = ratio - self.floor
        else:
            code = (rounded / grid.spread(grid.scale)).round()
            from_below = (ratio < code).to(ratio.dtype)
            self.floor = code - from_below
            rest = START_FROM_CODE + from_below * (1 - 2 * START_FROM_CODE)
        self.variable = -torch.log((STRETCH_HIGH - STRETCH_LOW) / (rest - STRETCH_LOW) - 1)
        self.variable.requires_grad_(True)
        self.log_step = torch.zeros_like(grid.scale, requires_grad=learn_step)

    @property
    def step(self) -> Tensor:
        """The step size, in the shape of the scale initializer."""
        return self.grid.scale * self.log_step.exp() if self.log_step.requires_grad else self.grid.scale

    def share(self) -> Tensor:
        """h(V): how far up each weight is rounded."""
        return (torch.sigmoid(self.variable) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)

    def weight(self) -> Tensor:
        """The softly rounded weight."""
        return self._value(self.share())

    def penalty(self, sharpness: float) -> Tensor:
        """Σ 1 − |2h − 1|^β: zero where every weight has decided (equation 24)."""
        return (1 - (2 * self.share() - 1).abs().pow(sharpness)).sum()

    def decided(self) -> tuple[Tensor, Tensor]:
        """The weight on its grid, and the step."""
        with torch.no_grad():
            return self._value((self.variable >= 0).to(self.floor.dtype)), self.step.detach()

    def _value(self, up: Tensor) -> Tensor:
        grid = self.grid
        codes = (self.floor + up + grid.zero_point).clamp(grid.low, grid.high)
        return (codes - grid.zero_point) * grid.spread(self.step)
