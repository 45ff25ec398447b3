"""Which LSTMs onnxruntime's CPU provider computes on integers (passes/lower_lstm.py), and why others stay in float."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.scheme import Scheme, parse_weights
from onnxq.targets.placement import EXCLUDED, Schemes, Site, weight_sites

EIGHT_BITS = (ir.DataType.UINT8, ir.DataType.INT8)


def place_lstms(graph: ir.Graph, skipped: set[str], scheme_of: Schemes) -> tuple[list[Site], dict[str, str]]:
    """The Q/DQ of the weights, and for the name of every LSTM why it stays in float, or an empty string."""
    reasons = {
        node: EXCLUDED if node.name in skipped else _why_float(node, scheme_of(node))
        for node in graph
        if graphs.is_op(node, "LSTM")
    }
    layers = [item for node, reason in reasons.items() if not reason for item in layer_nodes.lstm_weights(node)]
    sites = weight_sites(layers, _with_bytes(scheme_of))
    return sites, {node.name or "": reason for node, reason in reasons.items()}


def _why_float(node: ir.Node, scheme: Scheme) -> str:
    if not all(graphs.is_constant(weight) for weight in node.inputs[1:3]):
        return "its weights are computed"
    if node.attributes.get_int("layout", 0):
        return "the integer LSTM reads sequences first"
    if scheme.activations.format.storage not in EIGHT_BITS:
        return "the integer LSTM chooses 8 bits for what it reads"
    if not scheme.weights.enabled or scheme.weights.granularity == "block":
        return "the integer LSTM has weights of 8 bits"
    return ""


def _with_bytes(scheme_of: Schemes) -> Schemes:
    """The same schemes with weights of int8: narrower ones of an LSTM would lie in bytes all the same."""

    def chosen(node: ir.Node) -> Scheme:
        scheme = scheme_of(node)
        return replace(scheme, weights=replace(parse_weights("int8"), granularity=scheme.weights.granularity))

    return chosen
