"""Scales of FP4 blocks in two levels: one FP8 number for each block, and one float for the whole tensor.

A float32 for each 16 codes of 4 bits would be a third of the file. The form is NVIDIA's NVFP4, which Blackwell's
kernels read: the weight is dequantized by scales that are dequantized themselves.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 16  # what the kernels have
LARGEST = 448.0  # of the FP8 numbers
_SMALLEST = 2.0**-9


def two_levels(scale: Array, least: float = 0.0) -> tuple[Array, float]:
    """FP8 (E4M3) numbers and the power of two by which they are multiplied, nearest to positive scales.

    A power of two, so that what is rounded once stays as it is, and the products are exact.

    Args:
        scale: Scales of the blocks of one tensor, any shape.
        least: The factor is no smaller; a power of two.

    Returns:
        The numbers, shaped like ``scale``, and the factor.
    """
    largest = float(np.max(scale, initial=0.0))
    factor = max(2.0 ** math.ceil(math.log2(largest / LARGEST)), least) if largest > 0 else 1.0
    numbers = np.maximum(np.asarray(scale, np.float64) / factor, _SMALLEST)
    return numbers.astype(np.float32).astype(ml_dtypes.float8_e4m3fn), factor


def rounded(scale: Array) -> Array:
    """The scales as two levels hold them, in float32."""
    numbers, factor = two_levels(scale)
    result: Array = numbers.astype(np.float32) * np.float32(factor)
    return result
