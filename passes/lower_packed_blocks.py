"""Write products with weights in blocks in onnxruntime's own op, which browsers and onnxruntime-genai run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer
from onnxq.rewriting import become, operand

Codes = NDArray[Any]

EIGHT_BIT_PRODUCTS = 4  # the accuracy level that onnxruntime takes itself where it fuses such a product
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128
BITS = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT8: 8, ir.DataType.UINT8: 8}


class LowerPackedBlocks(InPlacePass):
    """Make a MatMulNBits of a MatMul or Gemm that reads floats, and a weight as codes.

    Before::

        W (int4 [rows, columns]), scales [blocks, columns] ─► DequantizeLinear ─┐
                                                                       x ───────┴► MatMul ─► y

    After::

        x, W (bytes [columns, blocks, codes of a block]), scales [columns, blocks] ─► MatMulNBits ─► y

    A scale for each channel is that of all its blocks. onnxruntime makes the same of a MatMul when a CPU session is
    opened, but not with weights outside the graph that reads them, not with those that several products read, not
    right before a Relu or Clip, not of a Gemm whose weight is transposed or that has a factor (1.31: these dequantize
    the whole weight in every run), and not for WebGPU.

    Args:
        only_missed: Only those in the main graph that onnxruntime would not make itself.
    """

    def __init__(self, only_missed: bool = False) -> None:
        super().__init__()
        self.only_missed = only_missed

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every one with constant codes."""
        names = graphs.Names(model.graph)
        found = [product for node in model.graph if (product := _product(node)) is not None]
        if self.only_missed:
            found = [product for product in found if not _is_fused(product)]
        packed: dict[tuple[ir.Node, bool, float], _Packed] = {}  # a weight may have several readers
        for product in found:
            key = (product.dequantize, product.is_transposed, product.alpha)
            if key not in packed:
                packed[key] = _pack(model.graph, product, names)
            _replace(product.node, packed[key])
        if found:
            model.graph.opset_imports.setdefault(graphs.ONNXRUNTIME_DOMAIN, 1)
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(found))


def pack(codes: Codes, bits: int) -> Codes:
    """Numbers as bytes along the last axis, low bits first: [..., n] becomes [..., bits / 8 · n], filled up with 0."""
    per_byte = 8 // bits
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)])
    parts = filled.reshape(*codes.shape[:-1], -1, per_byte).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Codes = np.bitwise_or.reduce(parts << shifts, axis=-1)
    return packed


@dataclass(frozen=True)
class _Product:
    """A product that can be written so.

    Attributes:
        node: The MatMul or Gemm.
        dequantize: What makes its weight.
        is_transposed: Whether the weight is [columns, rows].
        alpha: What the product is multiplied by.
    """

    node: ir.Node
    dequantize: ir.Node
    is_transposed: bool
    alpha: float

    @property
    def block_size(self) -> int:
        """Rows of one scale; 0 where a scale is for all."""
        return self.dequantize.attributes.get_int("block_size", 0)

    def by_columns(self, value: ir.Value | None) -> Codes | None:
        """Codes, scales or zero points as [columns, rows] or [columns, blocks]; what all blocks have once."""
        if value is None:
            return None
        array = array_of(value)
        if array.ndim == 2:
            return array if self.is_transposed else array.T
        return array.reshape(-1, 1)


def _product(node: ir.Node) -> _Product | None:
    if not graphs.is_op(node, "MatMul", "Gemm") or graphs.is_dequantized(node.inputs[0]):
        return None  # or integers are multiplied
    weight, bias = node.inputs[1], operand(node, 2)
    dequantize = None if weight is None else weight.producer()
    if dequantize is None or not graphs.is_dequantize(dequantize) or graphs.rank(dequantize.outputs[0]) != 2:
        return None
    if node.attributes.get_int("transA", 0):
        return None
    if bias is not None and (graphs.rank(bias) != 1 or node.attributes.get_float("beta", 1.0) != 1.0):
        return None
    alpha = node.attributes.get_float("alpha", 1.0)
    product = _Product(node, dequantize, bool(node.attributes.get_int("transB", 0)), alpha)
    codes, scales, zero_points = (operand(dequantize, index) for index in range(3))
    if not all(value is None or graphs.is_constant(value) for value in (codes, scales, zero_points)):
        return None
    if codes is None or codes.dtype not in BITS or scales is None or scales.dtype != ir.DataType.FLOAT:
        return None
    size, along = product.block_size, dequantize.attributes.get_int("axis", 1) % 2
    columns = 0 if product.is_transposed else 1
    if size == 0:  # one for each column, or for all
        fits = scales.shape == () or along == columns
    else:
        fits = size >= SMALLEST_BLOCK and size & (size - 1) == 0 and along != columns
    return product if fits else None


def _is_fused(product: _Product) -> bool:
    """Whether onnxruntime makes the product itself."""
    if product.is_transposed or product.alpha != 1 or graphs.only_reader(product.dequantize.outputs[0]) is None:
        return False
    return not any(graphs.is_op(reader, "Relu", "Clip") for reader, _ in graphs.consumers(product.node.outputs[0]))


@dataclass(frozen=True)
class _Packed:
    """Codes, scales and, where they are not what the op takes for granted, zero points; and what the op is told."""

    constants: list[ir.Value | None]
    sizes: dict[str, int]


def _pack(graph: ir.Graph, product: _Product, names: graphs.Names) -> _Packed:
    stored, scales, zero_points = (operand(product.dequantize, index) for index in range(3))
    assert stored is not None and stored.dtype is not None
    bits = BITS[stored.dtype]
    middle = 0 if stored.dtype in (ir.DataType.UINT4, ir.DataType.UINT8) else 1 << bits - 1  # of signed codes
    codes, steps, zeros = map(product.by_columns, (stored, scales, zero_points))
    assert codes is not None and steps is not None
    columns, rows = codes.shape
    size = product.block_size or _dividing(rows)
    blocks = -(-rows // size)
    codes = np.pad(codes.astype(np.int16), [(0, 0), (0, blocks * size - rows)]).reshape(columns, blocks, size)
    of_blocks = [np.broadcast_to(steps, (columns, blocks)), np.zeros((columns, blocks), np.int16)]
    if zeros is not None:
        of_blocks[1] = np.broadcast_to(zeros.astype(np.int16), (columns, blocks))
    name = stored.name or ""
    constants: list[ir.Value | None] = [
        new_initializer(graph, f"{name}_packed", pack(codes + middle, bits), ir.DataType.UINT8, names),
        new_initializer(graph, f"{name}_steps", of_blocks[0] * np.float32(product.alpha), ir.DataType.FLOAT, names),
    ]
    offsets = of_blocks[1] + middle
    if np.any(offsets != 1 << bits - 1):
        constants.append(new_initializer(graph, f"{name}_zeros", pack(offsets, bits), ir.DataType.UINT8, names))
    sizes = {"K": rows, "N": columns, "bits": bits, "block_size": size, "accuracy_level": EIGHT_BIT_PRODUCTS}
    return _Packed(constants, sizes)


def _replace(node: ir.Node, packed: _Packed) -> None:
    inputs, bias = [node.inputs[0], *packed.constants], operand(node, 2)
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    become(node, "MatMulNBits", inputs, graphs.ONNXRUNTIME_DOMAIN)
    node.attributes.clear()
    node.attributes.update({key: ir.AttrInt64(key, number) for key, number in packed.sizes.items()})


def _dividing(rows: int) -> int:
    """The largest block that divides the rows, or the smallest of them where none does."""
    sizes = [size for size in (LARGEST_BLOCK, 64, 32) if rows % size == 0]
    return sizes[0] if sizes else 32
