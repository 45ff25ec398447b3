"""The exact arithmetic of quantization: from numbers to codes and back.

A quantized tensor is codes, a scale and a zero point. The two directions are, element by element and in float32,

    code  = saturate(round_half_even(value / scale) + zero_point)
    value = (code - zero_point) * scale

and every function here gives the same bits as onnxruntime's CPU QuantizeLinear and DequantizeLinear, so that what
calibration and learning see is what runs. Float16 tensors are computed in float32 and rounded once at the end, as
onnxruntime does. Scales come in the three shapes of QuantizeLinear: one number, one number per index of ``axis``, or
one number per block of ``block_size`` neighbours along ``axis``.

Where onnxruntime up to 1.31 disagrees with itself we saturate, as the operator's definition says and as its float32
kernels for 8 and 16 bits do (per tensor and per axis; NaN becomes the lowest code there). Its other integer kernels (4
bits, blocks, every float16 input) and the reference evaluator of onnx pass through int32: from ``|value / scale| >=
2**31`` on, and for NaN, they wrap around to the smallest int32, so that +inf becomes the lowest code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, DTypeLike, NDArray

from onnxq.errors import OnnxqError
from onnxq.formats import NumberFormat

Array = NDArray[Any]

# Elements worked on at once: the float32 scratch of a tile (256 KiB) stays in a core's second-level cache.
_TILE = 1 << 16
# Normal float32 numbers only: a reciprocal stays finite, and hardware that flushes subnormals sees the same scale.
_SMALLEST_SCALE, _LARGEST_SCALE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@np.errstate(all="ignore")
def quantize(
    values: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None,
    number_format: NumberFormat,
    *,
    axis: int | None = None,
    block_size: int | None = None,
) -> Array:
    """Turn real numbers into codes, as QuantizeLinear with ``saturate=1`` does.

    Values outside the range, infinities included, saturate. NaN becomes the lowest code of an integer format, stays NaN
    in fp8, and becomes zero in fp4, which has no NaN. Widths below their container's (int2, int3, int5, int6, int7)
    saturate at their own range: the same codes as ``Clip`` and then the container's QuantizeLinear, except for NaN.

    Args:
        values: Floats of any shape.
        scale: Positive; one number, or shape ``[values.shape[axis]]``, or the shape of ``values`` with
            ``ceil(n / block_size)`` along ``axis``.
        zero_point: The code of 0.0, shaped like ``scale`` or one number; None is 0.
        number_format: What the codes are.
        axis: The axis that ``scale`` runs along; None for one scale.
        block_size: Neighbours along ``axis`` that share a scale; None for one scale per index.

    Returns:
        Codes in the format's container data type, shaped like ``values``.

    Raises:
        OnnxqError: The shape of ``scale`` or ``zero_point`` does not fit ``values``.
    """
    values = np.asarray(values)
    if number_format.is_passthrough:
        return values
    codes = np.empty(values.shape, _plain(number_format.numpy_dtype))
    grid = _Grid(values.shape, scale, zero_point, number_format, axis, block_size)
    source, target = grid.view(values), grid.view(codes)
    for tile in _tiles(source.shape):
        steps = grid.steps(source[tile], tile)
        if grid.offset is not None:
            steps += grid.at(grid.offset, tile)
        # Steps are inside the range, so an integer cast is exact; the cast to fp8 rounds half to even.
        target[tile] = steps
    return _pack(codes, number_format)


@np.errstate(all="ignore")
def dequantize(
    codes: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    number_format: NumberFormat | None = None,
    *,
    axis: int | None = None,
    block_size: int | None = None,
    dtype: DTypeLike = np.float32,
) -> Array:
    """Turn codes back into real numbers, as DequantizeLinear does.

    ``codes`` are in the container data type; ``number_format`` is needed only for ``float``, whose values come back
    unchanged. The other arguments and the errors are those of ``quantize``.

    Returns:
        Floats of data type ``dtype``, shaped like ``codes``.
    """
    codes = np.asarray(codes)
    if number_format is not None and number_format.is_passthrough:
        return codes
    values = np.empty(codes.shape, dtype)
    grid = _Grid(codes.shape, scale, zero_point, number_format, axis, block_size)
    source, target = grid.view(codes.view(_plain(codes.dtype))), grid.view(values)
    for tile in _tiles(source.shape):
        steps = _unpack(source[tile], codes.dtype)
        if grid.offset is not None:
            steps -= grid.at(grid.offset, tile)
        target[tile] = np.multiply(steps, grid.at(grid.scale, tile), out=steps)
    return values


@np.errstate(all="ignore")
def fake_quantize(
    values: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None,
    number_format: NumberFormat,
    *,
    axis: int | None = None,
    block_size: int | None = None,
) -> Array:
    """Quantize and dequantize in one go, without making the codes.

    Arguments and errors are those of ``quantize``.

    Returns:
        Floats of the shape and data type of ``values``; for ``float`` the values themselves.
    """
    values = np.asarray(values)
    if number_format.is_passthrough:
        return values
    result = np.empty(values.shape, values.dtype)
    grid = _Grid(values.shape, scale, zero_point, number_format, axis, block_size)
    source, target = grid.view(values), grid.view(result)
    for tile in _tiles(source.shape):
        steps = grid.steps(source[tile], tile)
        if number_format.is_float:
            steps = _unpack(steps.astype(number_format.numpy_dtype), number_format.numpy_dtype)
        else:
            steps += 0.0  # an integer has no negative zero: -0.0 + 0.0 is +0.0
        target[tile] = np.multiply(steps, grid.at(grid.scale, tile), out=steps)
    return result


def scale_and_zero_point(
    low: ArrayLike, high: ArrayLike, number_format: NumberFormat, *, symmetric: bool
) -> tuple[Array, Array]:
    """Choose the scale and zero point that cover a range of real numbers.

    The range is first widened to include 0, which is then exactly representable. Symmetric scales are
    ``max(|low|, |high|) / high_code``: int8 uses 127, so that the range is the same on both sides, and the code -128
    stays free for values beyond it. Floating-point formats are always symmetric.

    Args:
        low: Smallest value, any shape.
        high: Largest value, same shape.
        number_format: Where the range goes.
        symmetric: Put real zero in the middle of the codes (0, or 128 for uint8).

    Returns:
        Scales in float32, finite and positive even for an empty range (1.0 where both ends are 0), and zero points in
        the container data type; both shaped like ``low``.

    Raises:
        OnnxqError: A range end is NaN or infinite.
    """
    lows, highs = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    if not (np.isfinite(lows).all() and np.isfinite(highs).all()):
        raise OnnxqError(
            "expected finite ranges, found NaN or infinity",
            hint="look for NaN or infinite values in the calibration inputs or in the weights",
        )
    lows, highs = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
    if number_format.is_passthrough:
        return np.ones(lows.shape, np.float32), np.zeros(lows.shape, number_format.numpy_dtype)
    low_code, high_code = number_format.low, number_format.high
    middle = 0.0 if number_format.signed else (high_code + 1) / 2
    centred = symmetric or number_format.is_float
    wide = np.maximum(-lows, highs) / (high_code - middle) if centred else (highs - lows) / (high_code - low_code)
    scale = np.clip(wide, _SMALLEST_SCALE, _LARGEST_SCALE).astype(np.float32)
    scale = np.where(lows == highs, np.float32(1), scale)
    zero = np.full(lows.shape, middle) if centred else np.rint(low_code - lows / scale.astype(np.float64))
    zero = np.clip(zero, low_code, high_code)
    return scale, np.asarray(zero).astype(number_format.numpy_dtype)


def storable_scale(scale: Array, dtype: ir.DataType | None) -> Array:
    """The scale, or the smallest that its type holds in full: one that rounds to 0 divides by it."""
    return np.maximum(scale, np.finfo(np.float16).tiny) if dtype == ir.DataType.FLOAT16 else scale


class _Grid:
    """Scales and zero points laid out so that they broadcast against a tensor of a given shape."""

    def __init__(
        self,
        shape: tuple[int, ...],
        scale: ArrayLike,
        zero_point: ArrayLike | None,
        number_format: NumberFormat | None,
        axis: int | None,
        block_size: int | None,
    ) -> None:
        if axis is not None and not -len(shape) <= axis < len(shape):
            raise OnnxqError(f"expected an axis of a tensor of shape {list(shape)}, found {axis}")
        if block_size is not None and block_size < 1:
            raise OnnxqError(f"expected a block size of at least 1, found {block_size}")
        scales = np.asarray(scale, np.float32)
        zeros = np.asarray(0 if zero_point is None else zero_point).astype(np.float32)
        axis = None if axis is None or scales.size == zeros.size == 1 else axis % len(shape)
        self._shape = shape or (1,)
        if axis is not None and block_size is not None and shape[axis] % block_size == 0:
            self._shape = (*shape[:axis], shape[axis] // block_size, block_size, *shape[axis + 1 :])
        self.scale = _lay_out(scales, shape, axis, block_size)
        self.offset = _lay_out(zeros, shape, axis, block_size) if zeros.any() else None
        self._rounds = number_format is None or not number_format.is_float
        if number_format is not None:
            offset, ends = 0.0 if self.offset is None else self.offset, (number_format.low, number_format.high)
            self._low, self._high = (np.asarray(end - offset, np.float32) for end in ends)

    def view(self, tensor: Array) -> Array:
        """The tensor with its blocks as an axis of their own."""
        return tensor.reshape(self._shape)

    def at(self, parameter: Array, tile: tuple[slice, ...]) -> Array:
        """The part of a parameter that belongs to a tile."""
        pairs = zip(tile[len(self._shape) - parameter.ndim :], parameter.shape, strict=True)
        return parameter[tuple(part if size > 1 else slice(None) for part, size in pairs)]

    def steps(self, values: Array, tile: tuple[slice, ...]) -> Array:
        """Values in units of the scale, inside the range; rounded for integer formats."""
        steps = np.empty(values.shape, np.float32)
        np.divide(values, self.at(self.scale, tile), out=steps, dtype=np.float32, casting="same_kind")
        low, high = self.at(self._low, tile), self.at(self._high, tile)
        if not self._rounds:
            return np.clip(steps, low, high, out=steps)
        # The bounds are whole numbers, so clipping before rounding is the same. fmax turns NaN into the lower bound.
        np.fmax(steps, low, out=steps)
        np.fmin(steps, high, out=steps)
        return np.rint(steps, out=steps)


def _lay_out(parameter: Array, shape: tuple[int, ...], axis: int | None, block_size: int | None) -> Array:
    """A scale or zero point with the axes it needs to broadcast against ``_Grid.view`` of a tensor."""
    if parameter.size == 1:
        return parameter.reshape(())
    expected: tuple[int, ...] = () if axis is None else (shape[axis],)
    if axis is not None and block_size is not None:
        expected = (*shape[:axis], -(-shape[axis] // block_size), *shape[axis + 1 :])
    if axis is None or parameter.shape != expected:
        raise OnnxqError(
            f"expected a scale and zero point of shape {list(expected)} for a tensor of shape {list(shape)}, axis "
            f"{axis}, block size {block_size}; found shape {list(parameter.shape)}"
        )
    if block_size is None:
        return parameter.reshape(shape[axis], *[1] * (len(shape) - axis - 1))
    if shape[axis] % block_size == 0:
        return np.expand_dims(parameter, axis + 1)
    # A last block that is cut short: give every element its own scale.
    return np.repeat(parameter, block_size, axis)[(slice(None),) * axis + (slice(shape[axis]),)]


def _plain(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The one-byte integer that holds a 4-bit integer in memory: numpy works on it ten times faster."""
    return {"int4": np.dtype(np.int8), "uint4": np.dtype(np.uint8)}.get(dtype.name, dtype)


def _pack(codes: Array, number_format: NumberFormat) -> Array:
    """The container's array from plain integers; ml_dtypes keeps an int4 in the low half of a byte, the rest zero."""
    if number_format.storage == ir.DataType.INT4:
        np.bitwise_and(codes, 0x0F, out=codes)
    return codes.view(number_format.numpy_dtype)


def _unpack(codes: Array, dtype: np.dtype[Any]) -> Array:
    """Float32 numbers from the bytes of a container's array."""
    if dtype.name == "int4":
        codes = (codes << 4) >> 4
    if dtype.name.startswith(("float8", "float4")):
        return _values_of_bytes(dtype)[codes.view(np.uint8)]
    return codes.astype(np.float32)


@functools.cache
def _values_of_bytes(dtype: np.dtype[Any]) -> Array:
    """What each byte of a one-byte float means: looking it up is eight times faster than converting it."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cut a shape into pieces small enough for the cache, whole rows where they fit."""
    rest = math.prod(shape[1:])
    step = max(1, _TILE // max(rest, 1))
    for start in range(0, shape[0], step):
        part = slice(start, start + step)
        if rest > _TILE:
            yield from ((part, *inner) for inner in _tiles(shape[1:]))
        else:
            yield (part,) + (slice(None),) * (len(shape) - 1)
