"""Where the bias of a layer is read, for those who correct biases and those who learn them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes


@dataclass(frozen=True)
class BiasPlace:
    """An input that a layer's bias is read by, or can be.

    Attributes:
        node: The layer itself, or an Add behind it.
        index: Of the node's input.
    """

    node: ir.Node
    index: int

    @property
    def value(self) -> ir.Value | None:
        """What is there; ``None``: nothing yet."""
        return self.node.inputs[self.index] if self.index < len(self.node.inputs) else None

    def put(self, value: ir.Value) -> None:
        """Let the node read another bias, or a first one."""
        if self.index >= len(self.node.inputs):
            self.node.resize_inputs(self.index + 1)
        self.node.replace_input_with(self.index, value)


def bias_place(item: layer_nodes.WeightedNode) -> BiasPlace | None:
    """Where a layer's bias is: its own input, or a constant in an Add that alone reads its output.

    ``None`` where there is no place: for a MatMul without such an Add, a Gemm that scales its product or its bias, and
    a weight on the left, whose outputs are rows.
    """
    node = item.node
    if item.weight_index != 1:
        return None
    own = BiasPlace(node, 2)
    if node.op_type == "Conv":
        return own
    is_gemm = node.op_type == "Gemm"
    if is_gemm and any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    if is_gemm and own.value is not None:
        return own
    readers = graphs.consumers(node.outputs[0])
    if len(readers) == 1 and not node.outputs[0].is_graph_output() and graphs.is_op(readers[0][0], "Add"):
        add, index = readers[0]
        if graphs.is_constant(add.inputs[1 - index]):
            return BiasPlace(add, 1 - index)
    return own if is_gemm else None
