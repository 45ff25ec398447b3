"""Write HardSwish between Q/DQ as a sum and a product, both of which onnxruntime computes on codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer

Array = np.ndarray[Any, Any]

LARGEST_CODE = 255
EIGHT_BITS = (ir.DataType.UINT8, ir.DataType.INT8)


class LowerHardSwish(InPlacePass):
    """Take x·clip(x/6 + ½, 0, 1) apart where it stands between codes.

    Before::

        q ─► DequantizeLinear(s, z) ─► HardSwish ─► QuantizeLinear

    After::

        q ─┬─► DequantizeLinear(s/6, z) ─► Add(½) ─► Clip(0, 1) ─► Q/DQ(1/255) ─► Mul ─► QuantizeLinear
           └─► DequantizeLinear(s, z) ──────────────────────────────────────────►

    The sixth costs nothing, since it is only another meaning of the same codes, and neither does the clip, since codes
    of step 1/255 end at 0 and 1. onnxruntime has no integer HardSwish: two integer kernels take 0.4 of the time of
    DequantizeLinear, HardSigmoid, Mul and QuantizeLinear. The gate is rounded to 1/255, as that of a Sigmoid is.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every HardSwish that qualifies."""
        found = [node for node in model.graph if _is_between_codes(node)]
        for node in found:
            _rewrite(model.graph, node)
        return PassResult(model, bool(found))


def is_eight_bits(quantize: ir.Node) -> bool:
    """Whether a QuantizeLinear of constants makes codes that onnxruntime has integer kernels for."""
    return len(quantize.inputs) == 3 and all(
        value is not None and graphs.is_constant(value) and (index == 0 or value.dtype in EIGHT_BITS)
        for index, value in enumerate(quantize.inputs[1:])
    )


def _is_between_codes(node: ir.Node) -> bool:
    source = node.inputs[0]
    if not graphs.is_op(node, "HardSwish") or source is None or not graphs.is_dequantized(source):
        return False
    readers = graphs.consumers(node.outputs[0])
    pair = [source.producer(), *(reader for reader, _ in readers)]
    if len(readers) != 1 or node.outputs[0].is_graph_output() or not graphs.is_quantize(pair[1]):
        return False
    parameters = [item.inputs[1:] for item in pair if item is not None]
    if any(len(values) < 2 or not all(graphs.is_constant(value) for value in values) for values in parameters):
        return False
    scale = array_of(parameters[0][0])
    formats = {value.dtype for _, value in parameters if value is not None}
    return scale.ndim == 0 and formats <= set(EIGHT_BITS)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    activation, output = node.inputs[0], node.outputs[0]
    dequantize = activation.producer() if activation is not None else None
    assert activation is not None and dequantize is not None
    codes, scale, zero_point = dequantize.inputs
    make = GateMaker(graph, output, node.name or "", scale, zero_point)
    zero = make.code("gate_zero_point", make.lowest)
    sixth_scale = make.number("sixth_scale", float(array_of(scale)) / 6)
    gate_codes, gate_scale = make.gate(make.op("sixth", "DequantizeLinear", codes, sixth_scale, zero_point), zero)
    opened = make.op("gate_dequantized", "DequantizeLinear", gate_codes, gate_scale, zero)
    product = make.tape.op("Mul", [activation, opened])
    make.tape.nodes[-1].name = node.name
    graph.insert_before(node, make.tape.nodes)
    ir.convenience.replace_all_uses_with(output, product)
    graph.remove(node, safe=True)
    product.name, product.type, product.shape = output.name, output.type, output.shape


class GateMaker:
    """Nodes and constants of one gate, named after the value that it is for, in the types of its Q/DQ."""

    def __init__(
        self, graph: ir.Graph, value: ir.Value, node: str, scale: ir.Value | None, zero_point: ir.Value | None
    ) -> None:
        self.graph, self.value, self.node, self.tape = graph, value, node, ir.tape.Tape()
        step, code = array_of(scale), array_of(zero_point)
        self.floats, self.integers = ir.DataType.from_numpy(step.dtype), ir.DataType.from_numpy(code.dtype)
        self.lowest, self.highest = int(np.iinfo(code.dtype).min), int(np.iinfo(code.dtype).max)

    def number(self, suffix: str, value: Array | float) -> ir.Value:
        """A float constant."""
        return new_initializer(
            self.graph, f"{self.value.name}_{suffix}", np.asarray(value, self.floats.numpy()), self.floats
        )

    def code(self, suffix: str, value: Array | int) -> ir.Value:
        """A constant in codes."""
        return new_initializer(
            self.graph, f"{self.value.name}_{suffix}", np.asarray(value, self.integers.numpy()), self.integers
        )

    def weight_code(self, suffix: str, value: Array) -> ir.Value:
        """A constant in codes of weights, which have a sign."""
        return new_initializer(self.graph, f"{self.value.name}_{suffix}", value.astype(np.int8), ir.DataType.INT8)

    def op(self, suffix: str, op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        """A node whose result has the shape of the value."""
        made = self.tape.op(op_type, list(inputs), attributes)
        made.name, made.shape = f"{self.value.name}_{suffix}", self.value.shape
        made.dtype = self.integers if op_type == "QuantizeLinear" else self.floats
        self.tape.nodes[-1].name = f"{self.node}_{suffix}"
        return made

    def for_each_channel(self, suffix: str, factors: Array) -> ir.Value:
        """The weights [channels, 1, …] of a depthwise convolution that multiplies each channel by its factor."""
        codes = np.full((factors.size, *[1] * factors.ndim), np.iinfo(np.int8).max)
        weight = self.op(
            suffix,
            "DequantizeLinear",
            self.weight_code(f"{suffix}_quantized", codes),
            self.number(f"{suffix}_scale", factors.reshape(-1) / np.iinfo(np.int8).max),
            self.weight_code(f"{suffix}_zero_point", np.zeros(factors.size)),
            axis=0,
        )
        weight.shape = ir.Shape(codes.shape)
        return weight

    def gate(self, sixth: ir.Value, zero_point: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The codes of clip(sixth + ½, 0, 1), and their scale."""
        half_codes, half_scale = self.code("half", self.highest), self.number("half_scale", 0.5 / LARGEST_CODE)
        half = self.op("half_dequantized", "DequantizeLinear", half_codes, half_scale, zero_point)
        half.shape = ir.Shape(())
        return self.gate_codes(self.op("raised", "Add", sixth, half), zero_point)

    def gate_codes(self, raised: ir.Value, zero_point: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The codes of what was raised by a half, between 0 and 1, and their scale."""
        scale = self.number("gate_scale", 1 / LARGEST_CODE)
        gate = self.op("gate", "Clip", raised, self.number("gate_low", 0), self.number("gate_high", 1))
        return self.op("gate_quantized", "QuantizeLinear", gate, scale, zero_point), scale
