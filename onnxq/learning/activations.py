"""Learned step sizes of activations, and quantization that is dropped at random while others learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.learning.quantizers import Quantizer, clip_bounds, read, round_through, scale_gradient


class LearnedStep:
    """An activation quantizer whose step size has a gradient, and its zero point too if asked for.

    The gradient is that of LSQ (S. K. Esser et al., ICLR 2020, arXiv 1902.08153, equation 3), which the
    straight-through estimate of rounding alone already gives. The logarithm is what is learned, so that one rate
    fits steps of any size and no step becomes negative. The zero point is LSQ+'s offset β = −z·s (Y. Bhalgat et al.,
    CVPR workshops 2020, arXiv 2004.09576, equation 5) as a whole number, which the runtimes need; it is learned in
    parts of the range of codes and stays among them, so that 0 remains exact.

    Args:
        graph: Where the initializers are.
        quantizer: An activation's quantizer of an integer format.
        drop: Probability that an element stays float (QDrop, X. Wei et al., ICLR 2022, arXiv 2203.05740).
        generator: The source of randomness for that; may be ``None`` where nothing is dropped.
        learn_zero_point: Whether the zero point is learned too.
        scaled: Whether gradients are multiplied by LSQ's 1/√(N·Q) with N values in a sample and Q the highest code
            (section 2.2). It is made for SGD; Adam divides it out.
    """

    def __init__(
        self,
        graph: TorchGraph,
        quantizer: Quantizer,
        drop: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        learn_zero_point: bool = False,
        scaled: bool = False,
    ) -> None:
        self.quantizer = quantizer
        self.first = read(graph, quantizer.scale)
        self.first_zero_point = read(graph, quantizer.zero_point).to(torch.float32)
        self.log_step = torch.zeros_like(self.first, requires_grad=True)
        self.shift = torch.zeros_like(self.first_zero_point, requires_grad=learn_zero_point)
        self.drop, self.generator, self.scaled = drop, generator, scaled

    @property
    def step(self) -> Tensor:
        """The step size."""
        return self.first * self.log_step.exp()

    @property
    def zero_point(self) -> Tensor:
        """The zero point, a whole number in float."""
        if not self.shift.requires_grad:
            return self.first_zero_point
        low, high = self.quantizer.low, self.quantizer.high
        return round_through((self.first_zero_point + self.shift * (high - low)).clamp(low, high))

    def replacement(self) -> Replacement:
        """For :meth:`TorchGraph.run`."""
        return Replacement((self.quantizer.source,), self)

    def __call__(self, value: Tensor) -> Tensor:
        """The value as the quantizer makes it, part of it left as it was."""
        step, zero_point = self.step, self.zero_point
        if self.scaled:
            factor = gradient_factor(value.numel() // max(1, value.shape[0] if value.ndim else 1), self.quantizer.high)
            step, zero_point = scale_gradient(step, factor), scale_gradient(zero_point, factor)
        codes = round_through(value / step) + zero_point
        quantized = (codes.clamp(self.quantizer.low, self.quantizer.high) - zero_point) * step
        if self.drop <= 0 or self.generator is None:
            return quantized
        return torch.where(random_mask(value.shape, self.drop, self.generator), value, quantized)

    def learned(self) -> dict[str, Tensor]:
        """The new initializers by name: the scale, the zero point if it moves, and the Clip's bounds."""
        step, zero_point = self.step.detach(), self.zero_point.detach()
        found = {self.quantizer.scale: step, **clip_bounds(self.quantizer, step, zero_point)}
        if self.shift.requires_grad:
            found[self.quantizer.zero_point] = zero_point
        return found


def gradient_factor(values: int, highest: float) -> float:
    """LSQ's 1/√(N·Q) (arXiv 1902.08153, section 2.2)."""
    return 1 / math.sqrt(max(1.0, values * highest))


def random_mask(shape: torch.Size, probability: float, generator: torch.Generator) -> Tensor:
    """True with the given probability, in steps of 1/256: a random byte each, four times as fast as a random float."""
    count = math.prod(shape)
    # A call that makes a tensor, unlike one that fills it, gives each sample its own where an export fixes the batch.
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-count // 8),), device=generator.device, generator=generator)
    return (words.view(torch.uint8)[:count] < 256 * probability).view(shape)
