"""Quantize activations in the power domain: more codes near zero, at the price of float products."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.arithmetic import scale_and_zero_point
from onnxq.calibration.calibrate import write_clip, write_scales
from onnxq.folding import new_initializer
from onnxq.passes.insert_qdq import CLIP, spec_of

Array = np.ndarray[Any, Any]


class PowerActivations(InPlacePass):
    """Put sign(x)·|x|^a before the Q/DQ pairs of activations, and its inverse after them.

    Before::

        x ─► QuantizeLinear ─► DequantizeLinear ─► Conv

    After::

        x ─► |x|^a·sign(x) ─► QuantizeLinear ─► DequantizeLinear ─► |·|^(1/a)·sign ─► Conv

    The pairs have their scales already; the range [low, high] becomes [low^a, high^a]. A product of sums is not a
    sum of powers, so no integer kernel can follow: this is for accuracy at few bits, not for speed. It runs once.

    Args:
        exponent: a, at most 1.
    """

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the pair of every activation."""
        pairs = [node for node in model.graph if graphs.is_quantize(node) and not graphs.is_constant(node.inputs[0])]
        rescaled: set[ir.Value] = set()
        for node in pairs:
            scale = node.inputs[1]
            assert scale is not None
            if scale not in rescaled:
                self._rescale(node)
                rescaled.add(scale)
            self._wrap(model.graph, node)
        return PassResult(model, bool(pairs))

    def _rescale(self, node: ir.Node) -> None:
        assert node.inputs[1] and node.inputs[1].const_value and node.inputs[2] and node.inputs[2].const_value
        spec = spec_of(node)
        number_format = spec.format
        scale = node.inputs[1].const_value.numpy().astype(np.float64)
        offset = node.inputs[2].const_value.numpy().astype(np.float64)
        symmetric = spec.symmetric and number_format.signed
        low, high = ((code - offset) * scale for code in (number_format.low, number_format.high))
        low, high = (-high, high) if symmetric else (low, high)
        low, high = (np.sign(end) * np.abs(end) ** self.exponent for end in (low, high))
        new_scale, zero_point = scale_and_zero_point(low, high, number_format, symmetric=symmetric)
        write_scales(node, new_scale, zero_point)
        write_clip(node, new_scale, zero_point, number_format)

    def _wrap(self, graph: ir.Graph, node: ir.Node) -> None:
        source = node.inputs[0]
        assert source is not None
        clip = source.producer()
        first = clip if clip is not None and CLIP in clip.metadata_props else node
        value = first.inputs[0]
        assert value is not None
        raised, before = self._power(graph, value, f"{node.name}_power", self.exponent)
        first.replace_input_with(0, raised)
        graph.insert_before(first, before)
        for reader, _ in list(graphs.consumers(node.outputs[0])):
            if graphs.is_dequantize(reader):
                output = reader.outputs[0]
                uses = graphs.consumers(output)
                lowered, after = self._power(graph, output, f"{reader.name}_root", 1 / self.exponent)
                graph.insert_after(reader, after)
                for user, index in uses:
                    user.replace_input_with(index, lowered)

    def _power(self, graph: ir.Graph, value: ir.Value, name: str, exponent: float) -> tuple[ir.Value, list[ir.Node]]:
        dtype = value.dtype or ir.DataType.FLOAT
        power = new_initializer(graph, f"{name}_exponent", np.asarray(exponent, dtype.numpy()), dtype)
        tape = ir.tape.Tape()
        result = tape.op("Mul", [tape.op("Pow", [tape.op("Abs", [value]), power]), tape.op("Sign", [value])])
        for made, ending in zip(tape.nodes, ("abs", "pow", "sign", "mul"), strict=True):
            made.name = f"{name}_{ending}"
            made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = made.name, value.type, value.shape
        return result, list(tape.nodes)
