"""Pad codes with the zero point instead of floats with zero."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs


class PadCodes(InPlacePass):
    """Move a zero Pad to the integer side of its Q/DQ pairs, where it costs a copy of bytes.

    Before (both pairs with the same scale s and zero point z)::

        q ─► DequantizeLinear ─► Pad(0.0) ─► QuantizeLinear ─► …

    After::

        q ─► Pad(z) ─► …
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every Pad that qualifies."""
        modified = False
        for node in list(model.graph):
            if pads_with_zero(node) and _rewrite(model.graph, node):
                modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def pads_with_zero(node: ir.Node) -> bool:
    """Whether the node is a Pad of constant zeros."""
    if not graphs.is_op(node, "Pad") or node.attributes.get_string("mode", "constant") != "constant":
        return False
    constant = node.inputs[2] if len(node.inputs) > 2 else None
    if constant is None:
        return True
    return constant.const_value is not None and not np.any(constant.const_value.numpy())


def _rewrite(graph: ir.Graph, pad: ir.Node) -> bool:
    source = pad.inputs[0]
    before = None if source is None else source.producer()
    readers = graphs.consumers(pad.outputs[0])
    if before is None or not graphs.is_dequantize(before) or len(readers) != 1 or pad.outputs[0].is_graph_output():
        return False
    after = readers[0][0]
    if not graphs.is_quantize(after) or list(before.inputs[1:3]) != list(after.inputs[1:3]):
        return False  # another scale would change the codes
    codes, zero_point = before.inputs[0], before.inputs[2]
    if zero_point is None or zero_point.const_value is None or zero_point.const_value.shape:
        return False
    if zero_point.const_value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return False  # onnxruntime pads no other codes
    tape = ir.tape.Tape()
    inputs = [codes, pad.inputs[1], zero_point, *pad.inputs[3:]]
    padded = tape.op("Pad", inputs, dict(pad.attributes))
    quantized = after.outputs[0]
    padded.name, padded.type, padded.shape = f"{quantized.name}_padded", quantized.type, quantized.shape
    tape.nodes[0].name = pad.name
    pad.name = f"{pad.name}_float"
    graph.insert_before(after, tape.nodes)
    quantized.replace_all_uses_with(padded)
    return True
