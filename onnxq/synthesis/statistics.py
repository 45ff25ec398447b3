"""What a model remembers of its data, in BatchNormalization or a side-car file, and how far inputs are from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from onnxq import graph as graphs
from onnxq.calibration.side_car import attached
from onnxq.folding import array_of

EPSILON = 1e-6
DEAD_CHANNEL = 1e-2


@dataclass(frozen=True)
class Remembered:
    """The statistics of one BatchNormalization's input.

    Attributes:
        value: The name of that input, which has its channels on axis 1.
        mean: Mean of each channel, [channels].
        deviation: Standard deviation of each channel, [channels].
    """

    value: str
    mean: Tensor
    deviation: Tensor

    @property
    def unit(self) -> Tensor:
        """In what errors of each channel are counted, [channels].

        Its deviation, but a hundredth of the layer's median at least: a channel that never changed would else outweigh
        all others.
        """
        return self.deviation.clamp(min=DEAD_CHANNEL * float(self.deviation.median()))


def remembered(model: ir.Model, device: str = "cpu") -> list[Remembered]:
    """The statistics of every BatchNormalization in graph order, then those of a side-car file; else nothing."""
    found = []
    for node in model.graph:
        if not graphs.is_op(node, "BatchNormalization") or len(node.inputs) < 5 or node.inputs[0] is None:
            continue
        if not all(graphs.is_constant(value) for value in node.inputs[3:5]):
            continue
        mean, variance = (torch.from_numpy(array_of(value).astype("float32")).to(device) for value in node.inputs[3:5])
        found.append(Remembered(node.inputs[0].name or "", mean, (variance + EPSILON).sqrt()))
    for name, kinds in attached(model).items():
        mean, deviation = (torch.from_numpy(array).to(device) for array in kinds)
        found.append(Remembered(name, mean, (deviation.square() + EPSILON).sqrt()))
    return found


def moments(values: Tensor, *, per_sample: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel.

    Args:
        values: [samples, channels, …].
        per_sample: Over the positions of each sample ([samples, channels]) or over all samples ([channels]).
    """
    positions = list(range(2, values.ndim))
    axes = positions if per_sample else [0, *positions]
    if not axes:  # one number per sample and channel: it has no spread of its own
        return values, torch.zeros_like(values)
    variance, mean = torch.var_mean(values, dim=axes, correction=0)
    return mean, (variance + EPSILON).sqrt()


def pooled(batches: Iterable[Mapping[str, Tensor]], layers: Sequence[Remembered]) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each channel of each layer over several batches, of which few are held at a time.

    Args:
        batches: The layers' values, [samples, channels, …], of each batch by name.
        layers: Whose values.
    """
    seen = [
        (len(batch[layers[0].value]), [moments(batch[layer.value], per_sample=False) for layer in layers])
        for batch in batches
    ]
    share = torch.tensor([size for size, _ in seen], dtype=torch.float64)
    share = (share / share.sum()).reshape(-1, 1)
    found = []
    for index in range(len(layers)):
        means, deviations = (torch.stack(parts).double() for parts in zip(*(of[index] for _, of in seen), strict=True))
        weights = share.to(means.device)
        mean = (weights * means).sum(0)
        variance = (weights * (deviations.square() + (means - mean).square())).sum(0)
        found.append((mean.float(), variance.sqrt().float()))
    return found


def distance(found: Sequence[tuple[Tensor, Tensor]], layers: Sequence[Remembered]) -> float:
    """How far inputs are from the training data as BatchNormalization saw it.

    The root mean square, over layers and channels, of the distance between the means and between the standard
    deviations of inputs (:func:`pooled`) and those remembered, in remembered standard deviations. 0 is a perfect match.
    """
    total, count = 0.0, 0
    for layer, (mean, deviation) in zip(layers, found, strict=True):
        for is_now, wanted in ((mean, layer.mean), (deviation, layer.deviation)):
            off = (is_now - wanted) / layer.unit
            total += float(off.square().clamp(max=1e6).sum())
            count += off.numel()
    return math.sqrt(total / max(count, 1))
