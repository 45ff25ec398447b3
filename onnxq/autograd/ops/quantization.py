"""Quantization: exact codes forwards, straight-through gradients backwards.

Forwards every code has the bits of :func:`onnxq.arithmetic.quantize`. Backwards rounding is the identity, so that

    d code / d x          = 1 / scale        inside the range, 0 where it saturates
    d code / d scale      = -x / scale**2    inside, 0 where it saturates
    d code / d zero point = 1                inside, 0 where it saturates

which together with DequantizeLinear is the gradient of LSQ (Esser et al. 2020, equation 3) for the scale, and that of
LSQ+ for the zero point: ``round(x / scale) - x / scale`` inside, the lowest or highest code where it saturates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxq.autograd.ops.layers import Conv
from onnxq.autograd.ops.operands import narrowed, torch_type
from onnxq.block_scales import BLOCK, LARGEST
from onnxq.dynamic_fp4 import LARGEST_CODE

DIRECT: dict[str, Callable[..., Any]] = {}

_RANGES: dict[int, tuple[float, float]] = {
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.FLOAT8E4M3FN: (-448, 448),
    ir.DataType.FLOAT8E5M2: (-57344, 57344),
    ir.DataType.FLOAT4E2M1: (-6, 6),
}
_FLOATS = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT4E2M1)


# The ends of the range still are inside, so the bounds lie a little beyond, as far as float32 can tell at 65535.
_MARGIN = 2.0**-6


class _ToCodes(torch.autograd.Function):
    """``saturate(round(x / scale) + zero)`` with the gradients of this file's first lines."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero: Tensor, low: float, high: float, narrow: int, saturate: bool) -> Tensor:
        steps = x / scale
        if narrow:
            return narrowed(steps, narrow, saturate=saturate).to(steps.dtype)
        # The bounds are whole numbers, so clipping before rounding is the same. NaN becomes the lower bound.
        steps.nan_to_num_(-math.inf, math.inf, -math.inf)
        return steps.clamp_min_(low - zero).clamp_max_(high - zero).round_().add_(zero)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero, ctx.low, ctx.high, *_ = inputs
        ctx.save_for_backward(x, scale, zero)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        needs_x, needs_scale, needs_zero, *_ = ctx.needs_input_grad
        codes = (x / scale).add_(zero)
        # What lies strictly between two bounds, in one pass where comparisons and a where take four.
        passed = torch.ops.aten.hardtanh_backward(gradient, codes, ctx.low - _MARGIN, ctx.high + _MARGIN)
        to_x = passed / scale if needs_x or needs_scale else None
        return (
            to_x if needs_x else None,
            (to_x * codes.sub_(zero)).sum_to_size(scale.shape).neg_() if needs_scale else None,
            passed.sum_to_size(zero.shape) if needs_zero else None,
            None,
            None,
            None,
            None,
        )


def QuantizeLinear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """Codes as floats, so that gradients flow through them."""
    container = output_dtype or ir.DataType.UINT8
    if container not in _RANGES:
        raise NotImplementedError(f"QuantizeLinear to {ir.DataType(container).name}")
    low, high = _RANGES[container]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    zero = torch.zeros((), device=x.device) if zero_point is None else zero_point
    view, scales, zeros = _laid_out(x.to(wide), scale.to(wide), zero.to(wide), axis, block_size)
    narrow = container if container in _FLOATS else 0
    codes: Tensor = _ToCodes.apply(view, scales, zeros, low, high, narrow, bool(saturate))  # type: ignore[no-untyped-call]
    return codes if codes.shape == x.shape else codes.reshape(x.shape)


def quantize_blocks(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **attributes: Any) -> Tensor:
    """An activation in FP4, each block of 16 with an FP8 scale of its own (see :mod:`onnxq.dynamic_fp4`).

    The result is in units of the tensor's scale, by which the DequantizeLinear behind it multiplies; gradients pass
    through to ``x``.
    """
    blocks = x.detach().to(torch.float32).reshape(*x.shape[:-1], -1, BLOCK)
    unit = scale.detach().to(torch.float32) / LARGEST
    wanted = blocks.abs().amax(dim=-1, keepdim=True) / (unit * LARGEST_CODE)
    steps = narrowed(wanted, ir.DataType.FLOAT8E4M3FN).to(torch.float32) * unit
    steps = torch.where(steps == 0, torch.ones_like(steps), steps)
    nearest = (narrowed(blocks / steps, ir.DataType.FLOAT4E2M1) * steps).reshape(x.shape)
    return (x + (nearest.to(x.dtype) - x).detach()) / scale.to(x.dtype)


def DequantizeLinear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """Real numbers from codes, which may be floats or integers."""
    wide = torch.float64 if scale.dtype == torch.float64 else torch.float32
    zero = None if zero_point is None else zero_point.to(wide)
    view, scales, zeros = _laid_out(x.to(wide), scale.to(wide), zero, axis, block_size)
    values = (view if zeros is None else view - zeros) * scales
    dtype = torch_type(output_dtype) if output_dtype else scale.dtype
    values = values if values.dtype == dtype else values.to(dtype)
    return values if values.shape == x.shape else values.reshape(x.shape)


def _laid_out(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int, block_size: int) -> tuple[Tensor, Tensor, Any]:
    """The tensor with its blocks as an axis of their own, and parameters that broadcast against it."""
    if scale.numel() == 1:
        return x, scale.reshape(()), None if zero is None else zero.reshape(())
    axis = axis % x.ndim
    even = block_size > 0 and x.shape[axis] % block_size == 0

    def lay_out(parameter: Tensor) -> Tensor:
        if parameter.numel() == 1:
            return parameter.reshape(())
        if not block_size:
            return parameter.reshape(-1, *[1] * (x.ndim - axis - 1))
        if even:
            return parameter.unsqueeze(axis + 1)
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])

    view = x.reshape(*x.shape[:axis], -1, block_size, *x.shape[axis + 1 :]) if even else x
    return view, lay_out(scale), None if zero is None else lay_out(zero)


def DynamicQuantizeLinear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as floats, and the scale and zero point that cover the tensor's own range; gradients pass to the codes."""
    low, high = x.detach().amin().clamp_max(0), x.detach().amax().clamp_min(0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low / scale).clamp(0, 255).round()
    return QuantizeLinear(x, scale, zero, output_dtype=ir.DataType.UINT8), scale, zero


def MatMulInteger(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """A matrix product of integers."""
    return torch.matmul(_centred(a, a_zero_point, -2), _centred(b, b_zero_point, -1)).to(torch.int32)


def ConvInteger(
    x: Tensor,
    weight: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution of integers."""
    sums = Conv(
        _centred(x, x_zero_point, 0), _centred(weight, w_zero_point, 0), None, auto_pad=auto_pad, dilations=dilations,
        group=group, pads=pads, strides=strides,
    )  # fmt: skip
    return sums.round().to(torch.int32)


def QLinearMatMul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """A matrix product of codes."""
    product = torch.matmul(_centred(a, a_zero_point, -2), _centred(b, b_zero_point, -1))
    return _requantized(product, _along(a_scale, -2) * _along(b_scale, -1) / y_scale, y_zero_point)


def QLinearConv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution of codes."""
    sums = Conv(
        _centred(x, x_zero_point, 0), _centred(weight, w_zero_point, 0), None if bias is None else bias.double(),
        auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides,
    )  # fmt: skip
    factor = (x_scale * w_scale / y_scale).reshape(-1, *[1] * (x.ndim - 2))
    return _requantized(sums, factor, y_zero_point)


def _centred(codes: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """Codes less their zero point, in float64, which holds every sum of products of bytes exactly."""
    wide = codes.to(torch.float64)
    if zero_point is None:
        return wide
    zero = zero_point.to(torch.float64)
    if axis == 0 and zero.numel() > 1:
        return wide - zero.reshape(-1, *[1] * (codes.ndim - 1))
    return wide - _along(zero, axis)


def _along(parameter: Tensor, axis: int) -> Tensor:
    """One number for each row (axis -2) or column (axis -1), laid out to broadcast."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter.unsqueeze(-1) if axis == -2 and parameter.ndim == 1 else parameter


def _requantized(sums: Tensor, factor: Tensor, zero_point: Tensor) -> Tensor:
    low, high = torch.iinfo(zero_point.dtype).min, torch.iinfo(zero_point.dtype).max
    codes = (sums * factor).round() + zero_point
    return codes.clamp(low, high).to(zero_point.dtype)
