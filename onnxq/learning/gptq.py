"""GPTQ: round one column of a weight after the other, and let the columns that follow take up its error.

A layer y = W·x whose rounded weights are W' is off by (W' − W)·x; its mean square over the data is the quadratic form
of H = E[x·xᵀ]. With the columns rounded in a fixed order, the best change of the columns still free is known in closed
form: with U the upper Cholesky factor of H⁻¹, they move by −(w_j − w'_j)/U_jj · U_j,: .

Source: E. Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023
(arXiv 2210.17323), algorithm 1; a convolution is the matrix product that im2col makes of it, as in E. Frantar and
D. Alistarh, Optimal Brain Compression, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from onnxq.learning.quantizers import nearest_codes

COLUMNS = 128  # updates of later columns are put off until so many are rounded (section 3.3, step 2)
CANDIDATES = 1 << 22  # numbers of a weight at several steps that are rounded at once
DAMPING_TRIES = 6  # each ten times the one before

Rescale = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Columns:
    """A weight as GPTQ works on it, and the grid of each of its numbers: all [groups, rows, columns].

    Attributes:
        weight: The float weight.
        scale: Of each number.
        zero_point: Of each number.
        low: The smallest code.
        high: The largest code.
        float_type: What codes are where they are floating-point numbers, ``None`` for integers.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    low: float
    high: float
    float_type: ir.DataType | None = None

    def nearest(self) -> Tensor:
        """Every number at the nearest of its grid."""
        return self.rounded(self.weight, self.scale, self.zero_point)

    def rounded(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Numbers of these formats at the nearest of other grids."""
        codes = (nearest_codes(weight / scale, self.float_type) + zero_point).clamp(self.low, self.high)
        return (codes - zero_point) * scale


def round_columns(
    columns: Columns,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    rescale: Rescale | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 for all groups and rows at once.

    Args:
        columns: The weight and its grid.
        hessian: [groups, columns, columns].
        damping: Part of the mean of its diagonal that is added to the diagonal.
        act_order: Whether the columns with the largest inputs come first; scales stay those given ("static groups").
        rescale: From the columns [rows, block_size] of one block, as they have become, to the scale and zero point
            [rows] of its rows; ``None`` keeps the scales. Not together with ``act_order``.
        block_size: How many columns share a scale, for ``rescale``.

    Returns:
        The rounded weight, the scales and the zero points, all [groups, rows, columns].
    """
    return _eliminated(columns, *_order_and_factor(hessian, damping, act_order), rescale, block_size)


def _order_and_factor(hessian: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """The order of the columns, [groups, columns], and U in that order."""
    groups, count = hessian.shape[:2]
    order = torch.arange(count, device=hessian.device).expand(groups, count)
    if act_order:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    sorted_rows = hessian.gather(1, order[:, :, None].expand(-1, -1, count))
    return order, _inverse_factor(sorted_rows.gather(2, order[:, None, :].expand(-1, count, -1)), damping)


def _eliminated(
    columns: Columns, order: Tensor, factor: Tensor, rescale: Rescale | None, block_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows, count = columns.weight.shape
    factor = factor.to(columns.weight.dtype)
    index = order[:, None, :].expand(groups, rows, count)
    weight, scale, zero_point = (
        tensor.expand(groups, rows, count).gather(2, index).clone()
        for tensor in (columns.weight, columns.scale, columns.zero_point)
    )
    rounded = torch.empty_like(weight)
    for start in range(0, count, COLUMNS):
        stop = min(start + COLUMNS, count)
        errors = torch.empty_like(weight[:, :, start:stop])
        for column in range(start, stop):
            if rescale is not None and block_size is not None and column % block_size == 0:
                part = slice(column, min(column + block_size, count))
                current = weight[:, :, part]
                if part.stop > stop:  # the block reaches beyond what is up to date
                    current = current.clone()
                    late = errors[:, :, : column - start] @ factor[:, start:column, stop : part.stop]
                    current[:, :, stop - column :] -= late
                new_scale, new_zero_point = rescale(current.flatten(0, 1))
                scale[:, :, part] = new_scale.reshape(groups, rows, 1)
                zero_point[:, :, part] = new_zero_point.reshape(groups, rows, 1)
            now = weight[:, :, column]
            then = columns.rounded(now, scale[:, :, column], zero_point[:, :, column])
            rounded[:, :, column] = then
            error = (now - then) / factor[:, column, column, None]
            weight[:, :, column:stop] -= error[:, :, None] * factor[:, None, column, column:stop]
            errors[:, :, column - start] = error
        weight[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    back = order.argsort(dim=1)[:, None, :].expand(groups, rows, count)
    return rounded.gather(2, back), scale.gather(2, back), zero_point.gather(2, back)


def with_best_steps(
    columns: Columns,
    hessian: Tensor,
    rounded: Tensor,
    factors: Sequence[float],
    *,
    damping: float = 0.01,
    act_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each row at the step, finer or coarser than its own, at which algorithm 1 loses least; rows are independent.

    Args:
        columns: The weight and its grid, of one step for each row and no zero points.
        hessian: [groups, columns, columns].
        rounded: What :func:`round_columns` makes of them.
        factors: Multiples of the step to try.
        damping: As there.
        act_order: As there.

    Returns:
        The rounded weight, and the factor of each row's step, [groups, rows].
    """
    least = weighted_error(columns.weight - rounded, hessian)
    chosen = torch.ones_like(least)
    shared = _order_and_factor(hessian, damping, act_order)
    rows = columns.weight.shape[1]
    at_once = max(1, CANDIDATES // columns.weight.numel())
    for start in range(0, len(factors), at_once):
        some = factors[start : start + at_once]
        stacked = _at_steps(columns, some)
        found = _eliminated(stacked, *shared, None, None)[0]
        errors = weighted_error(stacked.weight - found, hessian)
        candidates = zip(some, torch.split(errors, rows, 1), torch.split(found, rows, 1), strict=True)
        for factor, error, candidate in candidates:
            better = error < least
            least, chosen = torch.where(better, error, least), torch.where(better, factor, chosen)
            rounded = torch.where(better[:, :, None], candidate, rounded)
    return rounded, chosen.to(rounded.dtype)


def _at_steps(columns: Columns, factors: Sequence[float]) -> Columns:
    """The same rows once for each multiple of their steps, one below the other: rows are independent."""
    scale, count = columns.scale.expand_as(columns.weight), len(factors)
    return replace(
        columns,
        weight=columns.weight.repeat(1, count, 1),
        scale=torch.cat([scale * factor for factor in factors], 1),
        zero_point=columns.zero_point.expand_as(columns.weight).repeat(1, count, 1),
    )


def towards_float(weight: Tensor, hessian: Tensor, drift: Tensor, part: float, ridge: float = 1.0) -> Tensor:
    """The weight that makes up for part of what the layers before have lost, before it is rounded itself.

    The float network's layer gives W·(x + d), d being how far its input is from the quantized network's x. The weight
    that comes closest to it from x alone is W + W·E[d·xᵀ]·E[x·xᵀ]⁻¹. On few samples it learns them by heart, so the
    inverse is damped and the way is gone in part only.

    Source: asymmetric calibration, Y. Li et al., GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
    Calibration, ICML 2025 (arXiv 2504.02692), as least squares before the rounding instead of within it.

    Args:
        weight: [groups, rows, columns].
        hessian: E[x·xᵀ], [groups, columns, columns].
        drift: E[d·xᵀ], of the same shape.
        part: How far to go, from 0 to 1.
        ridge: Multiple of the mean of the Hessian's diagonal that is added to the diagonal.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    damped = hessian + torch.diag_embed((ridge * torch.where(mean > 0, mean, 1.0)).expand_as(diagonal))
    lost = weight.to(hessian.dtype) @ drift
    moved: Tensor = weight + part * torch.linalg.solve(damped, lost, left=False).to(weight.dtype)
    return moved


def weighted_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """The mean square of the layer's error, d·H·dᵀ, [groups, rows]; ``difference`` is [groups, rows, columns]."""
    difference = difference.to(hessian.dtype)
    error: Tensor = ((difference @ hessian) * difference).sum(dim=2)
    return error


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, [groups, columns, columns].

    An input that is always zero has no say: its diagonal becomes the mean, so that it is rounded to the nearest and
    nothing moves with it. A Hessian that is still singular is damped more.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    added = torch.where(diagonal <= 0, mean, 0.0) + damping * mean
    extra = 1e-6 * mean
    for attempt in range(DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex(hessian + torch.diag_embed(added))
        if not failed.any():
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex((inverse + inverse.mT) / 2, upper=True)
            if not failed.any():
                return upper
        added = added + torch.where(failed[:, None] != 0, extra, 0.0) * 10**attempt
    return torch.diag_embed(torch.ones_like(diagonal))  # nothing is known of such inputs: nearest rounding
