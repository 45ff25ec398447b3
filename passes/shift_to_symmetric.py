"""Turn zero points of activations into a shift before the codes and a bias behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.arithmetic import dequantize
from onnxq.folding import array_of, new_initializer
from onnxq.passes.insert_qdq import SYMMETRIC

Array = np.ndarray[Any, Any]


class ShiftToSymmetric(InPlacePass):
    """Give activations symmetric codes for zero points; their codes stay, but for the offset between them.

    Before::

        x ─► Q/DQ(step s, zero point z) ─► Conv(W, b, pads)

    After, with c = s·z and k(o) = c · ΣW[o]::

        x ─► Add(c) ─► Pad(c, pads) ─► Q/DQ(s, 0) ─► Conv(W, b - k, no pads)

    A SiLU's output lies in [-0.28, h]. Codes around 0, as TensorRT has them, leave nearly half of their values to
    [-h, -0.28], where nothing is; with a zero point they lie twice as dense. k is that of the weights as their codes
    mean them, so that it takes back exactly what the shift adds, and what was padded with 0 is padded with c: the
    border is exact too. A MatMul takes k back by an Add, or in the bias that is added to it anyway. Runs when weights
    are codes; :func:`shiftable_readers` says which quantizers may have a zero point at all.

    Attributes:
        shifted: Names of the values that got an Add.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shifted: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        """Shift every value whose zero point is not 0."""
        shared: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph:
            if graphs.is_quantize(node) and not graphs.is_constant(node.inputs[0]):
                scale = node.inputs[1]
                assert scale is not None
                shared.setdefault(scale, []).append(node)
        for quantizers in shared.values():
            readers = [shiftable_readers(node) for node in quantizers]
            zero_point = quantizers[0].inputs[2]
            if zero_point is None or zero_point.dtype != ir.DataType.INT8 or not all(readers):
                continue
            if graphs.is_constant(zero_point) and array_of(zero_point).any():
                for node, layers in zip(quantizers, readers, strict=True):
                    self.shifted.append(_shift(model.graph, node, layers))
                zero_point.const_value = ir.Tensor(np.zeros_like(array_of(zero_point)), name=zero_point.name)
        return PassResult(model, bool(self.shifted))


def shiftable_readers(quantize: ir.Node) -> list[layer_nodes.WeightedNode]:
    """The layers that read an activation quantizer, or none if one of its readers has no bias to take a shift back."""
    found = []
    for pair, _ in graphs.consumers(quantize.outputs[0]):
        if not graphs.is_dequantize(pair) or pair.outputs[0].is_graph_output():
            return []
        for reader, index in graphs.consumers(pair.outputs[0]):
            item = layer_nodes.weighted(reader)
            if item is None or index != item.activation_index or not _is_shiftable(item):
                return []
            found.append(item)
    return found


def _is_shiftable(item: layer_nodes.WeightedNode) -> bool:
    node = item.node
    weight = None if item.weight is None else _source(item.weight)
    if item.weight_index != 1 or weight is None or not graphs.is_constant(weight) or weight.const_value is None:
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


def _source(weight: ir.Value) -> ir.Value | None:
    """The initializer behind Q/DQ."""
    value: ir.Value | None = weight
    while value is not None and (graphs.is_dequantize(value.producer()) or graphs.is_quantize(value.producer())):
        producer = value.producer()
        value = None if producer is None else producer.inputs[0]
    return value


def _numbers(item: layer_nodes.WeightedNode) -> Array:
    """The layer's weight as its codes mean it."""
    assert item.weight is not None
    producer = item.weight.producer()
    if producer is None:
        return array_of(item.weight).astype(np.float64)
    codes, scale, zero_point = producer.inputs[:3]
    assert codes is not None and scale is not None and scale.const_value is not None
    per_tensor = scale.const_value.size == 1 and not scale.const_value.shape
    return dequantize(
        array_of(codes),
        array_of(scale),
        array_of(zero_point),
        axis=None if per_tensor else producer.attributes.get_int("axis", 1),
        block_size=producer.attributes.get_int("block_size", 0) or None,
    ).astype(np.float64)


def _shift(graph: ir.Graph, quantize: ir.Node, layers: Sequence[layer_nodes.WeightedNode]) -> str:
    value, scale, zero_point = quantize.inputs[:3]
    assert value is not None
    name, dtype = value.name or "", value.dtype or ir.DataType.FLOAT
    step = array_of(scale)
    number = new_initializer(graph, f"{name}_shift", (step * array_of(zero_point)).astype(dtype.numpy()), dtype)
    exact = float(array_of(number))
    add = ir.Node("", "Add", [value, number], name=f"{name}_to_symmetric")
    graph.insert_before(quantize, [_described(add, f"{name}_shifted", value, value.shape)])
    quantize.replace_input_with(0, add.outputs[0])
    quantize.metadata_props[SYMMETRIC] = "1"
    unpadded = [layer for layer in layers if not any(_pads(layer))]
    pair = next(node for node, _ in graphs.consumers(quantize.outputs[0]))
    for number_of_pads, pads in enumerate(sorted({_pads(layer) for layer in layers if any(_pads(layer))})):
        source = _padded(graph, add.outputs[0], pads, number, quantize)
        if not unpadded and number_of_pads == 0:
            quantize.replace_input_with(0, source)
            quantize.outputs[0].shape = pair.outputs[0].shape = source.shape
            codes = pair.outputs[0]
        else:
            codes = _quantized_again(graph, quantize, pair, source, number_of_pads)
        for layer in layers:
            if _pads(layer) == pads:
                layer.node.replace_input_with(layer.activation_index, codes)
                layer.node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
    for layer in layers:
        _take_back(graph, layer, exact)
    return name


def _pads(layer: layer_nodes.WeightedNode) -> tuple[int, ...]:
    return tuple(layer.node.attributes.get_ints("pads", ())) if layer.node.op_type == "Conv" else ()


def _quantized_again(graph: ir.Graph, quantize: ir.Node, pair: ir.Node, value: ir.Value, number: int) -> ir.Value:
    """The same codes for a value with other borders."""
    source, last = value, pair
    for node in (quantize, pair):
        copy = ir.Node(
            "", node.op_type, [source, *node.inputs[1:]], node.attributes.values(), name=f"{node.name}_pad{number}"
        )
        copy.metadata_props.update(node.metadata_props)
        graph.insert_after(
            last, [_described(copy, f"{node.outputs[0].name}_pad{number}", node.outputs[0], value.shape)]
        )
        source, last = copy.outputs[0], copy
    return source


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


def _take_back(graph: ir.Graph, layer: layer_nodes.WeightedNode, shift: float) -> None:
    """Subtract what the layer makes of the shift, in its bias or behind it."""
    node, weight = layer.node, layer.weight
    assert weight is not None and weight.dtype is not None
    kernel = _numbers(layer)
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
