"""What ops share: operands as Python numbers, and torch's types of ONNX's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxq.errors import OnnxqError

TORCH_TYPES: dict[int, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT4E2M1: torch.float32,
}
"""The type that holds each ONNX type; integers narrower than a byte live in bytes, 4-bit floats in float32."""

FLOAT8_TYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def torch_type(number: int) -> torch.dtype:
    """The torch type of an ONNX data type's number."""
    if number not in TORCH_TYPES:
        raise NotImplementedError(f"torch has no type for ONNX data type {ir.DataType(number).name}")
    return TORCH_TYPES[number]


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """A copy of an ONNX tensor of numbers, in the type that holds it here."""
    dtype = TORCH_TYPES.get(tensor.dtype)
    if dtype is None:
        raise OnnxqError(
            f"expected a tensor of numbers, found {tensor.dtype.name} in {tensor.name!r}", hint="torch has no such type"
        )
    array = tensor.numpy()
    if (dtype.is_floating_point and array.dtype.kind != "f") or dtype == torch.bfloat16 or dtype in FLOAT8_TYPES:
        return torch.from_numpy(array.astype(np.float32)).to(dtype)  # numpy's extension types are unknown to torch
    plain = {torch.int8: np.int8, torch.uint8: np.uint8}.get(dtype)
    return torch.from_numpy(np.array(array if plain is None else array.astype(plain)))


def narrowed(x: Tensor, number: int, *, saturate: bool = True) -> Tensor:
    """``x`` rounded to a float of 8 or 4 bits, half to even; too large a value becomes the largest one or overflows."""
    if number == ir.DataType.FLOAT4E2M1:
        size = x.abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
        return torch.nan_to_num((x.clamp(-6, 6) / step).round() * step, 0.0)  # there is no NaN
    dtype = torch_type(number)
    largest = torch.finfo(dtype).max
    narrow = x.clamp(-largest, largest).to(dtype)
    if saturate:
        return narrow
    # Above the middle between the largest value and the next one, if there were one. Only E5M2 has infinities.
    tie = {torch.float8_e4m3fn: 464.0, torch.float8_e5m2: 61440.0}.get(dtype, largest)
    overflow = torch.copysign(torch.full_like(x, math.inf if dtype == torch.float8_e5m2 else math.nan), x)
    over = x.abs() >= tie if dtype == torch.float8_e5m2 else x.abs() > tie
    return torch.where(over, overflow, narrow.to(x.dtype)).to(dtype)


def ints(operand: Tensor | Sequence[int]) -> list[int]:
    """A shape, axes or pads operand as Python integers."""
    if isinstance(operand, Tensor):
        values = operand.tolist()
        return [int(value) for value in values] if isinstance(values, list) else [int(values)]
    return [int(value) for value in operand]


def number(operand: Tensor) -> float | None:
    """A lone value that needs no gradient as a Python number; None if torch has to compute with the tensor.

    Asking a GPU for a value would wait for it, and a value that ``torch.func.vmap`` batches is many.
    """
    if operand.numel() != 1 or operand.requires_grad or operand.device.type != "cpu":
        return None
    if torch._C._functorch.is_batchedtensor(operand):
        return None
    return operand.item()


def leading(operand: Tensor | None) -> Tensor | None:
    """A per-channel parameter as ``[channels]``, whatever ones surround it."""
    return None if operand is None else operand.flatten()


def positive(index: Tensor, size: int) -> Tensor:
    """Indices counted from the start; ONNX counts negative ones from the end."""
    return torch.where(index < 0, index + size, index)
