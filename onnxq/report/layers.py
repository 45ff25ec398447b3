"""SQNR layer by layer: the values that a float graph and its quantized version both have, run literally."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.condensed import Condensed, thinned
from onnxq.report.metrics import OutputsSqnr, Sqnr
from onnxq.report.quality import is_float
from onnxq.runtime import Session
from onnxq.value_sizes import elements_in

Array = np.ndarray[Any, Any]

ACTIVATIONS = (
    "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu", "Elu", "Selu",
    "Softplus", "Mish", "Swish",
)  # fmt: skip
COMPARED_AT_ONCE = 1 << 27  # numbers of one graph's inner values that are held at once; of more, parts are compared
ABSORBED = ("Relu", "Clip")  # a QuantizeLinear saturates where these do, and quantizers then drop them


@dataclass(frozen=True)
class Layer:
    """A weighted node of the float graph and the values to compare.

    Attributes:
        name: The node's name.
        op: Its op.
        value: The float graph's value.
        quantized_value: The quantized graph's: the same, or what a DequantizeLinear makes of it.
    """

    name: str
    op: str
    value: str
    quantized_value: str


def common_layers(original: ir.Model, quantized: ir.Model) -> list[Layer]:
    """The layers whose output, or what directly follows it, has the same name in both graphs.

    A Conv that a BatchNormalization follows is compared after it: a quantizer folds the two, and a value of the
    Conv's own name would then mean something else. A value that is only read through Q/DQ is compared after them,
    as the next layer sees it: its own rounding counts, and so does a Relu that the rounding has absorbed. Values
    whose channels were levelled have other names, and are left out.
    """
    known = {name: value for name, value in graphs.values(quantized.graph).items() if value.producer() is not None}
    found = []
    for weighted in layer_nodes.weighted_nodes(original.graph):
        for value in _stand_ins(weighted.node):
            partner = known.get(value.name or "")
            if partner is None or not graphs.is_float(value) or not graphs.is_float(partner):
                continue
            rounded = _rounded(partner)
            follower = _only_consumer(value)
            if rounded is not partner and follower is not None and graphs.is_op(follower, *ABSORBED):
                value = follower.outputs[0]
            node = weighted.node
            found.append(Layer(node.name or "", node.op_type, value.name or "", rounded.name or ""))
            break
    return found


def _rounded(value: ir.Value) -> ir.Value:
    """What the graph reads of ``value``: itself, or the DequantizeLinear after it if nothing else reads it."""
    reader = _only_consumer(value)
    if reader is None or not graphs.is_quantize(reader):
        return value
    readers = [node for node, _ in graphs.consumers(reader.outputs[0])]
    if readers and all(graphs.is_dequantize(node) for node in readers):
        return readers[0].outputs[0]
    return value


def _stand_ins(node: ir.Node) -> list[ir.Value]:
    """Values that may stand for a layer, best first: its output, after its bias, after its activation."""
    output = node.outputs[0]
    chain = [output]
    follower = _only_consumer(output)
    if follower is not None and graphs.is_op(follower, "BatchNormalization"):
        chain = [follower.outputs[0]]
    elif follower is not None and graphs.is_op(follower, "Add") and any(map(graphs.is_constant, follower.inputs)):
        chain.append(follower.outputs[0])
    follower = _only_consumer(chain[-1])
    if follower is not None and graphs.is_op(follower, *ACTIVATIONS):
        chain.append(follower.outputs[0])
    return chain


def _only_consumer(value: ir.Value) -> ir.Node | None:
    readers = graphs.consumers(value)
    return readers[0][0] if len(readers) == 1 and not value.is_graph_output() else None


def measure(
    original: ir.Model,
    quantized: ir.Model,
    feeds: Iterable[Mapping[str, Array]],
    layers: list[Layer],
    *,
    device: str = "cpu",
) -> tuple[OutputsSqnr, list[dict[str, Any]]]:
    """Run both graphs with no optimisation and compare their outputs and layers.

    Args:
        original: The float graph.
        quantized: The quantized graph, with the same inputs and outputs.
        feeds: Batches, read once; only sums are kept.
        layers: What to compare inside; may be empty.
        device: ``cpu`` or ``cuda``.

    Returns:
        The SQNR of the outputs, and one dict for each layer (``name``, ``op``, ``value``, ``sqnr_db``), worst first.
    """
    outputs = graphs.tensor_outputs(original.graph)
    names = outputs + [layer.value for layer in layers]
    quantized_names = outputs + [layer.quantized_value for layer in layers]
    total = OutputsSqnr({name: Sqnr() for name in outputs})
    inner = [Sqnr() for _ in layers]
    sums = [*total.each.values(), *inner]
    sessions: tuple[Session, Session] | None = None
    for feed in feeds:
        if sessions is None:
            large = _large(original, quantized, layers, feed)
            sessions = (
                Session(original, taps=_unique(names), condense=large.keys(), optimize=False, device=device),
                Session(
                    quantized, taps=_unique(quantized_names), condense=large.values(), optimize=False, device=device
                ),
            )
        expected, found = (
            dict(zip(_unique(wanted), session.run(feed, _unique(wanted)), strict=True))
            for session, wanted in zip(sessions, (names, quantized_names), strict=True)
        )
        for sqnr, name, quantized_name in zip(sums, names, quantized_names, strict=True):
            reference, rounded = expected[name], found[quantized_name]
            if isinstance(reference, Condensed) or isinstance(rounded, Condensed):
                reference, rounded = thinned(reference), thinned(rounded)
            else:
                rounded = _own_channels(rounded, reference)
            if is_float(reference) and is_float(rounded) and reference.shape == rounded.shape:
                sqnr.update(reference, rounded)
    rows: list[dict[str, Any]] = [
        {"name": layer.name, "op": layer.op, "value": layer.value, "sqnr_db": sqnr.value}
        for layer, sqnr in zip(layers, inner, strict=True)
        if sqnr.value is not None
    ]
    return total, sorted(rows, key=lambda row: float(row["sqnr_db"]))


def _large(
    original: ir.Model, quantized: ir.Model, layers: Sequence[Layer], feed: Mapping[str, Array]
) -> dict[str, str]:
    """Values to compare a part of, in the float graph and their partners: those of one shape, if all are too many."""
    if elements_in(original, [layer.value for layer in layers], feed) <= COMPARED_AT_ONCE:
        return {}
    values, partners = graphs.values(original.graph), graphs.values(quantized.graph)
    pairs = {layer.value: layer.quantized_value for layer in layers}
    return {
        value: partner
        for value, partner in pairs.items()
        if values[value].shape is not None and values[value].shape == partners[partner].shape
    }


def _own_channels(rounded: Array, reference: Array) -> Array:
    """The channels that the float model has too: a target may have added some of zeros behind them."""
    return rounded[:, : reference.shape[1]] if rounded.ndim == reference.ndim > 1 else rounded


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
