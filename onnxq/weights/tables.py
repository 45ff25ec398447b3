"""Weights on a grid of any spacing: a code is an index into a table of levels, times the scale of its row.

The grids here have one parameter: level k is sign(k)·q·(|k|/q)^curve, for k = −q − 1 … q and q = 2^(b−1) − 1. At
curve 1 they are the integers; above it, levels crowd near zero, where most weights are. The lowest level has no
counterpart above; only scales that clip reach it. It is one family from two papers:

- E. Yvinec, A. Dapogny, M. Cord, K. Bailly, PowerQuant: Automorphism Search for Non-Uniform Quantization, ICLR 2023
  (arXiv 2301.09858): curve = 1/a for the exponent a, rounded in the power domain, scales from the extremes;
- V. Chikin, M. Antiukh, Data-Free Network Compression via Parametric Non-Uniform Mixed Precision Quantization, CVPR
  2022: curve = p, rounded to the nearest level, scales searched too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

Measure = Callable[[Array, slice], Array]  # from errors of some rows, and which they are, to one number for each

TILE_VALUES = 1 << 18


@dataclass(frozen=True)
class Table:
    """Levels in units of a row's scale, and where one code ends and the next begins.

    Attributes:
        levels: [codes], ascending, float32; the last is the highest uniform code.
        thresholds: [codes − 1], in the same units.
    """

    levels: Array
    thresholds: Array

    def codes(self, rows: Array, scale: Array) -> Array:
        """The code of each weight; beyond the last level it saturates.

        Args:
            rows: Weights [rows, elements].
            scale: Of each row.
        """
        found: Array = np.searchsorted(self.thresholds, rows / scale[:, None]).astype(np.uint8)
        return found

    def values(self, codes: Array, scale: Array) -> Array:
        """What the codes mean, in float32."""
        decoded: Array = self.levels[codes] * scale[:, None]
        return decoded

    def rounded(self, rows: Array, scale: Array) -> Array:
        """Weights as their codes will mean them, a tile at a time."""
        result = np.empty(rows.shape, np.float32)
        step = max(1, TILE_VALUES // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            result[part] = self.values(self.codes(rows[part], scale[part]), scale[part])
        return result


def power_table(bits: int, curve: float, *, nearest: bool = True) -> Table:
    """The table of the power grid.

    Args:
        bits: Width of a code.
        curve: How much levels crowd near zero; 1 is uniform.
        nearest: Round to the nearest level; otherwise round |w|^(1/curve), whose midpoints lie nearer to zero.
    """
    highest = 2 ** (bits - 1) - 1
    index = np.arange(-highest - 1, highest + 1)

    def spread(position: Array) -> Array:
        return np.asarray(np.sign(position) * highest * (np.abs(position) / highest) ** curve)

    levels = spread(index.astype(np.float64))
    thresholds = (levels[1:] + levels[:-1]) / 2 if nearest else spread(index[:-1] + 0.5)
    return Table(levels.astype(np.float32), thresholds.astype(np.float32))


def widest_scale(rows: Array, bits: int) -> Array:
    """The scale of each row whose last level is the row's largest magnitude; 1 for rows of zeros."""
    largest = np.abs(rows).max(axis=1)
    return np.asarray(np.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1)).astype(np.float32)


@dataclass(frozen=True)
class Fit:
    """A table for a weight, the scales of its rows, and the error that it leaves.

    Attributes:
        table: The levels.
        scale: Of each row.
        curve: The table's parameter.
        error: Σ |rounded − weight|^norm, or of what was measured instead.
    """

    table: Table
    scale: Array
    curve: float
    error: float


def fit(
    rows: Array,
    bits: int,
    curves: Sequence[float],
    clips: Sequence[float],
    norm: float,
    measure: Measure | None = None,
) -> Fit:
    """The curve of a weight, and the clip of each row, that leave the least error.

    Args:
        rows: Weights [rows that share a scale, elements].
        bits: Width of a code.
        curves: The curves to try; one is chosen for the weight.
        clips: The clips to try for each row, as parts of its largest magnitude.
        norm: The power of the error: 4 weighs large errors, 2 is the squared error.
        measure: What to take instead of that power, for example the error of a layer's outputs.
    """
    widest = widest_scale(rows, bits)
    best: Fit | None = None
    for curve in curves:
        table = power_table(bits, curve)
        scale, least = widest, np.full(len(rows), np.inf)
        for clip in clips:
            tried = np.asarray(widest * np.float32(clip))
            error = row_errors(rows, table, tried, norm, measure)
            better = error < least
            scale, least = np.where(better, tried, scale), np.where(better, error, least)
        if best is None or least.sum() < best.error:
            best = Fit(table, scale.astype(np.float32), curve, float(least.sum()))
    assert best is not None
    return best


def row_errors(rows: Array, table: Table, scale: Array, norm: float, measure: Measure | None = None) -> Array:
    """Σ |rounded − weight|^norm of each row, or what is measured instead."""
    total = np.zeros(len(rows))
    step = max(1, TILE_VALUES // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = table.values(table.codes(rows[part], scale[part]), scale[part]) - rows[part]
        if measure is None:
            total[part] = np.power(np.abs(difference), np.float32(norm)).sum(axis=1, dtype=np.float64)
        else:
            total[part] = measure(difference, part)
    return total


def least_exponent(weights: Iterable[Array], bits: int, *, nearest: bool = False) -> float:
    """PowerQuant's exponent a: the least Σ ‖W − W'‖₂ over weights, scales from their extremes.

    A coarse grid, then golden section around its best: the curve has one basin, but a fine saw-tooth at 8 bits.

    Args:
        weights: Each [rows that share a scale, elements].
        bits: Width of a code.
        nearest: Whether rounding is to the nearest level.
    """
    rows = list(weights)
    scales = [widest_scale(item, bits) for item in rows]

    def error(exponent: float) -> float:
        table = power_table(bits, 1 / exponent, nearest=nearest)
        return sum(
            float(np.sqrt(row_errors(item, table, scale, 2).sum())) for item, scale in zip(rows, scales, strict=True)
        )

    grid = np.linspace(0.3, 1.1, 17)
    errors = [error(float(value)) for value in grid]
    middle = int(np.argmin(errors))
    low, high = float(grid[max(0, middle - 1)]), float(grid[min(len(grid) - 1, middle + 1)])
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    left_error, right_error = error(left), error(right)
    while high - low > 0.005:
        if left_error <= right_error:
            high, right, right_error = right, left, left_error
            left = high - ratio * (high - low)
            left_error = error(left)
        else:
            low, left, left_error = left, right, right_error
            right = low + ratio * (high - low)
            right_error = error(right)
    found = (low + high) / 2
    return found if error(found) < min(errors) else float(grid[middle])
