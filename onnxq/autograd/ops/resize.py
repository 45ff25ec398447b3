"""Resize: every axis alone, as a table of indices or as a matrix of weights, and torch's own where that is the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from onnxq.autograd.ops.operands import ints

DIRECT: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class _Axis:
    """How one axis is resized.

    Attributes:
        size: Elements before.
        new_size: Elements after.
        scale: How much larger; ``new_size / size`` only where that comes out even.
        coordinates: ONNX's ``coordinate_transformation_mode``.
        region: Beginning and end of the region of interest, as fractions.
    """

    size: int
    new_size: int
    scale: float
    coordinates: str
    region: tuple[float, float]

    def places(self) -> NDArray[np.float64]:
        """Where each new element lies among the old ones."""
        index = np.arange(self.new_size, dtype=np.float64)
        width = self.scale * self.size
        if self.coordinates == "asymmetric":
            return index / self.scale
        if self.coordinates == "align_corners":
            return index * 0 if width == 1 else index * (self.size - 1) / (width - 1)
        if self.coordinates == "tf_crop_and_resize":
            begin, end = self.region
            step = (end - begin) * (self.size - 1)
            return begin * (self.size - 1) + (index * 0 + step / 2 if width == 1 else index * step / (width - 1))
        half_pixel = (index + 0.5) / self.scale - 0.5
        if self.coordinates == "pytorch_half_pixel" and width == 1:
            return index * 0
        if self.coordinates == "half_pixel_symmetric":
            return self.size / 2 * (1 - self.new_size / width) + half_pixel
        return half_pixel

    @property
    def even(self) -> bool:
        """Whether torch, which knows sizes but not scales, uses the same scale."""
        return self.scale == self.new_size / self.size


def Resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Another size, by the nearest element, linear or cubic interpolation."""
    along = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes]
    old = [x.shape[axis] for axis in along]
    if sizes is not None and sizes.numel():
        new, factors = _from_sizes(old, ints(sizes), keep_aspect_ratio_policy)
    else:
        factors = [1.0] * len(old) if scales is None else [float(scale) for scale in scales.tolist()]
        new = [math.floor(size * scale) for size, scale in zip(old, factors, strict=True)]
    cropped = coordinate_transformation_mode == "tf_crop_and_resize"
    region = roi.tolist() if cropped and roi is not None else [0.0] * len(old) + [1.0] * len(old)
    plan = {
        axis: _Axis(old[i], new[i], factors[i], coordinate_transformation_mode, (region[i], region[len(old) + i]))
        for i, axis in enumerate(along)
        if new[i] != old[i] or factors[i] != 1.0 or cropped
    }
    if not antialias and not exclude_outside and cubic_coeff_a == -0.75:
        fast = _by_torch(x, plan, mode, nearest_mode)
        if fast is not None:
            return fast
    result = x if x.is_floating_point() or mode == "nearest" else x.to(torch.float32)
    for axis, how in plan.items():
        if mode == "nearest":
            result = result.index_select(axis, _nearest(how, nearest_mode).to(x.device))
        else:
            matrix = _matrix(how, mode, bool(antialias), bool(exclude_outside), cubic_coeff_a)
            result = torch.tensordot(result, matrix.to(result), ([axis], [1])).movedim(-1, axis)
        if cropped:
            places = how.places()
            outside = torch.from_numpy((places < 0) | (places > how.size - 1)).to(x.device)
            shape = [-1 if other == axis else 1 for other in range(x.ndim)]
            result = torch.where(outside.reshape(shape), extrapolation_value, result)
    return result if result.dtype == x.dtype else result.round().to(x.dtype)


def _from_sizes(old: list[int], new: list[int], policy: str) -> tuple[list[int], list[float]]:
    factors = [want / have for want, have in zip(new, old, strict=True)]
    if policy == "stretch":
        return new, factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [math.floor(size * factor + 0.5) for size in old], [factor] * len(old)


def _by_torch(x: Tensor, plan: dict[int, _Axis], mode: str, nearest_mode: str) -> Tensor | None:
    """The same by ``interpolate``, if it has the same; it resizes all spatial axes in one go."""
    if not 3 <= x.ndim <= 5 or min(plan, default=2) < 2 or not x.is_floating_point() or not plan:
        return None
    new = [plan[axis].new_size if axis in plan else x.shape[axis] for axis in range(2, x.ndim)]
    if mode == "nearest":
        if all(_is_repeat(how, nearest_mode) for how in plan.values()):
            return F.interpolate(x, new, mode="nearest")
        return None
    name = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear", ("cubic", 4): "bicubic"}
    corners = {how.coordinates == "align_corners" for how in plan.values()}
    known = all(
        how.coordinates in ("half_pixel", "align_corners")
        or (how.coordinates == "pytorch_half_pixel" and how.new_size > 1)
        for how in plan.values()
    )
    if (mode, x.ndim) not in name or not known or not all(how.even for how in plan.values()):
        return None
    return F.interpolate(x, new, mode=name[mode, x.ndim], align_corners=corners == {True})


@functools.lru_cache(256)
def _is_repeat(how: _Axis, nearest_mode: str) -> bool:
    """Whether every element is only repeated, each as often."""
    if how.new_size % how.size:
        return False
    repeats = how.new_size // how.size
    return bool((_nearest(how, nearest_mode) == torch.arange(how.new_size) // repeats).all())


@functools.lru_cache(256)
def _nearest(how: _Axis, nearest_mode: str) -> Tensor:
    places = how.places()
    rounded = {
        "round_prefer_floor": lambda: np.ceil(places - 0.5),
        "round_prefer_ceil": lambda: np.floor(places + 0.5),
        "floor": lambda: np.floor(places),
        "ceil": lambda: np.ceil(places),
    }[nearest_mode]()
    return torch.from_numpy(np.clip(rounded, 0, how.size - 1).astype(np.int64))


@functools.lru_cache(256)
def _matrix(how: _Axis, mode: str, antialias: bool, exclude_outside: bool, a: float) -> Tensor:
    """Weights of shape ``[new, old]``; elements beyond the ends are the last ones, or do not count."""
    squeeze = min(how.scale, 1.0) if antialias else 1.0
    reach = math.ceil((2 if mode == "cubic" else 1) / squeeze) + 1
    places = how.places()
    first = min(0, math.floor(places.min(initial=0))) - reach
    last = max(how.size, math.ceil(places.max(initial=0))) + reach
    old = np.arange(first, last)
    distance = np.abs(old - places[:, None]) * squeeze
    if mode == "cubic":
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    else:
        weights = np.clip(1 - distance, 0, None)
    if exclude_outside:
        weights[:, (old < 0) | (old >= how.size)] = 0
    weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((how.size, how.new_size))
    np.add.at(matrix, np.clip(old, 0, how.size - 1), weights.T)
    return torch.from_numpy(np.ascontiguousarray(matrix.T))
