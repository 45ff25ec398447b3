"""Ops that move elements: shapes, slices, gathers, scatters, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxq.autograd.ops.operands import ints, number, positive, torch_type

DIRECT: dict[str, Callable[..., Any]] = {}


def Constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Tensor:
    """A tensor that the node itself holds."""
    if value is not None:
        return value
    if value_float is not None or value_floats is not None:
        return torch.tensor(value_floats if value_float is None else value_float, dtype=torch.float32)
    return torch.tensor(value_ints if value_int is None else value_int, dtype=torch.int64)


def Shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes of the axes, on the CPU."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def Size(x: Tensor) -> Tensor:
    """Number of elements, on the CPU."""
    return torch.tensor(x.numel(), dtype=torch.int64)


def Reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """The same elements in another shape; 0 keeps an axis unless ``allowzero``."""
    sizes = ints(shape)
    if not allowzero and 0 in sizes:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def Flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix: axes before ``axis``, and those from it on."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def Transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order, by default reversed."""
    return x.permute(*(range(x.ndim - 1, -1, -1) if perm is None else perm))


def Squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without axes of size 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def Unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    """With new axes of size 1, counted in the result."""
    new = ints(axes)
    rank = x.ndim + len(new)
    for axis in sorted(axis % rank for axis in new):
        x = x.unsqueeze(axis)
    return x


def Concat(*xs: Tensor, axis: int) -> Tensor:
    """Several tensors one after the other."""
    return torch.cat(xs, axis)


def Split(
    x: Tensor, split: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> Sequence[Tensor]:
    """Pieces along an axis; without sizes equal ones, the last of them smaller."""
    size = x.shape[axis]
    if split is not None:
        return x.split_with_sizes(ints(split), axis)
    count = num_outputs or outputs
    chunk = -(-size // count)
    return x.split_with_sizes([chunk] * (count - 1) + [size - chunk * (count - 1)], axis)


def Slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    """Every ``steps``-th element between ``starts`` and ``ends``, as in Python."""
    first, last = ints(starts), ints(ends)
    along = range(len(first)) if axes is None else ints(axes)
    strides = [1] * len(first) if steps is None else ints(steps)
    kept = [slice(None)] * x.ndim
    for axis, start, end, step in zip(along, first, last, strides, strict=True):
        size = x.shape[axis]
        if step > 0:
            kept[axis] = slice(*slice(start, end, step).indices(size))
        else:  # torch has no negative steps
            backwards = range(*slice(start, None if end < -size else end, step).indices(size))
            x = x.index_select(axis, torch.tensor(backwards, dtype=torch.int64, device=x.device))
    return x[tuple(kept)]


def Gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Slices along an axis, by index."""
    axis = axis % x.ndim
    if indices.ndim == 0:
        index = number(indices)
        if index is not None:
            return x.select(axis, int(index))
    index_list = positive(indices.to(device=x.device, dtype=torch.int64), x.shape[axis])
    if index_list.ndim == 1:
        return x.index_select(axis, index_list)
    picked = x.index_select(axis, index_list.flatten())
    return picked.reshape(x.shape[:axis] + index_list.shape + x.shape[axis + 1 :])


def GatherElements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """For each index, the element at that place of the axis."""
    return x.gather(axis, positive(indices.to(device=x.device, dtype=torch.int64), x.shape[axis]))


def GatherND(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """For each index vector, the slice that it points to."""
    indices = indices.to(device=x.device, dtype=torch.int64)
    batch = x.shape[:batch_dims]
    grid = [
        torch.arange(size, device=x.device).reshape([-1 if axis == own else 1 for axis in range(indices.ndim - 1)])
        for own, size in enumerate(batch)
    ]
    index = [positive(part, x.shape[batch_dims + depth]) for depth, part in enumerate(indices.unbind(-1))]
    return x[(*grid, *index)]


def ScatterElements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """``x`` with elements replaced by, or combined with, ``updates``."""
    index = positive(indices.to(device=x.device, dtype=torch.int64), x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction])


def Scatter(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    """The older name of ScatterElements."""
    return ScatterElements(x, indices, updates, axis=axis)


def ScatterND(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """``x`` with slices replaced by, or combined with, ``updates``."""
    indices = indices.to(device=x.device, dtype=torch.int64)
    depth = indices.shape[-1]
    index = tuple(positive(part, x.shape[axis]) for axis, part in enumerate(indices.unbind(-1)))
    if reduction in ("none", "add"):
        return x.index_put(index, updates, accumulate=reduction == "add")
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis, part in enumerate(index):
        flat = flat * x.shape[axis] + part
    table = x.reshape(math.prod(x.shape[:depth]), -1)
    rows = updates.reshape(-1, table.shape[1])
    return table.scatter_reduce(
        0, flat.reshape(-1, 1).expand(-1, table.shape[1]), rows, _REDUCTIONS[reduction]
    ).reshape(x.shape)


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def TensorScatter(
    cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """A key-value cache with new entries written from an index of each batch on."""
    axis = axis % cache.ndim
    size = update.shape[axis]
    first = torch.zeros(cache.shape[0], dtype=torch.int64) if write_indices is None else write_indices
    places = first.to(device=cache.device, dtype=torch.int64)[:, None] + torch.arange(size, device=cache.device)
    if mode == "circular":
        places = places % cache.shape[axis]
    shape = [1] * cache.ndim
    shape[0], shape[axis] = cache.shape[0], size
    return cache.scatter(axis, places.reshape(shape).expand(update.shape), update)


def Compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The slices whose condition holds."""
    kept = torch.nonzero(condition.to(x.device)).flatten()
    return x.flatten().index_select(0, kept) if axis is None else x.index_select(axis, kept)


def Expand(x: Tensor, shape: Tensor) -> Tensor:
    """Repeated along axes of size 1, without a copy."""
    return x.expand(torch.broadcast_shapes(x.shape, ints(shape)))  # type: ignore[no-untyped-call]


def Tile(x: Tensor, repeats: Tensor) -> Tensor:
    """Repeated as a whole along each axis."""
    return x.repeat(ints(repeats))


def ConstantOfShape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    """One value everywhere, by default 0.0."""
    if value is None:
        return torch.zeros(ints(shape))
    return value.reshape(()).expand(ints(shape)).clone()


def Range(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    """Numbers from ``start`` up to ``limit``, which is not one of them."""
    first, last, step = start.item(), limit.item(), delta.item()
    count = max(math.ceil((last - first) / step), 0)
    return (torch.arange(count) * step + first).to(start.dtype)


def EyeLike(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on a diagonal of a matrix of the same shape."""
    ones = torch.ones(x.shape, dtype=x.dtype if dtype is None else torch_type(dtype), device=x.device)
    return ones.triu(k).tril(k)


def OneHot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """``values[1]`` where the new axis' index is the given one, ``values[0]`` elsewhere."""
    size = ints(depth)[0]
    places = torch.remainder(indices, size).to(torch.int64)
    inside = (indices >= -size) & (indices < size)
    hot = (places.unsqueeze(-1) == torch.arange(size, device=indices.device)) & inside.unsqueeze(-1)
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


def NonZero(x: Tensor) -> Tensor:
    """Indices of elements that are not zero, one column each."""
    return torch.nonzero(x).T


def Trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle; zero elsewhere."""
    diagonal = 0 if k is None else ints(k)[0]
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def DepthToSpace(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels become blocks of the image."""
    batch, channels, height, width = x.shape
    depth = channels // blocksize**2
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    blocks = x.reshape(batch, blocksize, blocksize, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(batch, depth, height * blocksize, width * blocksize)


def SpaceToDepth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Blocks of the image become channels."""
    batch, channels, height, width = x.shape
    if mode == "CRD":
        return F.pixel_unshuffle(x, blocksize)
    blocks = x.reshape(batch, channels, height // blocksize, blocksize, width // blocksize, blocksize)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(
        batch, channels * blocksize**2, height // blocksize, width // blocksize
    )


def ReverseSequence(x: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first steps of each batch, as many as its length, in reverse."""
    steps = torch.arange(x.shape[time_axis], device=x.device)
    lengths = sequence_lens.to(x.device)[:, None]
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    shape = [1] * x.ndim
    shape[batch_axis], shape[time_axis] = index.shape
    return x.gather(time_axis, (index if batch_axis < time_axis else index.T).reshape(shape).expand(x.shape))


def Pad(
    x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str = "constant"
) -> Tensor:
    """More, or where negative fewer, elements at the ends of axes."""
    along = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in ints(axes)]
    ends = ints(pads)
    before, after = dict(zip(along, ends, strict=False)), dict(zip(along, ends[len(along) :], strict=True))
    if mode == "constant":
        torch_pads = [size for axis in range(x.ndim - 1, -1, -1) for size in (before.get(axis, 0), after.get(axis, 0))]
        return F.pad(x, torch_pads, value=0 if value is None else value.item())
    if _is_image_pad(x, before, after):
        image = (before.get(3, 0), after.get(3, 0), before.get(2, 0), after.get(2, 0))
        return F.pad(x, image, mode=_IMAGE_MODES[mode])
    for axis in along:
        size = x.shape[axis]
        index = torch.arange(-before[axis], size + after[axis])
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = index % size
        else:
            period = max(2 * (size - 1), 1)
            index = (index % period).abs()
            index = torch.minimum(index, period - index) if size > 1 else index * 0
        x = x.index_select(axis, index.to(x.device))
    return x


_IMAGE_MODES = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}


def _is_image_pad(x: Tensor, before: dict[int, int], after: dict[int, int]) -> bool:
    """Whether only height and width grow, each by less than itself: torch pads those in one go."""
    if x.ndim != 4 or not x.is_floating_point():
        return False
    for axis in range(4):
        sizes = (before.get(axis, 0), after.get(axis, 0))
        if min(sizes) < 0 or max(sizes) >= (x.shape[axis] if axis > 1 else 1):
            return False
    return True


def CenterCropPad(x: Tensor, shape: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """The middle of a tensor, or the tensor in the middle of zeros."""
    pads = [0] * (2 * x.ndim)
    for axis, size in zip(range(x.ndim) if axes is None else axes, ints(shape), strict=True):
        axis = axis % x.ndim
        missing = size - x.shape[axis]
        first = missing // 2 if missing > 0 else -(-missing // 2)
        pads[2 * (x.ndim - 1 - axis)], pads[2 * (x.ndim - 1 - axis) + 1] = first, missing - first
    return F.pad(x, pads)


def Col2Im(
    x: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Columns of blocks added up to an image."""
    image, block = tuple(ints(image_shape)), tuple(ints(block_shape))
    axes = len(image)
    if axes != 2:
        raise NotImplementedError(f"Col2Im of {axes} axes")
    ends = [0, 0, 0, 0] if pads is None else list(pads)
    padded = tuple(size + ends[axis] + ends[axis + 2] for axis, size in enumerate(image))
    whole = F.fold(x, padded, block, dilation=tuple(dilations or (1, 1)), stride=tuple(strides or (1, 1)))
    return whole[..., ends[0] : ends[0] + image[0], ends[1] : ends[1] + image[1]]
