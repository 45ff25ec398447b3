"""What an activation function lets through: values beyond it need no codes of their own."""

from __future__ import annotations

import math
from collections.abc import Collection

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.folding import array_of
from onnxq.passes.level_gates import gate_of

Interval = tuple[float, float]

EVERYTHING: Interval = (-math.inf, math.inf)
# Beyond these ends the function is constant, or within 0.003 of where it ends.
INTERVALS: dict[str, Interval] = {
    "Relu": (0.0, math.inf),
    "HardSwish": (-3.0, math.inf),
    "Gelu": (-4.0, math.inf),
    "Sigmoid": (-6.0, 6.0),
    "Tanh": (-4.0, 4.0),
}
SILU: Interval = (-8.0, math.inf)


def let_through(quantizer: ir.Node) -> Interval:
    """The values of what a QuantizeLinear reads that its readers, behind DequantizeLinear, tell apart.

    The pre-activations of HardSwish and SiLU reach as far below zero as above; codes below -3 or -8 all mean nothing,
    and without them the step is half as wide.
    """
    pairs = [pair for pair, _ in graphs.consumers(quantizer.outputs[0])]
    if not all(graphs.is_dequantize(pair) and not pair.outputs[0].is_graph_output() for pair in pairs):
        return EVERYTHING
    readers = [reader for pair in pairs for reader, _ in graphs.consumers(pair.outputs[0])]
    if not readers:
        return EVERYTHING
    leads = {reader: gate for reader in readers if (gate := _gate(reader)) is not None}
    products = [reader for reader in readers if _reads_gate(reader, [gate for gate, _ in leads.values()])]
    intervals = []
    if products:  # of HardSwish or SiLU, whose gate says no more than they do
        intervals = [(min(lowest for _, lowest in leads.values()), math.inf)]
        readers = [reader for reader in readers if reader not in products and reader not in leads]
    intervals += [_interval(reader) for reader in readers]
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _gate(reader: ir.Node) -> tuple[ir.Node, float] | None:
    """The Sigmoid or HardSigmoid that a reader is or leads to, and below what x·g(x) is zero."""
    gate = gate_of(reader)
    factor = 1.0 if gate is reader else float(array_of(reader.inputs[1]).min())
    if gate is not None and graphs.is_op(gate, "Sigmoid"):
        return gate, SILU[0] / factor
    if gate is not None and graphs.is_op(gate, "HardSigmoid"):
        return gate, _interval(gate)[0] / factor
    return None


def _interval(reader: ir.Node) -> Interval:
    if graphs.is_op(reader, "Clip"):
        low, high = (*reader.inputs[1:3], None, None)[:2]
        if any(value is not None and not graphs.is_constant(value) for value in (low, high)):
            return EVERYTHING
        return -math.inf if low is None else float(array_of(low)), math.inf if high is None else float(array_of(high))
    if graphs.is_op(reader, "HardSigmoid"):
        alpha, beta = reader.attributes.get_float("alpha", 0.2), reader.attributes.get_float("beta", 0.5)
        return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else EVERYTHING
    if graphs.is_op(reader, "Swish"):
        alpha = reader.attributes.get_float("alpha", 1.0)
        return (SILU[0] / alpha, math.inf) if alpha > 0 else EVERYTHING
    return INTERVALS.get(reader.op_type, EVERYTHING) if reader.domain in graphs.ONNX_DOMAINS else EVERYTHING


def _reads_gate(reader: ir.Node, gates: Collection[ir.Node]) -> bool:
    """Whether a reader is the product of the value and its own gate, Q/DQ between or not."""
    if not graphs.is_op(reader, "Mul"):
        return False
    return any(_behind_pair(value) in gates for value in reader.inputs if value is not None)


def _behind_pair(value: ir.Value) -> ir.Node | None:
    """What makes a value, looking through Q/DQ."""
    producer = value.producer()
    while producer is not None and (graphs.is_quantize(producer) or graphs.is_dequantize(producer)):
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    return producer
