"""Attention in a graph: where it is, and which of its products a runtime cannot compute on codes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes


def attention_products(graph: ir.Graph) -> Iterator[ir.Node]:
    """The MatMul nodes ``softmax(q · kᵀ) · v`` in the graph's order, also behind an exporter's guard against NaN."""
    for node in graph:
        if graphs.is_op(node, "MatMul") and _is_softmax(node.inputs[0]):
            yield node


def single_query_attention(graph: ir.Graph) -> set[ir.Node]:
    """The products of attention that has one query for many keys, and the layers that project what it reads.

    Class attention asks so, and pooling by attention.
    """
    found: set[ir.Node] = set()
    for mixing in attention_products(graph):
        scoring = list(graphs.nearest_behind(mixing.inputs[0], _is_product, _hands_on_scores))
        if len(scoring) != 1 or _rows(mixing.outputs[0]) != 1:
            continue
        keys, *others = (
            list(graphs.nearest_behind(value, _is_layer, _hands_on))
            for value in (scoring[0].inputs[1], scoring[0].inputs[0], mixing.inputs[1])
        )
        if keys and all(_rows(key.outputs[0]) != 1 for key in keys):
            found.update([mixing, *scoring, *keys], *others)
    return found


def _rows(value: ir.Value) -> int | None:
    """The size before the last, if it is known."""
    size = value.shape[-2] if value.shape is not None and len(value.shape) > 1 else None
    return size if isinstance(size, int) else None


def dividing_products(graph: ir.Graph) -> set[ir.Node]:
    """Products of activations that give a divisor, and those that they multiply, as linear attention has them.

    Relu(q) · (Relu(k)ᵀ · [v, 1]) is divided by its last column: where codes make a small divisor zero, the quotient is
    infinite.
    """
    divisors = [node.inputs[1] for node in graph if graphs.is_op(node, "Div")]
    divisors += [node.inputs[0] for node in graph if graphs.is_op(node, "Reciprocal")]
    found = {product for value in divisors for product in graphs.nearest_behind(value, _is_product, _hands_on)}
    return found.union(
        *(graphs.nearest_behind(value, _is_product, _hands_on) for item in found for value in item.inputs)
    )


def _is_product(node: ir.Node) -> bool:
    """Whether the node multiplies two activations."""
    item = layer_nodes.weighted(node)
    return item is not None and item.weight_index is None


def _is_layer(node: ir.Node) -> bool:
    item = layer_nodes.weighted(node)
    return item is not None and item.weight_index is not None


def _hands_on(node: ir.Node) -> bool:
    """Whether the node moves, scales, shifts or clips what it reads."""
    return graphs.is_op(node, *graphs.DATA_MOVEMENT, *graphs.HANDED_ON, "Add", "Mul", "Div", "Clip", "Max")


def _hands_on_scores(node: ir.Node) -> bool:
    return _hands_on(node) or graphs.is_op(node, "Softmax", "Where", "IsNaN")


def _is_softmax(value: ir.Value | None) -> bool:
    """Whether a Softmax makes the value, if only through ops that hand its numbers on."""
    producer = None if value is None else value.producer()
    if producer is None or graphs.is_op(producer, "Softmax"):
        return producer is not None
    if graphs.is_op(producer, "Where"):  # Where(IsNaN(x), 0, x)
        return any(_is_softmax(read) for read in producer.inputs[1:])
    return graphs.is_op(producer, *graphs.HANDED_ON) and _is_softmax(producer.inputs[0])
