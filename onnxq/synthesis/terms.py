"""Terms of what synthesis minimises: small functions of the inputs and of values inside the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onnxq.synthesis.statistics import Remembered, moments

Taps = Mapping[str, Tensor]
Term = Callable[[Tensor, Taps], Tensor]

SMALLEST_DIFFICULTY = 1e-6
VARIATION_ELEMENTS = 32 * 3 * 224 * 224


@dataclass(frozen=True)
class Slack:
    """How far statistics may be off without a penalty, for one layer.

    Attributes:
        mean: Of the means.
        deviation: Of the standard deviations.
    """

    mean: float = 0.0
    deviation: float = 0.0


@dataclass(frozen=True)
class MatchStatistics:
    """Squared distance to the means and the spread that BatchNormalization remembers.

    Attributes:
        layers: What is remembered.
        per_sample: Whether each sample has to match by itself (ZeroQ) or the batch as a whole (GENIE). Samples that
            all match by themselves look alike.
        mean_of_channels: Mean instead of sum over channels, so that wide layers weigh no more than narrow ones.
        slack: What is free in each layer (DSG, section 3.2); empty: nothing.
        emphasis: How much more sample i gives to layer i (DSG, section 3.3); per sample only.
        first: The number of the batch's first sample among all.
        weights: Of each layer; empty: one each.
        variances: Whether the spread is the variance (GDFQ and those who follow it), and not the standard deviation.
    """

    layers: Sequence[Remembered]
    per_sample: bool
    mean_of_channels: bool
    slack: Sequence[Slack] = ()
    emphasis: float = 0.0
    first: int = 0
    weights: Sequence[float] = ()
    variances: bool = False

    def __call__(self, inputs: Tensor, taps: Taps) -> Tensor:
        """The term, a scalar."""
        total = torch.zeros((), device=inputs.device)
        rows = self.first + torch.arange(len(inputs), device=inputs.device)
        for index, layer in enumerate(self.layers):
            free = self.slack[index] if self.slack else Slack()
            values = taps[layer.value]
            mean, deviation = moments(values, per_sample=self.per_sample)
            error = ((mean - layer.mean).abs() - free.mean).clamp(min=0).square()
            if values.ndim > 2 or not self.per_sample:  # a single number has no spread to match
                found, wanted = deviation, layer.deviation
                if self.variances:
                    found, wanted = found.square(), wanted.square()
                error = error + ((found - wanted).abs() - free.deviation).clamp(min=0).square()
            error = error.mean(-1) if self.mean_of_channels else error.sum(-1)
            if self.per_sample:
                weight = 1 + self.emphasis * (rows % len(self.layers) == index).float()
                error = (error * weight).mean()
            total = total + (self.weights[index] * error if self.weights else error)
        return total


@dataclass(frozen=True)
class StandardInputs:
    """Squared distance of each input channel to mean 0 and standard deviation 1.

    Inputs are in units in which the first layer's statistics are met (see :mod:`onnxq.synthesis.scale`), which for
    normalised images are those of the network.

    Attributes:
        per_sample: Whether each sample has to be so by itself, which makes all of them equally bright (ZeroQ, GENIE).
    """

    per_sample: bool = True

    def __call__(self, inputs: Tensor, taps: Taps) -> Tensor:
        """The term, a scalar."""
        mean, deviation = moments(inputs, per_sample=self.per_sample)
        return (mean.square() + (deviation - 1).square()).sum(-1).mean()


@dataclass(frozen=True)
class PredictClasses:
    """Cross-entropy of what the network predicts for each sample and a class that was drawn for it, in nats.

    Attributes:
        logits: The value with the logits, [samples, classes].
        labels: The class of each sample, [samples].
        difficulty: The power of a sample's difficulty 1 − p(class) that weighs it, so that hard samples are not lost
            among easy ones (HAST, arXiv 2303.13826, section 3.2); 0: all weigh the same.
    """

    logits: str
    labels: Tensor
    difficulty: float = 0.0

    def __call__(self, inputs: Tensor, taps: Taps) -> Tensor:
        """The term, a scalar."""
        entropy = functional.cross_entropy(taps[self.logits], self.labels, reduction="none")
        if self.difficulty:
            hardness = (-torch.expm1(-entropy)).clamp(min=SMALLEST_DIFFICULTY)  # whose power has a gradient
            entropy = entropy * hardness**self.difficulty
        return entropy.mean()


@dataclass(frozen=True)
class TotalVariation:
    """How far the variation of a batch of images is from a wanted one (PSAQ-ViT, equation 10).

    The variation is the sum of the L2 norms of the differences between neighbours in four directions, in units in
    which a batch of 32 RGB images of 224² has it: norms grow with the root of the number of pixels.

    Attributes:
        wanted: The variation to come to; the authors draw it between 2,500 and 3,000.
    """

    wanted: float

    def __call__(self, inputs: Tensor, taps: Taps) -> Tensor:
        """The term, a scalar."""
        directions = (
            inputs[..., :, 1:] - inputs[..., :, :-1],
            inputs[..., 1:, :] - inputs[..., :-1, :],
            inputs[..., 1:, 1:] - inputs[..., :-1, :-1],
            inputs[..., 1:, :-1] - inputs[..., :-1, 1:],
        )
        size = math.sqrt(inputs.numel() / VARIATION_ELEMENTS)
        return (torch.stack([difference.norm() for difference in directions]).sum() / size - self.wanted).abs()


def slack_of(found: Sequence[tuple[Tensor, Tensor]], layers: Sequence[Remembered], part: float) -> list[Slack]:
    """What random inputs are off in each layer, as ``pooled``: the quantile ``part`` over channels (DSG, 3.2)."""
    slack = []
    for layer, (mean, deviation) in zip(layers, found, strict=True):
        off = [(mean - layer.mean).abs(), (deviation - layer.deviation).abs()]
        slack.append(Slack(*(float(torch.quantile(item, part)) for item in off)))
    return slack


def deep_from(layers: int) -> int:
    """The first layer of the deep half, as TexQ's followers count: (L + 2) // 2 − 2."""
    return max(0, (layers + 2) // 2 - 2)


def layer_weights(layers: int, shallow: float, deep: float) -> list[float]:
    """The weight of each layer in a mean over them: shallow ones leave room for texture, deep ones say what it is."""
    start = deep_from(layers)
    return [(shallow if index < start else deep) / layers for index in range(layers)]
