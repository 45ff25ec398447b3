"""Divide what matrix products read by the largest magnitude of each token, and multiply back behind them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import new_initializer

SMALLEST = 1e-12  # a token of zeros is divided by it
NORMALISED = "onnxq.normalised"  # on the division: no range rule may cut what it makes


class NormaliseTokens(InPlacePass):
    """Let one constant scale quantize every token over its own range.

    Before::

        y = MatMul(x, W)

    After, with t = max|x| over the last axis::

        y = MatMul(x / t, W) · t

    x / t lies in [−1, 1] whatever the token, so that Q/DQ with a scale of 1/127 on it give the codes of symmetric
    token-wise quantization, with a constant scale, which is all that TensorRT compiles. Products that read one value
    share its division. A product with a bias inside is left alone: the bias must not be multiplied.

    Args:
        names: The nodes to rewrite: MatMul, or Gemm without a bias, whose activation is on the left.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = set(names)

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the products."""
        divided: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        modified = False
        for item in list(layer_nodes.weighted_nodes(model.graph)):
            if item.node.name not in self.names or not is_tokenwise(item):
                continue
            value = item.activation
            if value not in divided:
                divided[value] = _divide(model.graph, value)
            normalised, largest = divided[value]
            item.node.replace_input_with(item.activation_index, normalised)
            _multiply(model.graph, item.node, largest)
            modified = True
        return PassResult(model, modified)


def is_tokenwise(item: layer_nodes.WeightedNode) -> bool:
    """Whether a scale for each row of the activation passes through the product."""
    if item.weight_index != 1 or item.node.op_type not in ("MatMul", "Gemm"):
        return False
    transposed = item.node.op_type == "Gemm" and bool(item.node.attributes.get_int("transA", 0))
    has_bias = item.node.op_type == "Gemm" and len(item.node.inputs) > 2 and item.node.inputs[2] is not None
    return not transposed and not has_bias and graphs.is_float(item.activation)


def _divide(graph: ir.Graph, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    dtype = value.dtype or ir.DataType.FLOAT
    axes = new_initializer(graph, f"{value.name}_token_axes", np.asarray([-1]), ir.DataType.INT64)
    smallest = max(SMALLEST, 1e-4 if dtype == ir.DataType.FLOAT16 else 0.0)
    floor = new_initializer(graph, f"{value.name}_token_floor", np.asarray(smallest, dtype.numpy()), dtype)
    tape = ir.tape.Tape()
    largest = tape.op("Max", [tape.op("ReduceMax", [tape.op("Abs", [value]), axes], {"keepdims": 1}), floor])
    normalised = tape.op("Div", [value, largest])
    for node, ending in zip(tape.nodes, ("abs", "max", "scale", "normalised"), strict=True):
        node.name = node.outputs[0].name = f"{value.name}_token_{ending}"
        node.outputs[0].type = ir.TensorType(dtype)
    tape.nodes[-1].metadata_props[NORMALISED] = "1"
    shape = None if value.shape is None else ir.Shape([*list(value.shape)[:-1], 1])
    normalised.shape, largest.shape = value.shape, shape
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, tape.nodes)
    else:
        graph.insert_before(next(iter(graph)), tape.nodes)
    return normalised, largest


def _multiply(graph: ir.Graph, node: ir.Node, largest: ir.Value) -> None:
    output = node.outputs[0]
    name, type_, shape = output.name, output.type, output.shape
    tape = ir.tape.Tape()
    scaled = tape.op("Mul", [output, largest])
    uses = graphs.consumers(output)
    tape.nodes[-1].name = f"{node.name}_token_scale"
    graph.insert_after(node, tape.nodes)
    for reader, index in uses:
        if reader is not tape.nodes[-1]:
            reader.replace_input_with(index, scaled)
    for position, found in enumerate(graph.outputs):
        if found is output:
            graph.outputs[position] = scaled
    output.name, scaled.name = f"{name}_normalised", name
    scaled.type, scaled.shape = type_, shape
