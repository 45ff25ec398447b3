"""Write an LSTM with quantized weights as the op that onnxruntime's CPU provider computes on integers, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import array_of, new_initializer
from onnxq.rewriting import become

Array = np.ndarray[Any, Any]

VERSION = 1  # of onnxruntime's domain
OF_LSTM = 8  # inputs; behind them scale and zero point of each weight
WEIGHTS = (1, 2)  # of the input and of the recurrence


class LowerLstm(InPlacePass):
    """Replace an LSTM whose weights are codes by DynamicQuantizeLSTM.

    Before::

        W, R (int8) ─► DequantizeLinear ─► LSTM

    After::

        W, R (int8, transposed) ─► DynamicQuantizeLSTM

    The kernel chooses the range of what it reads, and of its own state at every step, while it runs.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every LSTM that qualifies."""
        found = [node for node in model.graph if graphs.is_op(node, "LSTM") and _has_codes(node)]
        for node in found:
            _lower(model.graph, node)
        if found:
            model.graph.opset_imports[graphs.ONNXRUNTIME_DOMAIN] = VERSION
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(found))


class RaiseLstm(InPlacePass):
    """Replace a DynamicQuantizeLSTM by an LSTM with the weights that its codes mean.

    Before::

        W, R (int8, transposed) ─► DynamicQuantizeLSTM

    After::

        W, R (float) ─► LSTM
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every one with constant weights."""
        found = [
            node
            for node in model.graph
            if layer_nodes.is_integer_lstm(node) and all(graphs.is_constant(node.inputs[index]) for index in WEIGHTS)
        ]
        for node in found:
            _raise(model.graph, node)
        if found:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(found))


def _has_codes(node: ir.Node) -> bool:
    for index in WEIGHTS:
        value = node.inputs[index]
        pair = None if value is None else value.producer()
        codes = pair.inputs[0] if pair is not None and graphs.is_dequantize(pair) else None
        if pair is None or codes is None or not graphs.is_constant(codes) or codes.dtype != ir.DataType.INT8:
            return False
        if pair.attributes.get_int("axis", 1) != 1:
            return False
    return True


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    inputs = [*node.inputs, *[None] * (OF_LSTM - len(node.inputs))]
    parameters: list[ir.Value] = []
    for index in WEIGHTS:
        dequantize = inputs[index].producer()  # type: ignore[union-attr]
        assert dequantize is not None
        codes, scale = dequantize.inputs[0], array_of(dequantize.inputs[1])
        name = codes.name if codes is not None else ""
        transposed = np.ascontiguousarray(array_of(codes).swapaxes(1, 2))  # [directions, inputs, 4 · hidden]
        scales = np.ascontiguousarray(np.broadcast_to(scale, transposed[:, 0].shape))
        inputs[index] = _constant(graph, f"{name}_transposed", transposed)
        zeros = _constant(graph, f"{name}_zero_points", np.zeros(scales.shape, np.int8))
        parameters += [_constant(graph, f"{name}_scales", scales), zeros]
    node.attributes.pop("layout", None)  # 0, the only one that the kernel knows
    become(node, "DynamicQuantizeLSTM", [*inputs, *parameters], graphs.ONNXRUNTIME_DOMAIN)


def _raise(graph: ir.Graph, node: ir.Node) -> None:
    inputs = list(node.inputs[:OF_LSTM])
    for position, index in enumerate(WEIGHTS):
        codes, scale, zero_point = inputs[index], *node.inputs[OF_LSTM + 2 * position :][:2]
        # [directions, inputs, 4 · hidden], with one scale for each direction or for each of its columns
        scales, zeros = (array_of(value) for value in (scale, zero_point))
        if scales.ndim == 1:
            scales, zeros = scales[:, None], zeros[:, None]
        values = (array_of(codes).astype(np.float32) - zeros[:, None].astype(np.float32)) * scales[:, None]
        name = codes.name if codes is not None else ""
        inputs[index] = _constant(graph, f"{name}_float", np.ascontiguousarray(values.swapaxes(1, 2)))
    become(node, "LSTM", inputs)


def _constant(graph: ir.Graph, name: str, values: Array) -> ir.Value:
    return new_initializer(graph, name, values, ir.DataType.from_numpy(values.dtype))
