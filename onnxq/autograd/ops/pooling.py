"""Pools over windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxq.autograd.ops.operands import ints
from onnxq.autograd.ops.windows import pad_ends, pads_of, rounded_up_ends

DIRECT: dict[str, Callable[..., Any]] = {}

_MAXIMA: tuple[Callable[..., Any], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGES: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


def MaxPool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest value of each window, and its index in the whole tensor if asked."""
    if not x.is_floating_point():
        pooled = MaxPool(
            x.to(torch.float32), kernel_shape=kernel_shape, auto_pad=auto_pad, ceil_mode=ceil_mode,
            dilations=dilations, pads=pads, storage_order=storage_order, strides=strides, outputs=outputs,
        )  # fmt: skip
        return pooled.to(x.dtype) if isinstance(pooled, Tensor) else (pooled[0].to(x.dtype), pooled[1])
    axes = x.ndim - 2
    ones = (1,) * axes
    strides, dilations = strides or ones, dilations or ones
    before, after = pads_of(x, kernel_shape, strides, dilations, pads, auto_pad)
    plain = before == after and all(0 <= 2 * pad <= size for pad, size in zip(before, kernel_shape, strict=True))
    padded = x
    if not plain:
        if ceil_mode:
            after = rounded_up_ends(x, kernel_shape, strides, dilations, before, after)
        padded = pad_ends(x, before, after, -math.inf)
    pads_inside = before if plain else [0] * axes
    pool = _MAXIMA[axes - 1]
    if outputs == 1:
        result: Tensor = pool(padded, kernel_shape, strides, pads_inside, dilations, bool(ceil_mode and plain))
        return result
    result, index = pool(padded, kernel_shape, strides, pads_inside, dilations, bool(ceil_mode and plain), True)
    return result, _whole_index(index, x, padded, [0] * axes if plain else before, storage_order)


def _whole_index(index: Tensor, x: Tensor, padded: Tensor, before: Sequence[int], storage_order: int) -> Tensor:
    """From an index in a padded channel to one in the whole tensor, columns first if ``storage_order`` is 1."""
    places = []
    for size, first in zip(reversed(padded.shape[2:]), reversed(before), strict=True):
        places.append(index % size - first)
        index = index // size
    sizes = x.shape[2:]
    axes = range(len(sizes) - 1, -1, -1) if storage_order else range(len(sizes))
    places.reverse()
    inside = torch.zeros_like(index)
    for axis in axes:
        inside = inside * sizes[axis] + places[axis]
    channel = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * len(sizes))
    return channel * math.prod(sizes) + inside


def MaxUnpool(
    x: Tensor,
    index: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Values back where a MaxPool found them, zero elsewhere."""
    axes = x.ndim - 2
    steps, ends = strides or (1,) * axes, pads or (0,) * (2 * axes)
    sizes = [
        (size - 1) * steps[axis] + kernel_shape[axis] - ends[axis] - ends[axis + axes]
        for axis, size in enumerate(x.shape[2:])
    ]
    smallest = [*x.shape[:2], *sizes]
    flat = x.new_zeros(math.prod(smallest)).scatter(0, index.flatten(), x.flatten()).reshape(smallest)
    if output_shape is None:
        return flat
    missing = [want - have for want, have in zip(ints(output_shape)[2:], sizes, strict=True)]
    return pad_ends(flat, [0] * axes, missing)


def AveragePool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The mean of each window, with or without what was padded."""
    axes = x.ndim - 2
    ones = (1,) * axes
    strides, dilations = strides or ones, dilations or ones
    before, after = pads_of(x, kernel_shape, strides, dilations, pads, auto_pad)
    fits = all(0 <= 2 * pad <= size for pad, size in zip(before, kernel_shape, strict=True))
    if before == after and fits and max(dilations) == 1:
        return _AVERAGES[axes - 1](x, kernel_shape, strides, before, bool(ceil_mode), bool(count_include_pad))
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if count_include_pad:
        counted = pad_ends(counted, before, after, 1.0)
    ends = rounded_up_ends(x, kernel_shape, strides, dilations, before, after) if ceil_mode else after
    if count_include_pad:
        counted = pad_ends(counted, [0] * axes, [end - pad for end, pad in zip(ends, after, strict=True)])
    else:
        counted = pad_ends(counted, before, ends)
    total = _window_sums(pad_ends(x, before, ends), kernel_shape, strides, dilations)
    return total / _window_sums(counted, kernel_shape, strides, dilations)


def LpPool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The norm of each window."""
    ones = (1,) * (x.ndim - 2)
    strides, dilations = strides or ones, dilations or ones
    before, after = pads_of(x, kernel_shape, strides, dilations, pads, auto_pad)
    if ceil_mode:
        after = rounded_up_ends(x, kernel_shape, strides, dilations, before, after)
    powers = pad_ends(x.abs().pow(p), before, after)
    return _window_sums(powers, kernel_shape, strides, dilations).pow(1 / p)


def _window_sums(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Sums of windows, as a convolution of each channel with ones."""
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    channels = x.reshape(-1, 1, *x.shape[2:])
    sums = _CONVOLUTIONS[x.ndim - 3](channels, ones, None, strides, 0, dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])
