"""Layers that a logarithm is computed from: the filters that make a spectrogram within the graph.

A logarithm shows the error of a small number as large as that of a large one, and in a spectrogram the small ones are a
millionth of the large: codes with one step for all of them leave nothing. Networks for audio begin so (a Fourier
transform as MatMul or Conv, squares, a mel filter, Log), with few of their weights.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes

REASON = "a logarithm of its result shows the errors of small numbers"

# What hands small numbers on as small ones. No activations: behind a Relu or a Softmax lies a network, not a filter.
_KEEPS_SMALL_NUMBERS = (
    *graphs.DATA_MOVEMENT, *graphs.AVERAGES, "Abs", "Add", "Cast", "Concat", "Div", "Expand", "Gather", "Mul", "Neg",
    "Pow", "ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare", "ScatterElements", "ScatterND", "Sqrt", "Sub",
    "Sum", "Where",
)  # fmt: skip


def before_logarithms(graph: ir.Graph) -> set[ir.Node]:
    """The layers, and products of what is computed, that a Log is computed from without an activation between."""
    found: set[ir.Node] = set()
    behind = [value for node in graph if graphs.is_op(node, "Log", "ReduceLogSum") for value in node.inputs[:1]]
    while behind:
        for node in graphs.nearest_behind(
            behind.pop(), lambda node: layer_nodes.weighted(node) is not None, _keeps_small_numbers
        ):
            if node not in found:
                found.add(node)
                behind += node.inputs[:2]
    return found


def _keeps_small_numbers(node: ir.Node) -> bool:
    if graphs.is_op(node, "Clip", "Max"):  # a floor above zero, as before a logarithm; at zero it is a Relu
        return any(_is_positive(value) for value in node.inputs[:2])
    return graphs.is_op(node, *_KEEPS_SMALL_NUMBERS)


def _is_positive(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and bool((value.const_value.numpy() > 0).all())
