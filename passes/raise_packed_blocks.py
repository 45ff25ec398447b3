"""Read products whose weights onnxruntime's own op holds as packed blocks, as Q/DQ in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer
from onnxq.rewriting import InPlaceOf, operand

Codes = NDArray[Any]

# What holds codes of so many bits: around zero, and with zero points.
STORAGES = {
    2: (ir.DataType.INT4, ir.DataType.UINT4),
    4: (ir.DataType.INT4, ir.DataType.UINT4),
    8: (ir.DataType.INT8, ir.DataType.UINT8),
}


class RaisePackedBlocks(InPlacePass):
    """Make a MatMul of a MatMulNBits, as files for onnxruntime-genai and web browsers have them.

    Before::

        x, W (bytes [columns, blocks, codes of a block]), scales [columns, blocks] ─► MatMulNBits ─► y

    After::

        W (int4 [rows, columns]), scales [blocks, columns] ─► DequantizeLinear ─┐
                                                                       x ───────┴► MatMul ─► y
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every one with constant codes and whole zero points."""
        names = graphs.Names(model.graph)
        found = [node for node in model.graph if _is_readable(node)]
        for node in found:
            _raise(model.graph, node, names)
        if found:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(found))


def unpack(codes: Codes, bits: int) -> Codes:
    """The numbers in bytes along the last axis, low bits first: [..., n] becomes [..., 8 / bits · n]."""
    parts = [codes >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*codes.shape[:-1], -1)


def _is_readable(node: ir.Node) -> bool:
    if node.op_type != "MatMulNBits" or node.domain != graphs.ONNXRUNTIME_DOMAIN:
        return False
    zero_points, groups = operand(node, 3), operand(node, 4)
    if groups is not None or node.attributes.get_int("bits", 4) not in STORAGES:
        return False
    if node.attributes.get_int("weight_prepacked", 0):
        return False
    if zero_points is not None and (zero_points.dtype != ir.DataType.UINT8 or not graphs.is_constant(zero_points)):
        return False
    return all(graphs.is_constant(value) for value in node.inputs[1:3])


def _raise(graph: ir.Graph, node: ir.Node, names: graphs.Names) -> None:
    rows, columns, bits, size = (node.attributes.get_int(name, 0) for name in ("K", "N", "bits", "block_size"))
    bits = bits or 4
    blocks = -(-rows // size)
    packed, scales = array_of(node.inputs[1]).reshape(columns, blocks, -1), node.inputs[2]
    codes = unpack(packed, bits).reshape(columns, -1)[:, :rows].T
    middle, zero_points = 1 << bits - 1, operand(node, 3)
    zeros = np.full((columns, blocks), middle, np.uint8)
    if zero_points is not None:
        zeros = unpack(array_of(zero_points).reshape(columns, -1), bits)[:, :blocks]
    around_zero = bool((zeros == middle).all())
    storage = STORAGES[bits][0 if around_zero else 1]
    name, float_type = node.inputs[1].name, scales.dtype  # type: ignore[union-attr]
    assert float_type is not None

    def stored(ending: str, array: Codes, dtype: ir.DataType) -> ir.Value:
        return new_initializer(graph, f"{name}_{ending}", array.astype(dtype.numpy()), dtype, names)

    numbers = codes.astype(np.int16) - (middle if around_zero else 0)
    parameters = [stored("codes", numbers, storage)]
    steps = np.ascontiguousarray(array_of(scales).reshape(columns, blocks).T)
    parameters.append(new_initializer(graph, f"{name}_steps", steps, float_type, names))
    if not around_zero:
        parameters.append(stored("zeros", zeros.T, storage))
    whole = InPlaceOf(graph, node, names)
    weight = whole.op("weight", "DequantizeLinear", parameters, {"axis": 0, "block_size": size})
    weight.type, weight.shape = ir.TensorType(float_type), ir.Shape((rows, columns))
    result = whole.main("MatMul", [node.inputs[0], weight])
    bias = operand(node, 5)
    whole.take_over(result if bias is None else whole.op("sum", "Add", [result, bias]))
