"""Identity nodes that nothing needs, out of a graph."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxq import graph as graphs

NEEDED = "onnxq.Identity"  # an op type that the library's pass leaves alone


def eliminate(model: ir.Model) -> None:
    """Remove Identity nodes, but for those that make an output out of something that cannot be it itself.

    onnx_ir's pass gives the input of such a node the output's name. Where that input is an output already, of this
    graph or, for a branch of If, of the graph around it, two outputs would become one; a branch may not return a value
    of the graph around it either.
    """
    needed = [
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if graphs.is_op(node, "Identity") and _is_needed(node)
    ]
    for node in needed:
        node.op_type = NEEDED
    common_passes.IdentityEliminationPass()(model)
    for node in needed:
        node.op_type = "Identity"


def _is_needed(node: ir.Node) -> bool:
    value, output = node.inputs[0], node.outputs[0]
    if value is None or not output.is_graph_output():
        return False
    producer = value.producer()
    others = (
        reader for reader, _ in graphs.consumers(value) if graphs.is_op(reader, "Identity") and reader is not node
    )
    return (
        producer is None
        or producer.graph is not node.graph
        or value.is_graph_output()
        or any(other.outputs[0].is_graph_output() for other in others)
    )
