"""What single classes look like inside a network, and a term that draws samples to their class (TexQ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxq.synthesis.game import Move
from onnxq.synthesis.statistics import Remembered, moments


class Centers:
    """Mean and deviation of every channel over the images of each class, at the input of every BatchNormalization.

    Args:
        layers: Those BatchNormalization nodes.
        classes: How many classes there are.
    """

    def __init__(self, layers: Sequence[Remembered], classes: int) -> None:
        self.layers, self.counts = layers, torch.zeros(classes)
        self._sums = [torch.zeros(2, classes, len(layer.mean)) for layer in layers]

    def add(self, taps: Mapping[str, Tensor], labels: Tensor) -> None:
        """Take up some images.

        Args:
            taps: The values of the layers.
            labels: The class of each image, [samples].
        """
        labels = labels.cpu()
        self.counts.index_add_(0, labels, torch.ones(len(labels)))
        for layer, sums in zip(self.layers, self._sums, strict=True):
            for kind, found in zip(sums, moments(taps[layer.value], per_sample=True), strict=True):
                kind.index_add_(0, labels, found.cpu())

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation of a layer's channels by class, [classes, channels]; 0 where a class has no image."""
        mean, deviation = self._sums[index] / self.counts.clamp(min=1)[:, None]
        return mean, deviation


@dataclass(frozen=True)
class MatchCenters:
    """Squared distance of each sample's statistics to those of its class, in what each channel remembers.

    Only deep layers count, where classes differ; classes without an image do not.

    Attributes:
        centers: Of the classes.
        first: The first layer that counts.
    """

    centers: Centers
    first: int

    def __call__(self, move: Move) -> Tensor:
        """The term, a scalar: the mean over layers, samples and channels."""
        known = (self.centers.counts > 0).to(move.images)[move.labels]
        found = []
        for index, layer in enumerate(self.centers.layers[self.first :], self.first):
            wanted = [item.to(move.images)[move.labels] for item in self.centers.of(index)]
            for made, center in zip(moments(move.teacher[layer.value], per_sample=True), wanted, strict=True):
                found.append((((made - center) / layer.unit).square().mean(-1) * known).mean())
        return torch.stack(found).mean()
