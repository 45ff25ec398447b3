"""Move one-sided activations to the middle of a symmetric range, and take the shift back in the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer

Array = np.ndarray[Any, Any]

SHIFTED = "onnxq.shifted"  # on the layers that read a shifted value: a second shift would undo the first


class ShiftToSymmetric(InPlacePass):
    """Add a number to some values before the layers that read them; the function stays as it was.

    Before::

        x ─► Conv(W, b, pads)

    After, with k(o) = c · ΣW[o]::

        x ─► Add(c) ─► Pad(c, pads) ─► Conv(W, b - k, no pads)

    A SiLU's output lies in [-0.28, h]. Symmetric codes, as TensorRT has them, leave nearly half of their values to
    [-h, -0.28], where nothing is. With c = (0.28 - h) / 2 the range is symmetric and half as wide. What was padded with
    0 is padded with c, so that borders are exact too. A MatMul takes k back by an Add, or in the bias that is added to
    it anyway. Other readers of x keep it.

    Args:
        shifts: c by the name of the value; what no layer with a constant weight reads is left alone.

    Attributes:
        shifted: Names of the values that got an Add.
    """

    def __init__(self, shifts: Mapping[str, float]) -> None:
        super().__init__()
        self.shifts = dict(shifts)
        self.shifted: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        """Shift every value once."""
        readers: dict[ir.Value, list[graphs.WeightedNode]] = {}
        for item in shiftable_layers(model.graph):
            if self.shifts.get(item.activation.name or ""):
                readers.setdefault(item.activation, []).append(item)
        for value, layers in readers.items():
            _shift(model.graph, value, layers, self.shifts[value.name or ""])
            self.shifted.append(value.name or "")
        return PassResult(model, bool(self.shifted))


def shiftable_layers(graph: ir.Graph) -> list[graphs.WeightedNode]:
    """The layers whose input can be shifted: those with a float constant weight on the right and a bias to change."""
    return [item for item in graphs.weighted_nodes(graph) if _is_shiftable(item)]


def _is_shiftable(item: graphs.WeightedNode) -> bool:
    node, weight = item.node, item.weight
    if item.weight_index != 1 or not graphs.is_constant(weight) or weight is None or weight.const_value is None:
        return False
    if not graphs.is_float(weight) or not graphs.is_float(item.activation) or SHIFTED in node.metadata_props:
        return False
    if node.op_type == "MatMul":
        return graphs.rank(weight) == 2
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (not graphs.is_constant(bias) or bias.const_value is None):
        return False
    if node.op_type == "Gemm":
        return node.attributes.get_float("beta", 1.0) != 0
    # How much SAME pads follows from the size of the input, which need not be known.
    return node.op_type == "Conv" and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _shift(graph: ir.Graph, value: ir.Value, layers: list[graphs.WeightedNode], shift: float) -> None:
    dtype = value.dtype or ir.DataType.FLOAT
    number = new_initializer(graph, f"{value.name}_shift", np.asarray(shift, dtype.numpy()), dtype)
    exact = float(array_of(number))  # what is really added, where the value is float16
    add = ir.Node("", "Add", [value, number], name=f"{value.name}_to_symmetric")
    first = next(node for node in graph if any(node is layer.node for layer in layers))
    graph.insert_before(first, [_described(add, f"{value.name}_shifted", value, value.shape)])
    padded: dict[tuple[int, ...], ir.Value] = {}
    for layer in layers:
        source = add.outputs[0]
        pads = tuple(layer.node.attributes.get_ints("pads", ())) if layer.node.op_type == "Conv" else ()
        if any(pads):
            if pads not in padded:
                padded[pads] = _padded(graph, source, pads, number, first)
            source = padded[pads]
            layer.node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
        layer.node.replace_input_with(layer.activation_index, source)
        _take_back(graph, layer, exact)
        layer.node.metadata_props[SHIFTED] = "1"


def _padded(graph: ir.Graph, value: ir.Value, pads: tuple[int, ...], number: ir.Value, before: ir.Node) -> ir.Value:
    """The value with its spatial axes padded by what a 0 has become."""
    half = len(pads) // 2
    amounts = np.asarray([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
    widths = new_initializer(graph, f"{value.name}_pads", amounts, ir.DataType.INT64)
    node = ir.Node("", "Pad", [value, widths, number], name=f"{value.name}_pad{''.join(map(str, pads))}")
    shape = None
    if value.shape is not None:
        sizes: list[Any] = list(value.shape)
        for axis, (begin, end) in enumerate(zip(pads[:half], pads[half:], strict=True), start=2):
            sizes[axis] = sizes[axis] + begin + end if isinstance(sizes[axis], int) else None
        shape = ir.Shape(sizes)
    graph.insert_before(before, [_described(node, f"{node.name}_out", value, shape)])
    return node.outputs[0]


def _take_back(graph: ir.Graph, layer: graphs.WeightedNode, shift: float) -> None:
    """Subtract what the layer makes of the shift, in its bias or behind it."""
    node, weight = layer.node, layer.weight
    assert weight is not None and weight.dtype is not None
    kernel = array_of(weight).astype(np.float64)
    constant = shift * kernel.sum(axis=tuple(axis for axis in range(kernel.ndim) if axis != layer.channel_axis))
    if node.op_type == "MatMul":
        _subtract_behind(graph, node, constant, weight.dtype)
        return
    if node.op_type == "Gemm":
        constant *= node.attributes.get_float("alpha", 1.0) / node.attributes.get_float("beta", 1.0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    new = (0.0 if bias is None else array_of(bias).astype(np.float64)) - constant
    node.resize_inputs(3)
    changed = new_initializer(graph, f"{node.name}_bias_shifted", new.astype(weight.dtype.numpy()), weight.dtype)
    node.replace_input_with(2, changed)
    if bias is not None and not bias.uses():
        graph.initializers.pop(bias.name or "", None)


def _subtract_behind(graph: ir.Graph, node: ir.Node, constant: Array, dtype: ir.DataType) -> None:
    output = node.outputs[0]
    readers = graphs.consumers(output)
    if len(readers) == 1 and graphs.is_op(readers[0][0], "Add") and not output.is_graph_output():
        reader, index = readers[0]
        bias = reader.inputs[1 - index]
        if bias is not None and graphs.is_constant(bias) and array_of(bias).shape == constant.shape:
            new = (array_of(bias).astype(np.float64) - constant).astype(dtype.numpy())
            reader.replace_input_with(1 - index, new_initializer(graph, f"{bias.name}_shifted", new, dtype))
            return
    term = new_initializer(graph, f"{node.name}_shift", (-constant).astype(dtype.numpy()), dtype)
    add = ir.Node("", "Add", [output, term], name=f"{node.name}_unshift")
    graph.insert_after(node, [_described(add, f"{output.name}_unshifted", output, output.shape)])
    replaced = add.outputs[0]
    for reader, index in readers:
        reader.replace_input_with(index, replaced)
    if output.is_graph_output():
        position = next(index for index, item in enumerate(graph.outputs) if item is output)
        graph.outputs[position] = replaced
        output.name, replaced.name = f"{output.name}_with_shift", output.name


def _described(node: ir.Node, name: str, like: ir.Value, shape: ir.Shape | None) -> ir.Node:
    """The node, with its output named and typed."""
    value = node.outputs[0]
    value.name, value.type, value.shape = name, like.type, shape
    return node
