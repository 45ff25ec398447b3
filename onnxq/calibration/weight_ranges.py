"""Where to clip weights: a search over clips, each row for itself, for the least error that rounding leaves.

At 8 bits the extremes are as good; the fewer the codes, the more it pays to give up a few large weights for a finer
step. The codes' lowest, -2^(b-1), is used too: a symmetric clip at (2^(b-1) - 1) / 2^(b-1) of a row whose largest
weight is negative costs nothing, which with 2 and 3 bits is most of the gain. FP4 has gaps at the top (3, 4, 6): a
block whose largest weight becomes 4, by a clip beyond it, has finer codes for the rest.

Source: the error with power 2.4 and the grid are those of X. Wei et al., QDrop, ICLR 2022 (their ``MSEObserver``).
Departures: a coarse grid and a fine one around its best instead of one fine grid (a third of the time), down to 0.2
of the extremes instead of 0; asymmetric ranges move one end after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from onnxq import block_scales
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.errors import OnnxqError
from onnxq.formats import NumberFormat

Array = np.ndarray[Any, Any]
Search = Callable[[Array, NumberFormat, bool], tuple[Array, Array]]

TILE_VALUES = 1 << 18  # worked on at once: a few MiB of scratch, however large the weight
SMALLEST_CLIP = 0.2
COARSE_STEPS = 25
FLOAT_STEPS = 16  # above the extremes, where an extreme takes a lower code of FP4
FEW_CLIPS = (1.0, 0.94, 0.875, 0.8, 0.7)  # at 0.875 a negative extreme takes the lowest of 16 codes
FEW_CLIPS_FLOAT = (1.0, 1.5, 1.25, 0.94, 0.875)  # at 1.5 an extreme takes FP4's 4
FINE_STEPS = 4  # on either side of the best coarse one


def extremes(rows: Array, number_format: NumberFormat, symmetric: bool) -> tuple[Array, Array]:
    """Everything there is, per row."""
    return rows.min(axis=1), rows.max(axis=1)


def least_error(rows: Array, number_format: NumberFormat, symmetric: bool, power: float = 2.4) -> tuple[Array, Array]:
    """The clip of each row that leaves the least sum of |rounded - weight| ** power.

    Args:
        rows: Weights [rows, elements that share a scale].
        number_format: What the codes are.
        symmetric: Whether the zero point is the middle of the format.
        power: 2 is the squared error; above it, large errors count more.

    Returns:
        Both ends of the range [rows], ready for ``scale_and_zero_point``. Where the format is symmetric they
        are the same on either side, so that the scale is one end over the highest code.
    """
    low, high = (np.asarray(end, np.float64) for end in extremes(rows, number_format, symmetric))
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if number_format.is_passthrough or not rows.size:
        return low, high
    if symmetric or number_format.is_float:
        high = np.maximum(-low, high)
        low = -high
    step = max(1, TILE_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        search = _Search(rows[part], low[part], high[part], number_format, symmetric, power)
        low[part], high[part] = search.run()
    return low, high


def best_of_few(rows: Array, number_format: NumberFormat, symmetric: bool) -> tuple[Array, Array]:
    """The best of five clips of each row, by its squared error.

    Most of the gain of :func:`least_error` in a tenth of its time, which counts where a model has gigabytes of weights.

    Args:
        rows: Weights [rows, elements that share a scale].
        number_format: What the codes are.
        symmetric: Whether the zero point is the middle of the format.

    Returns:
        Both ends of the range [rows], ready for ``scale_and_zero_point``.
    """
    low, high = (np.asarray(end, np.float64) for end in extremes(rows, number_format, symmetric))
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    searched = number_format.has_block_scales or not number_format.is_float
    if number_format.is_passthrough or not searched or not rows.size:
        return low, high
    step = max(1, TILE_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = np.ascontiguousarray(rows[part], np.float32)
        best, least = np.ones(len(values)), np.full(len(values), np.inf)
        for factor in FEW_CLIPS_FLOAT if number_format.is_float else FEW_CLIPS:
            scale, zero_point = stored_scale(low[part] * factor, high[part] * factor, number_format, symmetric)
            error = squared_errors(values, scale, zero_point, number_format)
            better = error < least
            best, least = np.where(better, factor, best), np.where(better, error, least)
        low[part] *= best
        high[part] *= best
    return low, high


def stored_scale(low: Array, high: Array, number_format: NumberFormat, symmetric: bool) -> tuple[Array, Array]:
    """Scale and zero point as they are stored: the scales of blocks are rounded, which a clip may make up for."""
    scale, zero_point = scale_and_zero_point(low, high, number_format, symmetric=symmetric)
    return block_scales.rounded(scale) if number_format.has_block_scales else scale, zero_point


def squared_errors(values: Array, scale: Array, zero_point: Array, number_format: NumberFormat) -> Array:
    """What rounding costs each row; integers without :func:`fake_quantize`, in a third of its time."""
    if number_format.is_float:
        difference = values - fake_quantize(values, scale, zero_point, number_format, axis=0)
        exact: Array = np.einsum("ij,ij->i", difference, difference, dtype=np.float64)
        return exact
    offset = zero_point.astype(np.float32)[:, None]
    steps = values / scale[:, None]
    codes = np.rint(steps)
    np.clip(codes, number_format.low - offset, number_format.high - offset, out=codes)
    codes -= steps
    result: Array = np.einsum("ij,ij->i", codes, codes) * np.square(scale, dtype=np.float64)
    return result


class _Search:
    """The best clip so far of a few rows, as factors of their extremes."""

    def __init__(
        self, rows: Array, low: Array, high: Array, number_format: NumberFormat, symmetric: bool, power: float
    ) -> None:
        self.rows, self.low, self.high = rows, low, high
        self.number_format, self.symmetric, self.power = number_format, symmetric, power
        self.low_factor, self.high_factor = np.ones(len(rows)), np.ones(len(rows))
        self.error = self._error(self.low_factor, self.high_factor)

    def run(self) -> tuple[Array, Array]:
        """Both ends together, then, if they may differ, one after the other."""
        step = (1 - SMALLEST_CLIP) / (COARSE_STEPS - 1)
        coarse = 1 - step * np.arange(1, COARSE_STEPS)
        if self.number_format.has_block_scales:
            coarse = np.append(coarse, 1 + step * np.arange(1, FLOAT_STEPS))  # up to half as much again
        fine = step * np.delete(np.arange(-FINE_STEPS, FINE_STEPS + 1), FINE_STEPS) / (FINE_STEPS + 1)
        self._try((factor, factor) for factor in coarse)
        self._try(_around(self.low_factor, self.high_factor, fine, low=True, high=True))
        if not self.symmetric and not self.number_format.is_float:
            reach = step * np.arange(-5, 6)
            self._try(_around(self.low_factor, self.high_factor, reach, low=True, high=False))
            self._try(_around(self.low_factor, self.high_factor, reach, low=False, high=True))
        return self.low * self.low_factor, self.high * self.high_factor

    def _try(self, candidates: Iterable[tuple[Array | float, Array | float]]) -> None:
        """Keep each candidate for the rows where it is better."""
        for low_factor, high_factor in candidates:
            error = self._error(low_factor, high_factor)
            better = error < self.error
            self.low_factor = np.where(better, low_factor, self.low_factor)
            self.high_factor = np.where(better, high_factor, self.high_factor)
            self.error = np.where(better, error, self.error)

    def _error(self, low_factor: Array | float, high_factor: Array | float) -> Array:
        scale, zero_point = stored_scale(
            self.low * low_factor, self.high * high_factor, self.number_format, self.symmetric
        )
        total = np.zeros(len(self.rows))
        for start in range(0, self.rows.shape[1], TILE_VALUES):
            values = self.rows[:, start : start + TILE_VALUES].astype(np.float32)
            values -= fake_quantize(values, scale, zero_point, self.number_format, axis=0)
            np.abs(values, out=values)
            total += np.power(values, np.float32(self.power), out=values).sum(axis=1, dtype=np.float64)
        return total


def _around(
    low_factor: Array, high_factor: Array, offsets: Array, *, low: bool, high: bool
) -> Iterator[tuple[Array, Array]]:
    """Factors near those given, never past the extremes."""
    for offset in offsets:
        moved_low = np.clip(low_factor + offset, 0.0, 1.0) if low else low_factor
        moved_high = np.clip(high_factor + offset, 0.0, 1.0) if high else high_factor
        yield moved_low, moved_high


SEARCHES = {"minmax": extremes, "few": best_of_few, "mse": least_error}


class Once:
    """A search that looks at each weight once in each format, for those who try many graphs of one network."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._found: dict[tuple[Any, ...], tuple[Array, Array]] = {}

    def __call__(self, rows: Array, number_format: NumberFormat, symmetric: bool) -> tuple[Array, Array]:
        """Both ends of the range of each row [rows]."""
        key = (hashlib.sha256(rows.tobytes()).digest(), rows.shape, rows.dtype, number_format, symmetric)
        if key not in self._found:
            self._found[key] = self._search(rows, number_format, symmetric)
        return self._found[key]


def once(search: Search) -> Search:
    """The same search, which looks at each weight once in each format; one that does so already stays what it is."""
    return search if isinstance(search, Once) else Once(search)


def get(name: str) -> Any:
    """The rule of that name.

    Raises:
        OnnxqError: there is none.
    """
    if name not in SEARCHES:
        raise OnnxqError(
            f"expected weight ranges of {', '.join(SEARCHES)}, found {name!r}",
            hint="use for example --set weight_ranges=mse",
        )
    return SEARCHES[name]
