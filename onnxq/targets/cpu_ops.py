"""Which ops onnxruntime's CPU provider runs on codes."""

from __future__ import annotations

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.passes.pad_codes import pads_with_zero

# One kernel each between DequantizeLinear and QuantizeLinear.
ARITHMETIC = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid")

# Of those, what shortcuts end in.
STREAMS = ("Add", "Concat")

# Several kernels, once it is taken apart: see passes/lower_hard_swish.py.
TAKEN_APART = ("HardSwish",)

# The codes pass through unchanged, so input and output share one scale.
DATA_MOVEMENT = (
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand", "Tile",
    "DepthToSpace",
)  # fmt: skip

# Absorbed into the QuantizeLinear that follows, because its range does not leave theirs.
ABSORBED = ("Relu", "Clip")


def moves_data(node: ir.Node) -> bool:
    """Whether the node passes codes on unchanged (a zero Pad does, once it is moved to their side)."""
    if graphs.is_op(node, "Resize"):
        return node.attributes.get_string("mode", "nearest") == "nearest"
    return graphs.is_op(node, *DATA_MOVEMENT) or pads_with_zero(node)


def hands_on_codes(node: ir.Node) -> bool:
    """Whether the node can read codes and give codes."""
    return graphs.is_op(node, *ARITHMETIC, *TAKEN_APART, *ABSORBED) or moves_data(node)


def after_activation(node: ir.Node) -> ir.Value:
    """The node's output, or that of the Relu or Clip that is its only reader."""
    output = node.outputs[0]
    readers = graphs.consumers(output)
    if len(readers) == 1 and not output.is_graph_output() and graphs.is_op(readers[0][0], *ABSORBED):
        reader = readers[0][0]
        if all(value is None or graphs.is_constant(value) for value in reader.inputs[1:]):
            return reader.outputs[0]
    return output
