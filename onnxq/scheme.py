"""A scheme: which number format, granularity and symmetry weights and activations get."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxq import block_scales
from onnxq.errors import OnnxqError
from onnxq.formats import NumberFormat, parse_format

GRANULARITIES = ("tensor", "channel", "block")
DYNAMIC = "dynamic"  # how users spell bytes whose range is found while the model runs


@dataclass(frozen=True)
class Spec:
    """How one kind of tensor is quantized.

    Attributes:
        format: The number format.
        granularity: ``tensor`` (one scale), ``channel`` (one per output channel) or ``block``.
        symmetric: Whether the zero point is the middle of the format.
        block_size: Elements along the reduction axis that share a scale, for ``block``.
        dynamic: Whether the model finds the range itself while it runs, from the tensor that it has at hand.
        signed_scales: Whether kernels read scales of blocks below zero (see :mod:`onnxq.calibration.signed_scales`).
    """

    format: NumberFormat
    granularity: str = "tensor"
    symmetric: bool = True
    block_size: int | None = None
    dynamic: bool = False
    signed_scales: bool = False

    @property
    def enabled(self) -> bool:
        """Whether anything is quantized at all (``float`` means no)."""
        return not self.format.is_passthrough

    @property
    def is_calibrated(self) -> bool:
        """Whether its range has to be known before the model runs."""
        return self.enabled and not self.dynamic

    def __str__(self) -> str:
        in_blocks = self.format.has_block_scales  # also of activations, beside one range for the tensor
        block_size = block_scales.BLOCK if in_blocks else self.block_size
        text = f"{self.format.name}{f':{block_size}' if block_size else ''}"
        if not self.enabled:
            return text
        return f"{text} per {'block' if in_blocks else self.granularity}{', dynamic' if self.dynamic else ''}"


@dataclass(frozen=True)
class Scheme:
    """What weights and activations become."""

    weights: Spec
    activations: Spec


def parse_weights(text: str, *, symmetric: bool = True) -> Spec:
    """Weights are per channel unless the name says otherwise: ``int8``, ``int4:128`` (blocks), ``int8:tensor``.

    ``fp4`` means blocks of 16, which are part of the format that hardware has (NVFP4).
    """
    name, _, ending = text.strip().lower().partition(":")
    if ending == "tensor":
        return replace(parse_weights(name, symmetric=symmetric), granularity="tensor", block_size=None)
    number_format, block_size = parse_format(text)
    if number_format.has_block_scales:
        block_size = block_size or block_scales.BLOCK
    if number_format.name.startswith("u") and symmetric:
        symmetric = False
    spec = Spec(number_format, "channel", symmetric)
    return spec if block_size is None else replace(spec, granularity="block", block_size=block_size)


def parse_activations(text: str) -> Spec:
    """Activations have one scale per tensor; unsigned formats are asymmetric.

    ``dynamic`` means what ONNX's DynamicQuantizeLinear makes: uint8, over the range that the tensor has.
    """
    if text.strip().lower() == DYNAMIC:
        return Spec(parse_format("uint8")[0], "tensor", symmetric=False, dynamic=True)
    number_format, block_size = parse_format(text)
    if block_size is not None:
        raise OnnxqError(
            f"expected an activation format without a block size, found {text!r}",
            hint=f"use --activations {number_format.name}; blocks are for weights",
        )
    # No kernel reads 4-bit activations.
    wider = {ir.DataType.INT4: ir.DataType.INT8, ir.DataType.UINT4: ir.DataType.UINT8}
    number_format = replace(number_format, storage=wider.get(number_format.storage, number_format.storage))
    return Spec(number_format, "tensor", symmetric=not number_format.name.startswith("u"))


def for_integer_products(weights: Spec) -> Spec:
    """The weights of a product of integers: both operands are 8 bits wide, so narrow codes take an INT8 container."""
    if weights.format.storage != ir.DataType.INT4:
        return weights
    if weights.block_size is not None:
        raise OnnxqError(
            f"expected weights without blocks beside quantized activations, found {weights}",
            hint=f"use --activations float (weights only), or --weights {weights.format.name}",
        )
    return replace(weights, format=replace(weights.format, storage=ir.DataType.INT8))
