"""A weight as a sum of codes: each order quantizes, with scales of its own, the error that the one before left.

With nearest rounding and the highest code q = 2^(b−1) − 1, an error is at most half a step, λ / 2q, and becomes the
range of the next order: every order divides the largest error by 2q, which is 2, 6 and 14 at 2, 3 and 4 bits.

Source: E. Yvinec, A. Dapogny, M. Cord, K. Bailly, REx: Data-Free Residual Quantization Error Expansion, NeurIPS 2023
(arXiv 2203.14645).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.learning.channel_scales import as_rows, from_rows, round_matrix
from onnxq.scheme import Spec

Array = np.ndarray[Any, Any]


@dataclass
class Order:
    """One term of the sum.

    Attributes:
        weight: [kept units, channels in a unit, elements]; codes times scales, except where no later order refines it.
        kept: Which units it holds, ascending.
    """

    weight: Array
    kept: Array


class Residuals:
    """The orders of one layer's weight so far.

    The last order of each unit holds its rest unrounded, so that the orders add up to the weight. The quantizer that
    rounds it later takes the same scales as here, from the extremes.

    Args:
        matrix: The weight, [output channels, elements].
        spec: How each order is quantized; scales per channel or per block of elements.
        units: Into how many runs of output channels it is cut: all channels, or the groups of a convolution.
        clip: Whether an order that another follows leaves half a step at both ends to it: λ / (q + ½) is its step, and
            an order divides the largest error by 2q + 1.
    """

    def __init__(self, matrix: Array, spec: Spec, units: int, *, clip: bool = False) -> None:
        self.spec, self.clip = spec, clip
        self.norm = float(np.square(matrix, dtype=np.float64).sum())
        self.rest = matrix.reshape(units, -1, matrix.shape[1]).copy()
        self.orders = [Order(self.rest.copy(), np.arange(units))]
        self._holder = np.zeros(units, np.int64)

    @property
    def unit_size(self) -> int:
        """Weights in a unit."""
        return int(self.rest[0].size)

    def rounded(self) -> Array:
        """The sum of all orders, the last one rounded: [units, channels in a unit, elements]."""
        total = self._rounded(self.rest)
        for number, order in enumerate(self.orders):
            before = self._holder[order.kept] != number  # what holds the rest is counted above
            total[order.kept[before]] += order.weight[before]
        return np.asarray(total)

    def errors(self) -> Array:
        """The squared error that rounding leaves in each unit."""
        return np.asarray(np.square(self.rest - self._rounded(self.rest), dtype=np.float64).sum(axis=(1, 2)))

    def refine(self, kept: Array) -> None:
        """Round the rest of some units and let one more order hold what that leaves.

        Args:
            kept: Indices of units, ascending.
        """
        if not kept.size:
            return
        rounded = self._rounded(self._clipped(self.rest[kept]))
        for unit, row in zip(kept, rounded, strict=True):
            order = self.orders[self._holder[unit]]
            order.weight[np.searchsorted(order.kept, unit)] = row
        self.rest[kept] -= rounded
        self._holder[kept] = len(self.orders)
        self.orders.append(Order(self.rest[kept], kept))

    def _clipped(self, units: Array) -> Array:
        """Units without the half step at both ends that the next order holds anyway."""
        if not self.clip:
            return units
        highest = self.spec.format.high
        matrix = units.reshape(-1, units.shape[-1])
        rows = as_rows(matrix, self.spec)
        bounds = np.abs(rows).max(axis=1, keepdims=True) * (highest / (highest + 0.5))
        return from_rows(np.clip(rows, -bounds, bounds), matrix.shape).reshape(units.shape)

    def _rounded(self, units: Array) -> Array:
        return round_matrix(units.reshape(-1, units.shape[-1]), self.spec).reshape(units.shape)


def strongest(layers: Mapping[str, Residuals], density: float, allocation: str) -> dict[str, Array]:
    """The units that the next order refines: those with the largest errors.

    Args:
        layers: The orders so far, by layer.
        density: How many of the weights to refine, from 0 to 1.
        allocation: ``layer`` takes this part of every layer; ``network`` ranks the units of all layers by what
            refining them takes off their layer's relative error, for each weight added.

    Returns:
        Indices of units, ascending, by layer.
    """
    errors = {name: layer.errors() for name, layer in layers.items()}
    if allocation == "layer" or density >= 1:
        return {
            name: np.sort(np.argsort(-found, kind="stable")[: int(np.ceil(density * len(found)))])
            for name, found in errors.items()
        }
    names = list(layers)
    sizes = np.concatenate([np.full(len(errors[name]), layers[name].unit_size) for name in names])
    gains = np.concatenate([errors[name] / max(layers[name].norm, 1e-30) for name in names]) / sizes
    owners = np.concatenate([np.full(len(errors[name]), index) for index, name in enumerate(names)])
    units = np.concatenate([np.arange(len(errors[name])) for name in names])
    order = np.argsort(-gains, kind="stable")
    chosen = order[np.cumsum(sizes[order]) <= density * sizes.sum()]
    return {name: np.sort(units[chosen[owners[chosen] == index]]) for index, name in enumerate(names)}


def share_out(
    layers: Mapping[str, Residuals], importance: Mapping[str, float], budget: float, most: int
) -> list[dict[str, Array]]:
    """The units that each further order refines, where one budget of weights holds for all orders together.

    A step of a unit is worth the error that it takes off its layer, times the layer's importance, for each weight that
    it adds. The steps worth most are taken until the budget is spent: a thin layer that matters gets a third order
    before a wide one that does not gets its second.

    Args:
        layers: With one order; they stay as they are.
        importance: What a unit of squared error in a layer's weight costs, by layer.
        budget: How many weights all further orders may hold together.
        most: How many further orders a unit may get.

    Returns:
        Indices of units, ascending, by layer, for each further order.
    """
    names = list(layers)
    tried = copy.deepcopy(dict(layers))
    gains, sizes, owners, units, steps = [], [], [], [], []
    for position, name in enumerate(names):
        layer = tried[name]
        every = np.arange(len(layer.rest))
        best = np.full(len(every), np.inf)
        for step in range(most):
            before = layer.errors()
            layer.refine(every)
            taken = (before - layer.errors()) * importance[name] / layer.unit_size
            best = np.minimum(best, taken)  # so that no step comes before the one it builds on
            gains.append(best)
            sizes.append(np.full(len(every), layer.unit_size))
            owners.append(np.full(len(every), position))
            units.append(every)
            steps.append(np.full(len(every), step))
    owner, unit, number = np.concatenate(owners), np.concatenate(units), np.concatenate(steps)
    order = np.lexsort((number, -np.concatenate(gains)))
    chosen = order[np.cumsum(np.concatenate(sizes)[order]) <= budget]
    owner, unit, number = owner[chosen], unit[chosen], number[chosen]
    return [
        {name: np.sort(unit[(owner == position) & (number == step)]) for position, name in enumerate(names)}
        for step in range(most)
    ]
