"""Where the bias of a layer is read, for those who correct biases and those who learn them."""

from __future__ import annotations

import onnx_ir as ir

from onnxq import graph as graphs


def bias_place(item: graphs.WeightedNode) -> tuple[ir.Node, int] | None:
    """The node and the input that a layer's bias is read by, or can be: nothing may be there yet.

    That is the layer's own input, or a constant in an Add that alone reads its output. ``None`` where there is no
    place: for a MatMul without such an Add, a Gemm that scales its product or its bias, and a weight on the left, whose
    outputs are rows.
    """
    node = item.node
    if item.weight_index != 1:
        return None
    if node.op_type == "Conv":
        return node, 2
    is_gemm = node.op_type == "Gemm"
    if is_gemm and any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    if is_gemm and len(node.inputs) > 2 and node.inputs[2] is not None:
        return node, 2
    readers = graphs.consumers(node.outputs[0])
    if len(readers) == 1 and not node.outputs[0].is_graph_output() and graphs.is_op(readers[0][0], "Add"):
        add, index = readers[0]
        if graphs.is_constant(add.inputs[1 - index]):
            return add, 1 - index
    return (node, 2) if is_gemm else None
