"""Take out of loops what they only carry around."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs


class FreeInvariants(InPlacePass):
    """Let the body of a Loop or a Scan read from outside what every iteration hands on as it is; the function stays.

    Before::

        Loop(…, h, w):  h, w ─► MatMul(h, w) ─► h', w

    After::

        Loop(…, h):  h ─► MatMul(h, w) ─► h'

    tf2onnx and paddle2onnx carry the weights of recurrent cells so, and a weight that is carried is not known to be
    constant.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Free every variable that no iteration changes."""
        modified = False
        for graph in list(model.graphs()):
            for node in graph:
                if graphs.is_op(node, "Loop", "Scan"):
                    modified |= _free(node)
        return PassResult(model, modified)


def _free(node: ir.Node) -> bool:
    body = node.attributes["body"].as_graph()
    # A loop reads its length and condition first, its body the count and the condition, which it gives back.
    first, first_inside, first_given = (2, 2, 1) if node.op_type == "Loop" else (0, 0, 0)
    carried = len(node.inputs) - first
    if node.op_type == "Scan":
        carried -= node.attributes.get_int("num_scan_inputs", 0)
    free = [
        index
        for index in range(carried)
        if node.inputs[first + index] is not None
        and _source(body.outputs[first_given + index]) is body.inputs[first_inside + index]
        and not node.outputs[index].is_graph_output()
    ]
    for index in reversed(free):
        value, inside = node.inputs[first + index], body.inputs[first_inside + index]
        assert value is not None
        body.outputs.pop(first_given + index)
        inside.replace_all_uses_with(value)
        body.inputs.pop(first_inside + index)
        node.outputs[index].replace_all_uses_with(value)
    if free:
        _replace(node, {first + index for index in free}, set(free))
    return bool(free)


def _source(value: ir.Value) -> ir.Value:
    """What the value is a copy of."""
    producer = value.producer()
    while producer is not None and graphs.is_op(producer, "Identity") and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _replace(node: ir.Node, inputs: set[int], outputs: set[int]) -> None:
    """Put the same node in its own place, without some inputs and outputs."""
    kept = [value for index, value in enumerate(node.outputs) if index not in outputs]
    attributes = list(node.attributes.values())
    node.attributes.clear()
    new = ir.Node(
        node.domain,
        node.op_type,
        [value for index, value in enumerate(node.inputs) if index not in inputs],
        attributes,
        num_outputs=len(kept),
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for old, value in zip(kept, new.outputs, strict=True):
        value.name, value.type, value.shape = old.name, old.type, old.shape
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(kept, new.outputs, replace_graph_outputs=True)
    graph.remove(node, safe=True)
