"""Keep onnxruntime from quantizing, on its own, layers that stay in float between codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer
from onnxq.rewriting import dequantize_apart

LAYERS = ("Conv", "ConvTranspose")


class KeepLayersFloat(InPlacePass):
    """Give layers with float weights between codes an input with a scale for each channel, all of them the same.

    Before::

        q ─► DequantizeLinear(s []) ─► Conv(W float) ─► Relu ─► QuantizeLinear

    After::

        q ─► DequantizeLinear(s [channels]) ─► Conv(W float) ─► Relu ─► QuantizeLinear

    onnxruntime rounds the weights of the first to eight bits, with one scale for all, and runs it on integers (a
    ConvTranspose in float, with rounded weights): what was kept in float because it is sensitive, or slow in integers,
    would be both. The second it leaves alone, and it computes the same.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the input of every layer that qualifies."""
        changed = [_spread(model.graph, node) for node in list(model.graph) if is_rounded(node)]
        return PassResult(model, any(changed))


def is_rounded(node: ir.Node) -> bool:
    """Whether onnxruntime would round the float weights of this layer: between codes, those before it of one scale."""
    source = node.inputs[0] if graphs.is_op(node, *LAYERS) else None
    pair = None if source is None else source.producer()
    if (
        pair is None
        or not graphs.is_dequantize(pair)
        or not all(graphs.is_constant(value) for value in pair.inputs[1:])
    ):
        return False
    if array_of(pair.inputs[1]).size != 1 or not graphs.is_constant(node.inputs[1]):
        return False
    reader = graphs.only_reader(node.outputs[0])
    while reader is not None and graphs.is_op(reader, "Relu", "Clip"):
        reader = graphs.only_reader(reader.outputs[0])
    return reader is not None and graphs.is_quantize(reader)


def _spread(graph: ir.Graph, node: ir.Node) -> bool:
    """Write the scale once for each channel, for this layer alone; whether that was possible."""
    source, channels = node.inputs[0], _channels(node)
    pair = None if source is None else source.producer()
    if source is None or pair is None or channels < 2:
        return False  # with a single channel the scale for each is one again
    made = for_each_channel(graph, pair.inputs[1:], channels)
    dequantize_apart(graph, node, 0, [pair.inputs[0], *made], {"axis": 1})
    if not source.uses() and not source.is_graph_output():
        graph.remove(pair, safe=True)
    return True


def for_each_channel(graph: ir.Graph, numbers: Sequence[ir.Value | None], channels: int) -> list[ir.Value]:
    """A scale, and a zero point if there is one, written once for each channel; nothing where they are no constants."""
    if not all(graphs.is_constant(value) and array_of(value).size == 1 for value in numbers):
        return []
    return [
        new_initializer(graph, f"{value.name}_spread", np.full(channels, array_of(value)), value.dtype)
        for value in numbers
        if value is not None and value.dtype is not None
    ]


def _channels(node: ir.Node) -> int:
    """How many channels the layer reads."""
    shape = array_of(node.inputs[1]).shape
    return int(shape[0] if node.op_type == "ConvTranspose" else shape[1] * node.attributes.get_int("group", 1))
