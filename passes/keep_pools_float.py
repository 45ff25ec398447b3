"""Keep onnxruntime from moving codes in front of a MaxPool that reads floats."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.passes.keep_layers_float import for_each_channel


class KeepPoolsFloat(InPlacePass):
    """Give the QuantizeLinear behind a MaxPool of floats a scale for each channel, all of them the same.

    Before::

        Conv(W float) ─► MaxPool ─► QuantizeLinear(s []) ─► q

    After::

        Conv(W float) ─► MaxPool ─► QuantizeLinear(s [channels]) ─► q

    onnxruntime moves the first QuantizeLinear in front of the MaxPool, which then has no kernel for its layout: it took
    2 ms where float takes 0.1 (32 channels of 112²). The second it leaves where it is, and the codes are the same.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every MaxPool that qualifies."""
        return PassResult(model, any([_spread(model.graph, node) for node in list(model.graph)]))


def _spread(graph: ir.Graph, node: ir.Node) -> bool:
    """Write the scale behind a MaxPool of floats once for each channel; whether there was something to do."""
    if not graphs.is_op(node, "MaxPool") or _comes_from_codes(node.inputs[0]):
        return False
    reader, shape = graphs.only_reader(node.outputs[0]), node.outputs[0].shape
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    if reader is None or not graphs.is_quantize(reader) or not isinstance(channels, int) or channels < 2:
        return False
    made = for_each_channel(graph, reader.inputs[1:], channels)
    if not made:
        return False
    for index, value in enumerate(made, start=1):
        reader.replace_input_with(index, value)
    reader.attributes["axis"] = ir.AttrInt64("axis", 1)
    return True


def _comes_from_codes(value: ir.Value | None) -> bool:
    """Whether what makes a value is codes, or has an integer kernel that may give them: the pool reads those then."""
    if graphs.is_dequantized(value):
        return True
    node = None if value is None else value.producer()
    while node is not None and graphs.is_op(node, "Relu", "Clip"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None:
        return False
    item = layer_nodes.weighted(node)
    return any(map(graphs.is_dequantized, node.inputs if item is None else [item.weight]))
