"""Write the gates of levelled HardSwish and SiLU with the ops that onnxruntime computes on codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of
from onnxq.passes.level_gates import GATED, gate_of
from onnxq.passes.lower_hard_swish import LARGEST_CODE, GateMaker, is_eight_bits

# A sigmoid beyond these is within a thousandth of where it ends, and inside them the step of its argument is a
# sixteenth at most: 41 dB of the gate where it is steepest.
SIGMOID_LOWEST, SIGMOID_HIGHEST = -8.0, 7.0


class LowerLevelledGates(InPlacePass):
    """Give a gate its argument back by a depthwise convolution of one weight a channel, instead of a float product.

    Before::

        q ─► DequantizeLinear ─┬─► Mul(s) ─► HardSigmoid or Sigmoid ─► Q/DQ ─► Mul
                               └─────────────────────────────────────────────►

    After, of a HardSigmoid and of a Sigmoid::

        q ─► DequantizeLinear ─► Conv(s/6, ½) ─► Clip(0, 1) ─► Q/DQ(1/255) ─► Mul
        q ─► DequantizeLinear ─► Conv(s) ─► Q/DQ ─► Sigmoid ─► Q/DQ ─► Mul

    The convolution takes two thirds of the time of a product and a sum of codes, and with the table of the integer
    Sigmoid behind it half of that of a float gate. The scales are exact, since each channel's weight has its own. What
    a Sigmoid reads is rounded once more, in steps of a sixteenth at most.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every levelled gate between codes."""
        found = [node for node in model.graph if _is_between_codes(node)]
        for node in found:
            _rewrite(model.graph, node)
        if found:
            common_passes.RemoveUnusedNodesPass()(model)  # the levels, which weights hold now
        return PassResult(model, bool(found))


def _is_between_codes(argument: ir.Node) -> bool:
    """Whether a node is the Mul that gives a gate between codes its argument back."""
    source = argument.inputs[0] if GATED in argument.metadata_props else None
    if source is None or not graphs.is_dequantized(source):
        return False
    opened = gate_of(argument)
    if opened is None or not graphs.is_op(opened, "HardSigmoid", "Sigmoid"):
        return False
    reader = graphs.only_reader(opened.outputs[0])
    return reader is not None and graphs.is_quantize(reader) and is_eight_bits(reader)


def _rewrite(graph: ir.Graph, argument: ir.Node) -> None:
    opened = gate_of(argument)
    quantize = None if opened is None else graphs.only_reader(opened.outputs[0])
    assert opened is not None and quantize is not None
    make = GateMaker(graph, opened.outputs[0], opened.name or "", *quantize.inputs[1:3])
    if graphs.is_op(opened, "Sigmoid"):
        opened.replace_input_with(0, _rounded_argument(make, argument))
        graph.insert_before(opened, make.tape.nodes)
        graph.remove(argument, safe=True)
        return
    levels = array_of(argument.inputs[1]).astype(np.float64)
    zero, half = make.code("gate_zero_point", make.lowest), make.number("half", np.full(levels.size, 0.5))
    raised = make.op(
        "raised", "Conv", argument.inputs[0], make.for_each_channel("sixths", levels / 6), half, group=levels.size
    )
    make.tape.nodes[-1].metadata_props[GATED] = "1"
    gate_codes, gate_scale = make.gate_codes(raised, zero)
    graph.insert_before(argument, make.tape.nodes)
    for reader, _ in graphs.consumers(quantize.outputs[0]):
        reader.replace_input_with(1, gate_scale)
        reader.replace_input_with(2, zero)
    ir.convenience.replace_all_uses_with(quantize.outputs[0], gate_codes)
    for node in (quantize, opened, argument):
        graph.remove(node, safe=True)


def _rounded_argument(make: GateMaker, argument: ir.Node) -> ir.Value:
    """The argument of a Sigmoid behind Q/DQ over what it can be, as far as the Sigmoid tells it apart."""
    levels, source = array_of(argument.inputs[1]).astype(np.float64), argument.inputs[0]
    pair = None if source is None else source.producer()
    assert pair is not None
    step, zero_point = (float(array_of(value).reshape(-1)[0]) for value in pair.inputs[1:3])
    low, high = ((code - zero_point) * step * levels.max() for code in (make.lowest, make.highest))
    low, high = max(low, SIGMOID_LOWEST), min(high, SIGMOID_HIGHEST)
    scale = make.number("argument_scale", (high - low) / LARGEST_CODE)
    zero = make.code("argument_zero_point", round(make.lowest - low * LARGEST_CODE / (high - low)))
    product = make.op("argument", "Conv", source, make.for_each_channel("levels", levels), group=levels.size)
    make.tape.nodes[-1].metadata_props[GATED] = "1"
    codes = make.op("argument_quantized", "QuantizeLinear", product, scale, zero)
    return make.op("argument_dequantized", "DequantizeLinear", codes, scale, zero)
