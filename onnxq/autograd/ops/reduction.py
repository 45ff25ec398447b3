"""Ops that reduce, sort or accumulate along axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxq.autograd.ops.operands import ints

DIRECT: dict[str, Callable[..., Any]] = {"Det": torch.det}


def _reduction(
    reduce: Callable[..., Tensor], elementwise: Callable[[Tensor], Tensor] | None = None
) -> Callable[..., Tensor]:
    """An ONNX reduction: ``reduce`` takes a tensor, axes and keepdim; ``elementwise`` is what it does to each alone."""

    def run(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        along = [] if axes is None else ints(axes)
        if not along:
            if noop_with_empty_axes:
                return x if elementwise is None else elementwise(x)
            along = list(range(x.ndim))
        result: Tensor = reduce(x, along, bool(keepdims))
        return result if result.dtype == x.dtype else result.to(x.dtype)

    return run


def _mean(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return x.mean(axes, keepdim) if x.is_floating_point() else x.to(torch.float64).mean(axes, keepdim)


def _sum(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return x.sum(axes, keepdim)


def _largest(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    if any(x.shape[axis] == 0 for axis in axes):
        return _of_nothing(x, axes, keepdim, largest=True)
    return x.amax(axes, keepdim)


def _smallest(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    if any(x.shape[axis] == 0 for axis in axes):
        return _of_nothing(x, axes, keepdim, largest=False)
    return x.amin(axes, keepdim)


def _of_nothing(x: Tensor, axes: list[int], keepdim: bool, *, largest: bool) -> Tensor:
    """The largest (smallest) of no values is the smallest (largest) there is."""
    if x.is_floating_point():
        end: float = -float("inf") if largest else float("inf")
    elif x.dtype == torch.bool:
        end = not largest
    else:
        end = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
    return torch.full_like(x.sum(axes, keepdim, dtype=x.dtype), end)


def _product(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim, dtype=x.dtype)
    return x


def _log_sum_exp(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return (x if x.is_floating_point() else x.to(torch.float64)).logsumexp(axes, keepdim)


DIRECT |= {
    "ReduceMean": _reduction(_mean),
    "ReduceSum": _reduction(_sum),
    "ReduceMax": _reduction(_largest),
    "ReduceMin": _reduction(_smallest),
    "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(lambda x, axes, keepdim: x.abs().sum(axes, keepdim), torch.abs),
    "ReduceL2": _reduction(lambda x, axes, keepdim: x.square().sum(axes, keepdim).sqrt(), torch.abs),
    "ReduceSumSquare": _reduction(lambda x, axes, keepdim: x.square().sum(axes, keepdim), torch.square),
    "ReduceLogSum": _reduction(lambda x, axes, keepdim: x.sum(axes, keepdim).log(), torch.log),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
}


def ArgMax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the largest value is."""
    if select_last_index:
        return x.shape[axis] - 1 - x.flip(axis).argmax(axis, bool(keepdims))
    return x.argmax(axis, bool(keepdims))


def ArgMin(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the smallest value is."""
    if select_last_index:
        return x.shape[axis] - 1 - x.flip(axis).argmin(axis, bool(keepdims))
    return x.argmin(axis, bool(keepdims))


def TopK(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The largest or smallest values and where they are; of equal ones those that come first."""
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = ints(k)[0]
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def CumSum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sums."""
    return _running(torch.cumsum, x, ints(axis)[0], 0, exclusive, reverse)


def CumProd(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running products."""
    return _running(torch.cumprod, x, ints(axis)[0], 1, exclusive, reverse)


def _running(
    accumulate: Callable[..., Tensor], x: Tensor, axis: int, start: int, exclusive: int, reverse: int
) -> Tensor:
    x = x.flip(axis) if reverse else x
    if exclusive:  # the element itself does not count: what came before it moves up by one
        x = torch.cat([torch.full_like(x.narrow(axis, 0, 1), start), x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    total = accumulate(x, axis, dtype=x.dtype)
    return total.flip(axis) if reverse else total


def Softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Exponentials that sum to one."""
    return x.softmax(axis)


def LogSoftmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """The logarithm of a softmax."""
    return x.log_softmax(axis)


def Hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """One at the first largest value, zero elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, True), 1.0)


def LpNormalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divided by its norm along an axis."""
    return F.normalize(x, p, axis, eps=1e-30)


def MeanVarianceNormalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Mean zero and variance one."""
    centred = x - x.mean(tuple(axes), keepdim=True)
    return centred / (centred.square().mean(tuple(axes), keepdim=True).sqrt() + 1e-9)
