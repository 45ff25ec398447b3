"""Number formats: which codes there are, and what holds them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxq.errors import OnnxqError

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class NumberFormat:
    """A set of representable codes and the ONNX data type that holds them.

    Attributes:
        name: As spelled on the command line, for example ``int8`` or ``fp8``.
        bits: Width of a code; may be less than the width of the container.
        storage: The ONNX data type of the codes (int6 lives in INT8, int3 in INT4).
        low: Smallest code.
        high: Largest code.
    """

    name: str
    bits: int
    storage: ir.DataType
    low: float
    high: float

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers themselves (fp8, fp4)."""
        return self.name.startswith("fp")

    @property
    def has_block_scales(self) -> bool:
        """Whether codes come in blocks whose scales are FP8 (see :mod:`onnxq.block_scales`)."""
        return self.name == "fp4"

    @property
    def is_passthrough(self) -> bool:
        """Whether the format means: leave this tensor alone."""
        return self.name == "float"

    @property
    def signed(self) -> bool:
        """Whether codes below zero exist."""
        return self.low < 0

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy data type of the container (from ml_dtypes where numpy has none)."""
        return self.storage.numpy()

    @property
    def fills_container(self) -> bool:
        """Whether the container saturates where the format does; if not, a Clip has to do it in the graph."""
        return self.is_float or self.is_passthrough or self.bits == self.storage.bitwidth


def _integer(bits: int, storage: ir.DataType, *, signed: bool = True) -> NumberFormat:
    low = -(1 << bits - 1) if signed else 0
    return NumberFormat(f"{'' if signed else 'u'}int{bits}", bits, storage, low, low + (1 << bits) - 1)


_INT8, _INT4, _UINT8, _UINT4 = ir.DataType.INT8, ir.DataType.INT4, ir.DataType.UINT8, ir.DataType.UINT4

FORMATS: dict[str, NumberFormat] = {
    number_format.name: number_format
    for number_format in (
        *(_integer(bits, _INT4) for bits in (2, 3, 4)),
        *(_integer(bits, _INT8) for bits in (5, 6, 7, 8)),
        _integer(16, ir.DataType.INT16),
        *(_integer(bits, _UINT4, signed=False) for bits in (2, 3, 4)),
        *(_integer(bits, _UINT8, signed=False) for bits in (5, 6, 7, 8)),
        _integer(16, ir.DataType.UINT16, signed=False),
        NumberFormat("fp8", 8, ir.DataType.FLOAT8E4M3FN, -448.0, 448.0),
        NumberFormat("fp8_e5m2", 8, ir.DataType.FLOAT8E5M2, -57344.0, 57344.0),
        NumberFormat("fp4", 4, ir.DataType.FLOAT4E2M1, -6.0, 6.0),
        NumberFormat("float", 32, ir.DataType.FLOAT, -math.inf, math.inf),
    )
}
"""Every format by name."""


def one_sided(number_format: NumberFormat) -> NumberFormat:
    """All codes of a signed integer format on the side of zero and above, in the same container.

    Only for widths below the container's: int4 in INT8 has 16 codes either way, and 0 … 15 fit too.
    """
    return dataclasses.replace(FORMATS[f"u{number_format.name}"], storage=number_format.storage)


def parse_format(text: str) -> tuple[NumberFormat, int | None]:
    """Read a format as users spell it.

    Args:
        text: A name, or a name and a block size: ``int8``, ``int4:128``.

    Returns:
        The format and the block size, None when the text has none.

    Raises:
        OnnxqError: The name is unknown or the block size is not a positive whole number.
    """
    name, colon, block = text.strip().lower().partition(":")
    number_format = FORMATS.get(name)
    if number_format is None:
        raise OnnxqError(
            f"expected a number format, found {text!r}",
            hint=f"formats are {', '.join(FORMATS)}; add a block size as in int4:128",
        )
    if not colon:
        return number_format, None
    if number_format.is_passthrough or not (block.isascii() and block.isdigit() and int(block) > 0):
        raise OnnxqError(
            f"expected a block size of at least 1 after the colon of a quantized format, found {text!r}",
            hint="write for example int4:128, or leave the colon out",
        )
    return number_format, int(block)
