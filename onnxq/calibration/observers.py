"""What calibration keeps of a tensor, and the ranges that follow from it.

Statistics are monoids: ``update`` with values, ``merge`` with others, then ask for a ``range``. Extremes are exact.
The body of the distribution is a histogram over the upper 16 bits of float32, which needs no range beforehand, of a
strided sample of the values: the full histogram costs more than the network itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.condensed import Condensed
from onnxq.errors import OnnxqError
from onnxq.formats import NumberFormat

Array = np.ndarray[Any, Any]

BINS = 1 << 16
PENDING_VALUES = 1 << 16
CANDIDATES = 120
POWER_CANDIDATES = 100
TYPICAL_MARGIN = 1.5
TYPICAL_FLOOR = 0.8
FEW_VALUES = 32  # in a sample; the extremes of fewer are what they happen to be


class Statistics:
    """Exact extremes and a sampled histogram of one tensor over all batches.

    Attributes:
        low: Smallest value seen.
        high: Largest value seen.
        count: Values seen (not only those sampled).
        rows: Samples seen (along the first axis).
        sum_of_lows: Sum over samples of each one's smallest value.
        sum_of_highs: Sum over samples of each one's largest value.
        is_short: Whether real data reaches further than what was seen here (see :func:`with_headroom`).
    """

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self.count = 0
        self.rows = 0
        self.sum_of_lows = 0.0
        self.sum_of_highs = 0.0
        self.is_short = False
        # The histogram, sparse: of 65,536 bins a tensor occupies a few thousand.
        self._bins: Array = np.zeros(0, np.uint16)
        self._counts: Array = np.zeros(0, np.int64)
        self._pending: list[Array] = []
        self._pending_values = 0

    def update(self, values: Array | Condensed, sampled: int = 4096) -> None:
        """Add one batch of values, of which about ``sampled`` go into the histogram."""
        if isinstance(values, Condensed):
            self._add(values.lows, values.highs, values.part, sampled)
            return
        flat = np.asarray(values, np.float32).reshape(-1)
        if flat.size == 0:
            return
        rows = flat.reshape(values.shape[0] if values.ndim > 1 else 1, -1)
        self._add(rows.min(axis=1), rows.max(axis=1), flat, sampled)

    def _add(self, lows: Array, highs: Array, flat: Array, sampled: int) -> None:
        """Add the extremes of rows, and what the histogram takes numbers of."""
        self.low = float(np.minimum(self.low, lows.min()))  # unlike Python's min, keeps a NaN
        self.high = float(np.maximum(self.high, highs.max()))
        self.rows += len(lows)
        self.sum_of_lows += float(lows.sum(dtype=np.float64))
        self.sum_of_highs += float(highs.sum(dtype=np.float64))
        stride = max(1, flat.size // max(sampled, 1)) | 1  # odd, so that rows of even width are not aliased
        offset = self.count % stride if flat.size > stride else 0
        self.count += flat.size
        picked = np.ascontiguousarray(flat[offset::stride]).view(np.uint32) >> np.uint32(16)
        self._pending.append(picked.astype(np.uint16))
        self._pending_values += picked.size
        if self._pending_values > PENDING_VALUES:
            self._flush()

    def merge(self, other: Statistics) -> None:
        """Add what another part of the data gave."""
        self.low, self.high = float(np.minimum(self.low, other.low)), float(np.maximum(self.high, other.high))
        self.count += other.count
        self.rows += other.rows
        self.sum_of_lows += other.sum_of_lows
        self.sum_of_highs += other.sum_of_highs
        other._flush()
        self._flush()
        if not self._bins.size:
            self._bins, self._counts = other._bins, other._counts
            return
        dense = np.zeros(BINS, np.int64)
        dense[self._bins] = self._counts
        dense[other._bins] += other._counts
        self._keep(dense)

    def between(self, low: float, high: float) -> Statistics:
        """The same with every value moved to the nearer end where it lies beyond one."""
        self._flush()
        if low <= self.low and high >= self.high:
            return self
        moved = copy.copy(self)
        moved.low, moved.high = (float(np.clip(end, low, high)) for end in (self.low, self.high))
        lows, highs = low * self.rows, high * self.rows  # of one row a mean that is moved is exact, of many nearly so
        moved.sum_of_lows, moved.sum_of_highs = (
            float(np.clip(total, lows, highs)) for total in (self.sum_of_lows, self.sum_of_highs)
        )
        return moved

    def _flush(self) -> None:
        if self._pending:
            dense = np.bincount(np.concatenate(self._pending), minlength=BINS)
            dense[self._bins] += self._counts
            self._keep(dense)
            self._pending, self._pending_values = [], 0

    def _keep(self, dense: Array) -> None:
        self._bins = np.flatnonzero(dense).astype(np.uint16)
        self._counts = dense[self._bins]

    def distribution(self) -> tuple[Array, Array]:
        """Sampled values in rising order and how often each was seen."""
        self._flush()
        if not self._bins.size:
            return np.zeros(1), np.ones(1)
        # The middle of a bin: its upper 16 bits, then a one bit; zero itself stays zero.
        bits = (self._bins.astype(np.uint32) << np.uint32(16)) | np.uint32(0x8000)
        bits[(self._bins & 0x7FFF) == 0] = 0
        values = bits.view(np.float32).astype(np.float64)
        values = np.clip(values, self.low, self.high)
        order = np.argsort(values, kind="stable")
        return values[order], self._counts[order].astype(np.float64)

    def drawing(self, bins: int = 64) -> tuple[list[float], list[float]]:
        """An even histogram over the whole range, as edges and counts, for a report."""
        values, counts = self.distribution()
        narrowest = 1e-6 * max(abs(self.low), 1e-6)  # of a constant: bins of a width that numbers of its size can have
        high = max(self.high, self.low + narrowest)
        heights, edges = np.histogram(values, bins=bins, range=(self.low, high), weights=counts)
        return [float(edge) for edge in edges], [float(height) for height in heights]


@dataclass(frozen=True)
class Range:
    """The values between which a tensor is quantized; outside it saturates."""

    low: float
    high: float


Observer = Callable[[Statistics, NumberFormat, bool], Range]


def minmax(statistics: Statistics, number_format: NumberFormat, symmetric: bool) -> Range:
    """Everything that was seen."""
    return Range(min(statistics.low, 0.0), max(statistics.high, 0.0))


def mean_extremes(statistics: Statistics, number_format: NumberFormat, symmetric: bool) -> Range:
    """The mean over samples of each one's extremes: a value that only a rare sample reaches is cut off."""
    rows = max(statistics.rows, 1)
    return Range(min(statistics.sum_of_lows / rows, 0.0), max(statistics.sum_of_highs / rows, 0.0))


def percentile(statistics: Statistics, number_format: NumberFormat, symmetric: bool, fraction: float = 0.9999) -> Range:
    """All but one value in 10,000 (half of them at either end, where there are two ends)."""
    values, counts = statistics.distribution()
    if symmetric:
        magnitudes, order = np.abs(values), np.argsort(np.abs(values), kind="stable")
        limit = _quantile(magnitudes[order], counts[order], fraction)
        return Range(max(-limit, statistics.low, -limit) if statistics.low < 0 else 0.0, limit)
    one_sided = statistics.low >= 0 or statistics.high <= 0
    tail = (1 - fraction) * (1 if one_sided else 0.5)
    low = min(0.0, _quantile(values, counts, tail)) if statistics.low < 0 else 0.0
    high = max(0.0, _quantile(values, counts, 1 - tail)) if statistics.high > 0 else 0.0
    return Range(low, high)


def _quantile(values: Array, counts: Array, fraction: float) -> float:
    cumulative = np.cumsum(counts)
    return float(values[min(int(np.searchsorted(cumulative, fraction * cumulative[-1])), len(values) - 1)])


def mse(statistics: Statistics, number_format: NumberFormat, symmetric: bool) -> Range:
    """The clip with the least expected squared error.

    Inside the range a value costs step²/12, or its own square where it is below half a step (so exact zeros, half of
    every ReLU output, cost nothing); outside it costs the square of what is cut off.
    """
    if number_format.is_float or not statistics.high > statistics.low:
        return minmax(statistics, number_format, symmetric)
    values, counts = statistics.distribution()
    levels = number_format.high - number_format.low
    sums = Moments(values, counts)
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)
    shrink = np.linspace(1.0, 0.1, CANDIDATES)
    if symmetric:
        limit = max(-low, high)
        step = shrink * limit / number_format.high
        errors = sums.error(-shrink * limit, shrink * limit, step)
        best = float(shrink[int(np.argmin(errors))] * limit)
        return Range(-best if low < 0 else 0.0, best)
    if low < 0 < high:
        best_low, best_high = low, high
        for _ in range(2):  # one end, then the other; twice settles
            candidates = best_high * shrink
            errors = sums.error(np.full_like(candidates, best_low), candidates, (candidates - best_low) / levels)
            best_high = float(candidates[int(np.argmin(errors))])
            candidates = low * shrink
            errors = sums.error(candidates, np.full_like(candidates, best_high), (best_high - candidates) / levels)
            best_low = float(candidates[int(np.argmin(errors))])
        return Range(best_low, best_high)
    lows, highs = low * shrink, high * shrink
    best_index = int(np.argmin(sums.error(lows, highs, (highs - lows) / levels)))
    return Range(float(lows[best_index]), float(highs[best_index]))


class Moments:
    """Prefix sums of 1, x and x² over sorted values: any clip's error is a few look-ups."""

    def __init__(self, values: Array, counts: Array) -> None:
        self.values = values
        zero = np.zeros(1)
        self.zeroth = np.concatenate([zero, np.cumsum(counts)])
        self.first = np.concatenate([zero, np.cumsum(counts * values)])
        self.second = np.concatenate([zero, np.cumsum(counts * values * values)])

    def error(self, lows: Array, highs: Array, steps: Array) -> Array:
        """Expected squared error, times the number of values, for each candidate."""
        below = np.searchsorted(self.values, lows, "left")
        above = np.searchsorted(self.values, highs, "right")
        half_low = np.clip(np.searchsorted(self.values, -steps / 2, "left"), below, above)
        half_high = np.clip(np.searchsorted(self.values, steps / 2, "right"), half_low, above)
        zeroth, first, second = self.zeroth, self.first, self.second
        cut_low = second[below] - 2 * lows * first[below] + lows**2 * zeroth[below]
        tail = [moment[-1] - moment[above] for moment in (zeroth, first, second)]
        cut_high = tail[2] - 2 * highs * tail[1] + highs**2 * tail[0]
        rounded = (zeroth[above] - zeroth[below]) - (zeroth[half_high] - zeroth[half_low])
        small = second[half_high] - second[half_low]
        result: Array = cut_low + cut_high + small + rounded * steps**2 / 12
        return result


def entropy(statistics: Statistics, number_format: NumberFormat, symmetric: bool) -> Range:
    """The clip whose quantized distribution is nearest in KL divergence (TensorRT's classic calibrator).

    Source: S. Migacz, 8-bit inference with TensorRT, GTC 2017: 2,048 bins of |x|, 128 levels.
    """
    values, counts = statistics.distribution()
    magnitudes = np.abs(values)
    limit = max(-statistics.low, statistics.high)
    if not limit > 0 or number_format.is_float:
        return minmax(statistics, number_format, symmetric)
    bins, levels = 2048, 128
    histogram, _ = np.histogram(magnitudes, bins=bins, range=(0, limit), weights=counts)
    histogram[0] = histogram[1]  # exact zeros say nothing about where to clip
    best, best_divergence = bins, np.inf
    for end in range(levels, bins + 1, 16):
        reference = histogram[:end].astype(np.float64)
        clipped = reference.copy()
        clipped[-1] += histogram[end:].sum()
        group = np.arange(end) * levels // end
        occupied = reference > 0
        totals = np.bincount(group, weights=reference, minlength=levels)
        members = np.maximum(np.bincount(group, weights=occupied, minlength=levels), 1)
        quantized = np.where(occupied, (totals / members)[group], 0.0)
        divergence = _divergence(clipped, quantized)
        if divergence < best_divergence:
            best, best_divergence = end, divergence
    clip = limit * best / bins
    return Range(max(min(statistics.low, 0.0), -clip), min(max(statistics.high, 0.0), clip))


def _divergence(reference: Array, quantized: Array) -> float:
    p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1e-12)
    occupied = p > 0
    return float(np.sum(p[occupied] * np.log(p[occupied] / np.maximum(q[occupied], 1e-12))))


def robust(statistics: Statistics, number_format: NumberFormat, symmetric: bool) -> Range:
    """:func:`mse`, but no further out than 1.5 times what a typical sample reaches (:func:`mean_extremes`).

    The squared error of a value that one rare sample reaches can outweigh everything else and coarsen the step for
    all samples, though clipping it hardly matters downstream. On MobileNetV2, whose linear bottlenecks have such
    values, this is worth 2 to 4 dB at the output; elsewhere it changes next to nothing.

    Nor, with 8 bits or more, further in than 0.8 times that. What every sample reaches is no rare value but, behind the
    LayerNorms of encoders of text, one channel of hundreds, too few to count in the error and missed by all that
    follows. On all-MiniLM-L6-v2 this is worth up to 9 dB for ``cpu`` and 2 dB for ``tensorrt``; where nothing was
    wrong it costs 1 dB at most, and on the convolutional networks and denoisers that it was tried on nothing.

    A sample of few values reaches nothing typical: of one alone, a score, extremes and mean are the same, and a range
    of 1.5 times the mean score would leave out most of them. There the least squared error decides by itself.
    """
    least = mse(statistics, number_format, symmetric)
    if statistics.count < FEW_VALUES * statistics.rows:
        return least
    typical = mean_extremes(statistics, number_format, symmetric)
    inner = TYPICAL_FLOOR if number_format.bits >= 8 else 0.0
    low = max(min(least.low, typical.low * inner), typical.low * TYPICAL_MARGIN)
    high = min(max(least.high, typical.high * inner), typical.high * TYPICAL_MARGIN)
    if not symmetric:
        return Range(low, high)
    reached = max(-typical.low, typical.high)
    limit = min(max(-least.low, least.high, reached * inner), reached * TYPICAL_MARGIN)
    return Range(-limit if least.low < 0 else 0.0, limit)


def power(statistics: Statistics, number_format: NumberFormat, symmetric: bool) -> Range:
    """The clip with the least sum of |rounded - value| ** 2.4: large errors count more than squared.

    Source: Y. Shang et al., CVPR 2023 (arXiv 2211.15736), which tries 100 thresholds, all fractions of the extremes.
    """
    if number_format.is_float or not statistics.high > statistics.low:
        return minmax(statistics, number_format, symmetric)
    values, counts = statistics.distribution()
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)
    best, least = 1.0, np.inf
    for shrink in np.arange(POWER_CANDIDATES, 0, -1) / POWER_CANDIDATES:
        scale, zero = scale_and_zero_point(shrink * low, shrink * high, number_format, symmetric=symmetric)
        rounded = fake_quantize(values, scale, zero, number_format)
        error = float(counts @ np.abs(rounded - values) ** 2.4)
        if error < least:
            best, least = float(shrink), error
    return Range(best * low, best * high)


HEADROOM = 2.0


def with_headroom(found: Range, statistics: Statistics, number_format: NumberFormat) -> Range:
    """The range, or twice as much to both sides where the values seen are known to fall short of real ones.

    Inputs that are made, or random, hardly show any class: a classifier's logits reach 1.3 to 2.3 times as far on real
    images, and up where made ones only reach down. Cut off, the likely classes are all equally likely. The means over
    a map that logits are computed from reach 1.1 to 1.4 times as far on real images, whose maps are alike all over
    where they show a class; what BatchNormalization remembers are single places. Eight bits have the room: twice the
    range of those means costs 0.1 dB on real images and brings up to 7 dB on made ones. Fewer bits have not.
    """
    if not statistics.is_short or number_format.bits < 8:
        return found
    limit = HEADROOM * max(-found.low, found.high)
    return Range(-limit if statistics.low < 0 else 0.0, limit)


WIDENING = 1.15


def widened(statistics: Statistics, number_format: NumberFormat, symmetric: bool) -> Range:
    """What :func:`robust` takes, wider by 15 %, but no wider than the extremes: for inputs of lighter tails than real.

    On inputs made from the models themselves it is within 2.1 dB of the best of ``robust`` and ``minmax`` for each of
    four networks, which miss it by 5 dB on one or the other (int8, SQNR on real images; ResNet-8, ResNet-20, a hybrid
    transformer, DS-CNN).
    """
    found, extremes = robust(statistics, number_format, symmetric), minmax(statistics, number_format, symmetric)
    return Range(max(WIDENING * found.low, extremes.low), min(WIDENING * found.high, extremes.high))


OBSERVERS: dict[str, Observer] = {
    "minmax": minmax,
    "mean_extremes": mean_extremes,
    "percentile": percentile,
    "mse": mse,
    "robust": robust,
    "widened": widened,
    "entropy": entropy,
    "power": power,
}

DEFAULT = "robust"


def get(name: str) -> Observer:
    """The range rule of that name."""
    if name not in OBSERVERS:
        raise OnnxqError(
            f"expected a range rule of {', '.join(OBSERVERS)}, found {name!r}",
            hint="use for example --set observer=minmax",
        )
    return OBSERVERS[name]
