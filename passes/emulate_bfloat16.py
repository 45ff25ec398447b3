"""Let onnxruntime run a bfloat16 model: in float32, every number rounded to what bfloat16 holds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
# What makes no number that it has not read, or only smaller whole ones, so that there is nothing to round.
EXACT = (
    "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Concat", "Gather",
    "GatherND", "GatherElements", "ScatterND", "ScatterElements", "Expand", "Tile", "Pad", "DepthToSpace",
    "SpaceToDepth", "Where", "Relu", "Neg", "Abs", "Sign", "Max", "Min", "Clip", "MaxPool", "GlobalMaxPool",
    "ReduceMax", "ReduceMin", "TopK", "Trilu", "Dropout", "ConstantOfShape", "If", "Loop", "Scan",
)  # fmt: skip
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "precision", "softmax_precision")


class EmulateBfloat16(InPlacePass):
    """Change every bfloat16 value to float32, and round what ops make.

    Before::

        x bfloat16 ─► Conv ─► y bfloat16

    After::

        x float32 ─► Cast ─► Cast ─► Conv ─► Cast ─► Cast ─► y float32

    onnxruntime has kernels of bfloat16 for hardly any op on a CPU, and numpy has no such type. A Cast to bfloat16 and
    one back leave the numbers that a GPU has in between, which sums in float32 too. Constants stay bfloat16, a Cast to
    float32 behind each, so that nothing of a large model is copied. Inputs and outputs become float32; all values keep
    their names, but constants.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph and the bodies of its nodes."""
        if not graphs.is_bfloat16(model):
            return PassResult(model, False)
        for graph in list(model.graphs()):
            _emulate(graph)
        return PassResult(model, True)


def _emulate(graph: ir.Graph) -> None:
    nodes, names = list(graph), graphs.Names(graph)
    for value in [*graph.inputs, *graph.initializers.values()]:
        if value.dtype != BFLOAT16:
            continue
        is_input = not value.is_initializer()
        if is_input:
            value.type = ir.TensorType(FLOAT)
        readers = graphs.consumers(value)
        made, read = _casts(value, (BFLOAT16, FLOAT) if is_input else (FLOAT,), names)
        graph.insert_before(nodes[0], made)
        for node, index in readers:
            node.replace_input_with(index, read)
    for node in nodes:
        _change_attributes(node)
        for value in node.outputs:
            if value.dtype == BFLOAT16:
                value.type = ir.TensorType(FLOAT)
                if not graphs.is_op(node, *EXACT):
                    _round(graph, node, value, names)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, names: graphs.Names) -> None:
    """Let all that reads a value read it rounded, under its name."""
    readers, name = graphs.consumers(value), value.name or ""
    value.name = names.free(f"{name}_unrounded")
    made, rounded = _casts(value, (BFLOAT16, FLOAT), names)
    rounded.name = name
    graph.insert_after(node, made)
    for reader, index in readers:
        reader.replace_input_with(index, rounded)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = rounded


def _casts(value: ir.Value, types: tuple[ir.DataType, ...], names: graphs.Names) -> tuple[list[ir.Node], ir.Value]:
    tape = ir.tape.Tape()
    last = value
    for dtype in types:
        last, shape = tape.op("Cast", [last], {"to": dtype}), value.shape
        last.name = tape.nodes[-1].name = names.free(f"{value.name}_{dtype.name.lower()}")
        last.dtype, last.shape = dtype, shape
    return list(tape.nodes), last


def _change_attributes(node: ir.Node) -> None:
    for name in TYPE_ATTRIBUTES:
        if node.attributes.get_int(name, 0) == BFLOAT16:
            node.attributes[name] = ir.AttrInt64(name, int(FLOAT))
    held = node.attributes.get("value")
    if held is not None and held.type == ir.AttributeType.TENSOR and held.as_tensor().dtype == BFLOAT16:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(held.as_tensor().numpy().astype(np.float32)))
