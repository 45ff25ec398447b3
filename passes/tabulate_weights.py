"""Store weights as indices into a table of levels, or as the integers nearest to those levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.calibration.calibrate import rows_of, set_weight_scales
from onnxq.folding import array_of, new_initializer
from onnxq.formats import parse_format
from onnxq.learning.channel_scales import round_matrix
from onnxq.passes.insert_qdq import FORMAT
from onnxq.scheme import Spec
from onnxq.weights.tables import Table

Array = np.ndarray[Any, Any]
STORAGES = ("table", "int8")
INT8 = Spec(parse_format("int8")[0], "channel", True)


class TabulateWeights(InPlacePass):
    """Give weights the levels of tables, once Q/DQ pairs are in.

    Before::

        W (float) ─► QuantizeLinear ─► DequantizeLinear ─► Conv

    After, with ``table``: exact, small in the file, and float in the kernel; runtimes decode it when they load it::

        codes (uint4 or uint8) ─► Cast ─► Gather(levels) ─► Mul(scale) ─► Conv

    After, with ``int8``: the same values, rounded once more to 8 bits, for integer kernels::

        W' (float) ─► QuantizeLinear ─► DequantizeLinear ─► Conv

    Args:
        tables: The table of each weight and the scale of its rows, by the weight's name.
        storage: ``table`` or ``int8``.
        packed: Whether two codes of a narrow table share a byte; not every runtime reads such constants.
    """

    def __init__(self, tables: Mapping[str, tuple[Table, Array]], storage: str, *, packed: bool = True) -> None:
        super().__init__()
        self.tables = dict(tables)
        self.storage = storage
        self.packed = packed

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the weights that have a table."""
        modified = False
        for node in list(model.graph):
            weight = node.inputs[0] if graphs.is_quantize(node) else None
            if weight is None or weight.name not in self.tables or not graphs.is_constant(weight):
                continue
            table, scale = self.tables[weight.name]
            if self.storage == "table":
                _store(model.graph, node, table, scale, self.packed)
            else:
                name, dtype = f"{weight.name}_levelled", weight.dtype or ir.DataType.FLOAT
                levelled = new_initializer(model.graph, name, self.rounded(node, array_of(weight)), dtype)
                node.replace_input_with(0, levelled)
                node.metadata_props[FORMAT] = "int8"
            modified = True
        if modified and self.storage != "table":
            set_weight_scales(model)
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)

    def rounded(self, node: ir.Node, weight: Array) -> Array:
        """What the stored weight will mean, of a model that was not rewritten yet.

        Args:
            node: The weight's quantizer.
            weight: Its weight, which comes back as it is where it has no table.
        """
        value = node.inputs[0]
        if value is None or value.name not in self.tables:
            return weight
        table, scale = self.tables[value.name]
        rows, shape, axis = _layout(node)
        levelled = table.rounded(rows, scale)
        if self.storage == "int8":
            levelled = round_matrix(levelled, INT8)
        return _unrolled(levelled, shape, axis).astype(weight.dtype)


def _layout(node: ir.Node) -> tuple[Array, tuple[int, ...], int]:
    """The weight as rows that share a scale, its shape, and the axis of the rows (−1: one row)."""
    weight, scale = node.inputs[:2]
    assert weight is not None and weight.const_value is not None and scale is not None and scale.const_value is not None
    array = weight.const_value.numpy()
    shape = scale.const_value.numpy().shape
    axis = node.attributes.get_int("axis", 1) if shape else -1
    return rows_of(array, shape, node), array.shape, axis


def _unrolled(rows: Array, shape: tuple[int, ...], axis: int) -> Array:
    """The inverse of the layout in rows."""
    if axis < 0:
        return rows.reshape(shape)
    rest = [size for index, size in enumerate(shape) if index != axis]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(shape[axis], *rest), 0, axis))


def _store(graph: ir.Graph, node: ir.Node, table: Table, scale: Array, packed: bool) -> None:
    weight, output = node.inputs[0], graphs.consumers(node.outputs[0])[0][0].outputs[0]
    assert weight is not None
    dtype = weight.dtype or ir.DataType.FLOAT
    rows, shape, axis = _layout(node)
    codes = _unrolled(table.codes(rows, scale), shape, axis)
    container = ir.DataType.UINT4 if packed and len(table.levels) <= 16 else ir.DataType.UINT8
    spread = scale.reshape([-1 if index == axis else 1 for index in range(len(shape))] if axis >= 0 else ())
    stored = new_initializer(graph, f"{weight.name}_codes", codes.astype(container.numpy()), container)
    levels = new_initializer(graph, f"{weight.name}_levels", table.levels.astype(dtype.numpy()), dtype)
    steps = new_initializer(graph, f"{weight.name}_steps", spread.astype(dtype.numpy()), dtype)
    tape = ir.tape.Tape()
    index = tape.op("Cast", [stored], {"to": ir.DataType.INT32.value})
    decoded = tape.op("Mul", [tape.op("Gather", [levels, index]), steps])
    names = graphs.Names(graph)
    for made, ending in zip(tape.nodes, ("index", "decode", "scale"), strict=True):
        made.name = names.free(f"{weight.name}_{ending}")
        made.outputs[0].name = names.free(f"{weight.name}_{ending}d")
    decoded.type, decoded.shape = output.type, output.shape
    tape.nodes[-1].metadata_props[FORMAT] = f"table of {len(table.levels)}"
    graph.insert_before(node, tape.nodes)
    output.replace_all_uses_with(decoded)
