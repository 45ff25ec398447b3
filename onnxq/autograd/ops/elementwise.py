"""Ops that work on each element alone, with broadcasting."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from onnxq.autograd.ops.operands import FLOAT8_TYPES, TORCH_TYPES, narrowed, number, torch_type

DIRECT: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": torch.add,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Mish": F.mish,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}


def Div(a: Tensor, b: Tensor) -> Tensor:
    """Integers divide toward zero."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def Mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The sign of the divisor, or with ``fmod`` that of the dividend."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def Pow(x: Tensor, y: Tensor) -> Tensor:
    """A power in the type of ``x``."""
    exponent = number(y) if y.ndim == 0 else None
    power = torch.pow(x, y if exponent is None else exponent)
    return power if power.dtype == x.dtype else power.to(x.dtype)


def BitShift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """A shift of all bits to the ``LEFT`` or the ``RIGHT``."""
    return torch.bitwise_left_shift(x, y) if direction == "LEFT" else torch.bitwise_right_shift(x, y)


def Max(*xs: Tensor) -> Tensor:
    """The largest of several tensors."""
    return functools.reduce(torch.maximum, xs)


def Min(*xs: Tensor) -> Tensor:
    """The smallest of several tensors."""
    return functools.reduce(torch.minimum, xs)


def Sum(*xs: Tensor) -> Tensor:
    """The sum of several tensors."""
    return functools.reduce(operator.add, xs)


def Mean(*xs: Tensor) -> Tensor:
    """The mean of several tensors."""
    return Sum(*xs) / len(xs)


def Identity(x: Tensor) -> Tensor:
    """The same tensor."""
    return x


def Dropout(
    x: Tensor,
    ratio: Tensor | None = None,
    training_mode: Tensor | None = None,
    *,
    seed: int | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Nothing is dropped: exports run as in inference."""
    if training_mode is not None and bool(training_mode) and (ratio is None or float(ratio)):
        raise NotImplementedError("Dropout in training mode")
    return x if outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))


def Clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Between two bounds; the upper one wins where they cross."""
    if low is None and high is None:
        return x
    least, most = (None if bound is None else number(bound) for bound in (low, high))
    if least is not None and most is not None and least <= most and x.is_floating_point():
        return F.hardtanh(x, least, most)  # its gradient is cheaper than that of clamp
    if (low is None) == (least is None) and (high is None) == (most is None):
        return torch.clamp(x, least, most)
    return torch.clamp(x, low, high)


def Gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit."""
    return F.gelu(x, approximate=approximate)


def LeakyRelu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """A rectifier with a slope below zero."""
    return F.leaky_relu(x, alpha)


def PRelu(x: Tensor, slope: Tensor) -> Tensor:
    """A rectifier with a learned slope below zero."""
    return torch.where(x < 0, x * slope, x)


def Elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """The exponential linear unit."""
    return F.elu(x, alpha)


def Celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """The continuously differentiable exponential linear unit."""
    return F.celu(x, alpha)


def Selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """The scaled exponential linear unit."""
    return gamma * F.elu(x, alpha)


def ThresholdedRelu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Zero up to a threshold."""
    return torch.where(x > alpha, x, 0)


def Shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Zero between two thresholds, moved by ``bias`` outside of them."""
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))


def HardSigmoid(x: Tensor, *, alpha: float = 0.20000000298023224, beta: float = 0.5) -> Tensor:
    """A sigmoid of three straight lines."""
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


def Softplus(x: Tensor) -> Tensor:
    """A smooth rectifier; torch would cut it off at 20, which ONNX does not."""
    return F.softplus(x, threshold=60.0)


def Swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x`` times the sigmoid of ``alpha * x``."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def SwiGLU(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """The Swish of one tensor gates another."""
    return Swish(a, alpha=alpha) * b


def IsInf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where infinities of the wanted signs are."""
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if not detect_negative and not detect_positive:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if detect_positive else torch.isneginf(x)


def Cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Another type; float8 saturates instead of overflowing unless told not to."""
    dtype = torch_type(to)
    if dtype in FLOAT8_TYPES or to == ir.DataType.FLOAT4E2M1:
        return x if x.dtype == dtype != torch.float32 else narrowed(x.to(torch.float32), to, saturate=bool(saturate))
    if to in _SHIFTS:  # the bits that a byte has more are dropped
        unsigned, shift = to in (ir.DataType.UINT4, ir.DataType.UINT2), _SHIFTS[to]
        codes = x.to(torch.int32) << 32 - shift
        return ((codes >> 32 - shift) & (2**shift - 1 if unsigned else -1)).to(dtype)
    return x.to(dtype)


_SHIFTS: dict[int, int] = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT2: 2, ir.DataType.UINT2: 2}


def CastLike(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """The type of another tensor."""
    if like.dtype in FLOAT8_TYPES:
        return Cast(x, to=_NUMBERS[like.dtype], saturate=saturate)
    return x.to(like.dtype)


_NUMBERS = {dtype: number for number, dtype in TORCH_TYPES.items() if dtype in FLOAT8_TYPES}
