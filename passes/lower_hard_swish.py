"""Write HardSwish between Q/DQ as a sum and a product, both of which onnxruntime computes on codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer

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
    step, storage = array_of(scale), array_of(zero_point).dtype.type
    floats, integers = ir.DataType.from_numpy(step.dtype), ir.DataType.from_numpy(array_of(zero_point).dtype)
    lowest, highest = np.iinfo(storage).min, np.iinfo(storage).max
    name = output.name or node.name or ""

    def number(suffix: str, value: float) -> ir.Value:
        return new_initializer(graph, f"{name}_{suffix}", np.asarray(value, step.dtype), floats)

    def code(suffix: str, value: int) -> ir.Value:
        return new_initializer(graph, f"{name}_{suffix}", np.asarray(value, storage), integers)

    gate_scale, gate_zero = number("gate_scale", 1 / LARGEST_CODE), code("gate_zero_point", lowest)
    tape = ir.tape.Tape()
    sixth = tape.op("DequantizeLinear", [codes, number("sixth_scale", float(step) / 6), zero_point])
    half = tape.op("DequantizeLinear", [code("half", highest), number("half_scale", 0.5 / LARGEST_CODE), gate_zero])
    raised = tape.op("Add", [sixth, half])
    gate = tape.op("Clip", [raised, number("gate_low", 0), number("gate_high", 1)])
    gate_codes = tape.op("QuantizeLinear", [gate, gate_scale, gate_zero])
    opened = tape.op("DequantizeLinear", [gate_codes, gate_scale, gate_zero])
    product = tape.op("Mul", [activation, opened])
    made = (
        (sixth, "sixth"), (half, "half_dequantized"), (raised, "raised"), (gate, "gate"),
        (gate_codes, "gate_quantized"), (opened, "gate_dequantized"),
    )  # fmt: skip
    for value, suffix in made:
        value.name, value.dtype = f"{name}_{suffix}", integers if value is gate_codes else floats
        value.shape = ir.Shape(()) if value is half else output.shape
        value.producer().name = f"{node.name}_{suffix}"  # type: ignore[union-attr]
    tape.nodes[-1].name = node.name
    graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(output, product)
    graph.remove(node, safe=True)
    product.name, product.type, product.shape = output.name, output.type, output.shape
