"""Make a node of a graph another one, with ops before it, or give it an input of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxq import graph as graphs


class Before:
    """Ops to insert before a node, each with a result of the type and shape of the node's own.

    Args:
        graph: The node's graph.
        node: The node, which is going to read them.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self._tape, self._names = ir.tape.Tape(), graphs.Names(graph)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: float) -> ir.Value:
        """The result of a new op."""
        output, suffix = self.node.outputs[0], op_type.lower()
        made = self._tape.op(op_type, inputs, attributes, name=self._names.free(f"{self.node.name}_{suffix}"))
        made.name = self._names.free(f"{output.name}_{suffix}")
        made.type, made.shape = output.type, output.shape
        return made

    def insert(self) -> None:
        """Put the ops into the graph."""
        self.graph.insert_before(self.node, self._tape.nodes)


def become(node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "") -> None:
    """Make the node another op with other inputs; its outputs, name and attributes stay."""
    node.op_type, node.domain = op_type, domain
    inputs = list(inputs)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def dequantize_apart(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
) -> ir.Node:
    """Give one reader of a DequantizeLinear another one, for itself alone.

    Args:
        graph: The graph.
        node: The reader.
        index: Which of its inputs comes from the DequantizeLinear.
        inputs: What the new one reads.
        attributes: And its attributes.

    Returns:
        The new one.
    """
    shared = node.inputs[index]
    pair = None if shared is None else shared.producer()
    assert shared is not None and pair is not None
    tape = ir.tape.Tape()
    own = tape.op("DequantizeLinear", inputs, attributes, name=f"{pair.name}_{node.name}")
    own.name, own.type, own.shape = f"{shared.name}_{node.name}", shared.type, shared.shape
    tape.nodes[0].metadata_props.update(pair.metadata_props)
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(index, own)
    return tape.nodes[0]
