"""A weight as codes plus a product of two thin matrices, which takes back most of what rounding costs.

W ≈ Q + B·A: what is rounded is W − B·A, so that every recipe can round it in its own way. The product is the best of
its rank for the layer's outputs, not for the weights: with C = E[x·xᵀ], the truncated SVD of (W − Q)·C^½, multiplied
back by C^−½. As rounding W − B·A leaves another error, the two are found in turns.

Source: C. Zhang et al., LQER, ICML 2024 (arXiv 2402.02446) for the error's SVD, scaled by activations; C. Zhang et al.,
QERA, ICLR 2025 (arXiv 2410.06040), theorem 1, for the scaling with the root of C; Y. Li et al., LoftQ, ICLR 2024 (arXiv
2310.08659), algorithm 1, for the turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.learning.channel_scales import round_matrix
from onnxq.scheme import Spec

Array = np.ndarray[Any, Any]

TURNS = 5
DAMPING = 0.01  # of the mean of C's diagonal, so that channels that were never seen count too
LARGEST_COVARIANCE = 2048  # channels; above, C's diagonal has to do, as in LQER
OVERSAMPLING = 8
POWERS = 4


@dataclass(frozen=True)
class Factors:
    """The thin product B·A beside a weight [outputs, inputs].

    Attributes:
        inward: A, [rank, inputs].
        outward: B, [outputs, rank].
        error: The error of the layer's outputs that is left, as a part of the one without them.
    """

    inward: Array
    outward: Array
    error: float

    @property
    def product(self) -> Array:
        """B·A."""
        return np.asarray(self.outward @ self.inward)


class Salience:
    """How much errors of a layer's inputs count: C^½ and its inverse.

    Args:
        rows: Inputs of the layer, [positions, channels].
    """

    def __init__(self, rows: Array) -> None:
        rows = rows.astype(np.float64)
        power = np.square(rows).mean(axis=0)
        damping = DAMPING * max(float(power.mean()), 1e-30)
        self._root: Array
        if rows.shape[1] > LARGEST_COVARIANCE:
            self._root = np.sqrt(power + damping)
            self._inverse: Array = 1 / self._root
            return
        values, vectors = np.linalg.eigh(rows.T @ rows / len(rows) + damping * np.eye(rows.shape[1]))
        root = np.sqrt(np.maximum(values, damping))
        self._root, self._inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T

    def weigh(self, matrix: Array) -> Array:
        """A matrix [outputs, inputs] times C^½."""
        return np.asarray(matrix * self._root if self._root.ndim == 1 else matrix @ self._root)

    def unweigh(self, matrix: Array) -> Array:
        """A matrix [rank, inputs] times C^−½."""
        return np.asarray(matrix * self._inverse if self._inverse.ndim == 1 else matrix @ self._inverse)


def factors_of(matrix: Array, spec: Spec, rank: int, salience: Salience | None, seed: int = 0) -> Factors:
    """The thin product that helps a rounded weight most.

    Args:
        matrix: The weight, [outputs, inputs].
        spec: How what is left of it is rounded.
        rank: Columns of the product.
        salience: Of the layer's inputs; ``None``: all inputs count alike.
        seed: Of the random vectors with which large matrices are decomposed.
    """
    weigh: Callable[[Array], Array] = (lambda array: array) if salience is None else salience.weigh
    unweigh: Callable[[Array], Array] = (lambda array: array) if salience is None else salience.unweigh
    matrix = matrix.astype(np.float64)
    outputs, inputs = matrix.shape
    inward, outward = np.zeros((rank, inputs)), np.zeros((outputs, rank))
    best = Factors(inward, outward, 1.0)
    bare = 0.0
    for turn in range(TURNS + 1):
        product = outward @ inward
        error = weigh(matrix - product - round_matrix(matrix - product, spec))
        squared = float(np.square(error).sum())
        if turn == 0:
            bare = squared
        if bare == 0:
            return best  # the weight lies on its grid
        if squared / bare < best.error:
            best = Factors(inward, outward, squared / bare)
        left, values, right = truncated_svd(error + weigh(product), rank, seed)
        outward, inward = left * np.sqrt(values), unweigh(np.sqrt(values)[:, None] * right)
    return best


def truncated_svd(matrix: Array, rank: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """The leading singular vectors and values: [rows, rank], [rank], [rank, columns].

    Source: N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, SIAM Review 2011, algorithms
    4.4 and 5.1, for matrices much larger than the rank.
    """
    if min(matrix.shape) <= 8 * (rank + OVERSAMPLING):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(matrix @ generator.standard_normal((matrix.shape[1], rank + OVERSAMPLING)))[0]
    for _ in range(POWERS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]
