"""Scales of blocks below zero, where the lowest code then stands for a positive extreme.

Signed codes reach one further below zero than above. A clip that uses that for blocks whose largest weight is negative
(see :mod:`onnxq.calibration.weight_ranges`) cuts positive ones more than negative ones: errors of a column no longer
cancel, which layers behind a Relu, whose inputs have one sign, sum up. With a scale of either sign both kinds of blocks
get all codes, and errors cancel again. onnxruntime's kernels read such scales, TensorRT refuses them.

Source: the grid is that of llama.cpp's Q4_0 and onnxruntime's quantizer of blocks; here each block takes it only where
its squared error is lower.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.calibration.weight_ranges import TILE_VALUES, squared_errors, stored_scale
from onnxq.formats import NumberFormat
from onnxq.scheme import Spec

Array = np.ndarray[Any, Any]

CLIPS = (1.0, 0.94, 0.875, 0.8)  # of the extreme, which is the lowest code at 1


def scale_rows(rows: Array, low: Array, high: Array, spec: Spec) -> tuple[Array, Array]:
    """Scale and zero point of each row for a range that was chosen, of either sign where the spec allows it.

    Args:
        rows: Weights [rows, elements that share a scale].
        low: Lower end of each row's range [rows].
        high: Upper end [rows].
        spec: What the codes are.

    Returns:
        Scales in float32 as they are stored, and zero points [rows].
    """
    scale, zero_point = stored_scale(low, high, spec.format, spec.symmetric)
    return signed(rows, scale, spec.format) if spec.signed_scales else scale, zero_point


def signed(rows: Array, scale: Array, number_format: NumberFormat) -> Array:
    """The scale of each row, of either sign, that leaves the least squared error.

    Args:
        rows: Weights [rows, elements that share a scale].
        scale: What to start from [rows].
        number_format: Signed integers, zero in their middle.

    Returns:
        Scales [rows] in float32, none of them 0.
    """
    best = np.array(scale, np.float32)
    step = max(1, TILE_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = np.ascontiguousarray(rows[part], np.float32)
        zeros = np.zeros(len(values))
        least = squared_errors(values, best[part], zeros, number_format)
        extreme = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)[:, 0]
        for clip in CLIPS:
            tried = (extreme / number_format.low * clip).astype(np.float32)
            tried = np.where(np.abs(tried) < np.finfo(np.float32).tiny, best[part], tried)
            error = squared_errors(values, tried, zeros, number_format)
            better = error < least
            best[part], least = np.where(better, tried, best[part]), np.where(better, error, least)
    return best
