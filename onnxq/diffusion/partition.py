"""The steps of a sampler in groups that share a scale: evenly cut, or where the least error is.

Source: C. Wang, Z. Wang, X. Xu, Y. Tang, J. Zhou, J. Lu, Towards Accurate Post-training Quantization for Diffusion
Models (APQ-DM), CVPR 2024 (arXiv 2305.18723) shares G quantizers among T steps. Contiguous groups by dynamic
programming are ours: cheap, deterministic, and the start of the paper's differentiable search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.calibration.observers import Moments, Observer
from onnxq.calibration.timesteps import StepStatistics
from onnxq.errors import OnnxqError
from onnxq.formats import NumberFormat

Array = np.ndarray[Any, Any]

CANDIDATES = 64  # scales that are tried, of those that the steps themselves want


@dataclass(frozen=True)
class ScaleCosts:
    """What each step loses with each of some scales.

    Attributes:
        scales: [candidates]; the first is the one that suits all steps together.
        costs: Squared error as part of the mean square [steps, candidates]; 0 for steps that nothing is known of.
        observed: Which steps are known [steps].
    """

    scales: Array
    costs: Array
    observed: Array

    def table(self, groups: Array) -> Array:
        """The best scale of each group, given out to the steps.

        Args:
            groups: The group of each step [steps]. With one group for all it is the scale without time.

        Returns:
            Scales [steps].
        """
        table = np.full(len(groups), self.scales[0])
        names = np.unique(groups)
        for group in names if len(names) > 1 else []:
            members = groups == group
            table[members] = self.scales[int(np.argmin(self.costs[members].sum(axis=0)))]
        return table

    def error(self, table: Array) -> float:
        """The sum over steps of what they lose with their scale of a :meth:`table`."""
        columns = [int(np.flatnonzero(self.scales == scale)[0]) for scale in table]
        return float(self.costs[np.arange(len(table)), columns].sum())


def scale_costs(
    statistics: StepStatistics,
    steps: int,
    number_format: NumberFormat,
    static: float,
    zero_point: float,
    observer: Observer,
    *,
    symmetric: bool,
    powers_of_two: bool = False,
) -> ScaleCosts:
    """What every step loses with the scales that the others want.

    The zero point is the same in all steps: only the scale follows the time, so that one graph with a factor before
    its quantizer can follow too.

    Args:
        statistics: Of the activation.
        steps: How many the sampler has.
        number_format: Of the codes.
        static: The scale for all steps together.
        zero_point: The code of zero.
        observer: How a range follows from the statistics of a step.
        symmetric: Whether the range is.
        powers_of_two: Whether scales are the static one times a power of two.
    """
    wanted = []
    for step in sorted(statistics.by_step):
        chosen = observer(statistics.by_step[step], number_format, symmetric)
        up = chosen.high / (number_format.high - zero_point) if number_format.high > zero_point else 0.0
        down = chosen.low / (number_format.low - zero_point) if number_format.low < zero_point else 0.0
        if symmetric and number_format.signed:
            down = -chosen.low / number_format.high  # the code beyond stays free, as in static scales
        scale = max(up, down)
        wanted.append(scale if scale > 0 else static)
    scales = np.unique(np.asarray(wanted, np.float64))
    if powers_of_two:
        scales = np.unique(static * 2.0 ** np.round(np.log2(scales / static)))
    if len(scales) > CANDIDATES:
        scales = scales[np.linspace(0, len(scales) - 1, CANDIDATES).round().astype(int)]
    scales = np.concatenate([[static], scales[scales != static]])
    costs, observed = np.zeros((steps, len(scales))), np.zeros(steps, bool)
    for step, seen in statistics.by_step.items():
        values, counts = seen.distribution()
        power = float(counts @ values**2)
        observed[step] = True
        if power > 0:
            low = (number_format.low - zero_point) * scales
            high = (number_format.high - zero_point) * scales
            costs[step] = Moments(values, counts).error(low, high, scales) / power
    return ScaleCosts(scales, costs, observed)


def uniform(steps: int, groups: int) -> Array:
    """Groups of equal length: the group of each step [steps].

    Raises:
        OnnxqError: there are not that many steps.
    """
    check_groups(steps, groups)
    return np.arange(steps) * groups // steps


def optimal(layers: Sequence[ScaleCosts], groups: int) -> Array:
    """The cut of the steps into contiguous groups with the least error, each layer with its best scale in each.

    Dynamic programming over where the groups end: exact, O(G T² + L T² S). More groups never raise the error.

    Args:
        layers: One layer for a partition of its own, all of them for a common one.
        groups: How many groups, at most.

    Returns:
        The group of each step [steps]; where nothing is known of a step, it joins its neighbour.

    Raises:
        OnnxqError: there are not that many steps.
    """
    steps = len(layers[0].observed)
    check_groups(steps, groups)
    known = np.flatnonzero(layers[0].observed)
    if groups == 1 or len(known) < 2:
        return np.zeros(steps, np.int64)
    error = sum(_segments(layer.costs[known]) for layer in layers)
    ends = _cuts(np.asarray(error), min(groups, len(known)))
    nearest = np.abs(np.arange(steps)[:, None] - known).argmin(axis=1)
    result: Array = np.searchsorted(ends, nearest, side="right")
    return result


def _segments(costs: Array) -> Array:
    """The least error of steps i … j with one scale [T, T]; infinite where j < i."""
    sums = np.concatenate([np.zeros((1, costs.shape[1])), np.cumsum(costs, axis=0)])
    steps = len(costs)
    least = np.full((steps, steps), np.inf)
    for first in range(steps):
        least[first, first:] = (sums[first + 1 :] - sums[first]).min(axis=1)
    kept: Array = np.maximum(least, 0)
    return kept


def _cuts(error: Array, groups: int) -> Array:
    """Where groups end (excluded), all but the last."""
    steps = len(error)
    best = error[0].copy()  # of the steps up to and with j, in one group
    starts = []
    for _ in range(1, groups):
        # The last group begins at i > 0; what is before it is in one group less.
        total = best[:-1, None] + error[1:]
        start = total.argmin(axis=0) + 1
        least = total.min(axis=0)
        start = np.where(least < best, start, 0)  # 0: a group more does not help
        starts.append(start)
        best = np.minimum(best, least)
    ends, last = [], steps - 1
    for start in reversed(starts):
        if start[last] > 0:
            ends.append(int(start[last]))
            last = ends[-1] - 1
    return np.asarray(sorted(ends), np.int64)


def check_groups(steps: int, groups: int) -> None:
    """Refuse what no partition has.

    Raises:
        OnnxqError: there are fewer groups than one, or more than steps.
    """
    if not 1 <= groups <= steps:
        raise OnnxqError(
            f"expected between 1 and {steps} groups of the sampler's {steps} steps, found {groups}",
            hint=f"use for example --set groups={max(1, min(8, steps))}, or more --steps",
        )
