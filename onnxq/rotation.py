"""Orthogonal matrices that spread outliers over all channels, and constants turned by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer

Array = np.ndarray[Any, Any]


def rotation(size: int, seed: int, *, keeps_mean: bool = False) -> Array:
    """A random orthogonal matrix [size, size].

    Args:
        size: How many channels it turns. A power of two gets a Hadamard matrix with random signs, whose entries are all
            of one magnitude; any other size the orthogonal factor of a Gaussian matrix.
        seed: The same seed gives the same matrix.
        keeps_mean: Whether the mean over the channels has to stay, so that a norm that subtracts it may lie behind. The
            matrix then maps the vector of ones to itself.

    Source: S. Ashkboos et al., QuaRot, NeurIPS 2024 (arXiv 2404.00456), section 3.
    """
    generator = np.random.default_rng((seed, size))
    if keeps_mean:
        # An orthonormal basis whose first vector is that of ones; the others are turned among themselves.
        basis = np.linalg.qr(np.concatenate([np.ones((size, 1)), generator.standard_normal((size, size - 1))], 1))[0]
        turned = np.eye(size)
        turned[1:, 1:] = _gaussian(generator, size - 1)
        return np.asarray(basis @ turned @ basis.T)
    if size & (size - 1):
        return _gaussian(generator, size)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = generator.choice([-1.0, 1.0], size)
    return np.asarray(signs[:, None] * matrix / np.sqrt(size))


def _gaussian(generator: np.random.Generator, size: int) -> Array:
    orthogonal, upper = np.linalg.qr(generator.standard_normal((size, size)))
    return np.asarray(orthogonal * np.sign(np.diag(upper)))


def rotate_constant(graph: ir.Graph, node: ir.Node, index: int, axis: int, matrix: Array) -> None:
    """Multiply a constant by a matrix along an axis, in runs of the matrix' size; others that read it keep theirs.

    Args:
        graph: The graph.
        node: The node that reads the constant.
        index: At which input.
        axis: The constant's axis; its size is a multiple of the matrix'.
        matrix: What each run of numbers, as a row, is multiplied by from the right.
    """
    array = array_of(node.inputs[index]).astype(np.float64)
    moved = np.moveaxis(array, axis, -1)
    turned = (moved.reshape(*moved.shape[:-1], -1, len(matrix)) @ matrix).reshape(moved.shape)
    replace_constant(graph, node, index, np.moveaxis(turned, -1, axis))


def replace_constant(graph: ir.Graph, node: ir.Node, index: int, array: Array) -> None:
    """Let a node read other numbers; a constant that others read too is copied first."""
    value = node.inputs[index]
    assert value is not None and value.dtype is not None and graphs.is_constant(value)
    array = np.ascontiguousarray(array, value.dtype.numpy())
    if len(value.uses()) == 1 and not value.is_graph_output() and array.shape == array_of(value).shape:
        value.const_value = ir.Tensor(array, dtype=value.dtype, name=value.name)
    else:
        node.replace_input_with(index, new_initializer(graph, f"{value.name}_rotated", array, value.dtype))
