"""Learned step sizes of activations, and quantization that is dropped at random while others learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.learning.quantizers import Quantizer, clip_bounds, read, round_through


class LearnedStep:
    """An activation quantizer whose step size has a gradient.

    The gradient is that of LSQ (S. K. Esser et al., ICLR 2020, arXiv 1902.08153, equation 3), which the
    straight-through estimate of rounding alone already gives. The logarithm is what is learned, so that one rate
    fits steps of any size and no step becomes negative; LSQ scales the gradient of the step instead.

    Args:
        graph: Where the initializers are.
        quantizer: An activation's quantizer of an integer format.
        drop: Probability that an element stays float (QDrop, X. Wei et al., ICLR 2022, arXiv 2203.05740).
        generator: The source of randomness for that.
    """

    def __init__(self, graph: TorchGraph, quantizer: Quantizer, drop: float, generator: torch.Generator) -> None:
        self.quantizer = quantizer
        self.first = read(graph, quantizer.scale)
        self.zero_point = read(graph, quantizer.zero_point).to(torch.float32)
        self.log_step = torch.zeros_like(self.first, requires_grad=True)
        self.drop, self.generator = drop, generator

    @property
    def step(self) -> Tensor:
        """The step size."""
        return self.first * self.log_step.exp()

    def replacement(self) -> Replacement:
        """For :meth:`TorchGraph.run`."""
        return Replacement((self.quantizer.source,), self)

    def __call__(self, value: Tensor) -> Tensor:
        """The value as the quantizer makes it, part of it left as it was."""
        step = self.step
        codes = round_through(value / step) + self.zero_point
        quantized = (codes.clamp(self.quantizer.low, self.quantizer.high) - self.zero_point) * step
        if self.drop <= 0:
            return quantized
        return torch.where(random_mask(value.shape, self.drop, self.generator), value, quantized)

    def learned(self, graph: TorchGraph) -> dict[str, Tensor]:
        """The new initializers by name: the scale, and the Clip's bounds that follow it."""
        step = self.step.detach()
        return {self.quantizer.scale: step, **clip_bounds(graph, self.quantizer, step)}


def random_mask(shape: torch.Size, probability: float, generator: torch.Generator) -> Tensor:
    """True with the given probability, in steps of 1/256: a random byte each, four times as fast as a random float."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=generator.device)
    return (words.random_(-(1 << 63), None, generator=generator).view(torch.uint8)[:count] < 256 * probability).view(
        shape
    )
