"""Where to clip a weight so that what its layer makes of real inputs is closest to before.

Source: J. Lin et al., AWQ, MLSys 2024 (arXiv 2306.00978); the paper mentions it, the authors' code has it: each scale
for itself, in steps of 1/20 of the largest magnitude down to half of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.arithmetic import fake_quantize
from onnxq.calibration.signed_scales import scale_rows
from onnxq.learning.channel_scales import as_rows, from_rows
from onnxq.scheme import Spec

Array = np.ndarray[Any, Any]

STEPS = 20
LARGEST_SHRINK = 0.5


def clipped_for_outputs(matrix: Array, inputs: Array, spec: Spec) -> Array:
    """The weight with the numbers of each scale clipped where that leaves the least error at the layer's output.

    Args:
        matrix: The weight, [output channels, input channels].
        inputs: Some of the layer's inputs, [positions, input channels].
        spec: How the weight is quantized.
    """
    if spec.granularity == "tensor" or not len(inputs):
        return matrix
    rows = as_rows(matrix, spec).astype(np.float32)
    products = _products(inputs, rows.shape[1])
    largest = np.abs(rows).max(axis=1)
    best, least = largest.copy(), np.full(len(rows), np.inf)
    for step in range(int(LARGEST_SHRINK * STEPS)):
        limit = largest * np.float32(1 - step / STEPS)
        clipped = np.clip(rows, -limit[:, None], limit[:, None])
        scale, zero_point = scale_rows(clipped, clipped.min(axis=1), clipped.max(axis=1), spec)
        difference = fake_quantize(clipped, scale, zero_point, spec.format, axis=0) - rows
        error = _output_error(difference, products)
        better = error < least
        best, least = np.where(better, limit, best), np.where(better, error, least)
    return from_rows(np.clip(rows, -best[:, None], best[:, None]), matrix.shape)


def _products(inputs: Array, size: int) -> Array:
    """E[x·xᵀ] of the inputs of each block, [blocks, size, size]."""
    padded = np.pad(inputs, ((0, 0), (0, -inputs.shape[1] % size))).astype(np.float32)
    blocks = padded.reshape(len(padded), -1, size).transpose(1, 0, 2)
    products: Array = blocks.transpose(0, 2, 1) @ blocks / np.float32(len(padded))
    return products


def _output_error(difference: Array, products: Array) -> Array:
    """d·H·dᵀ of every row, where rows are numbered block by block within an output channel."""
    count, size = len(products), difference.shape[1]
    blocks = difference.reshape(-1, count, size).transpose(1, 0, 2)
    error = ((blocks @ products) * blocks).sum(axis=2)  # [blocks, output channels]
    return np.asarray(error.T.reshape(-1))
