"""Read integer operators (QLinearConv and its like), as onnxruntime's older format has them, as Q/DQ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer
from onnxq.rewriting import InPlaceOf, operand

DROPPED = ("channels_last", "opset")  # of onnxruntime, and not of ONNX


@dataclass(frozen=True)
class _Reading:
    """Where an operator's inputs are; codes are followed by their scale and zero point.

    Attributes:
        op_type: The float op.
        operands: Indices of the codes that it reads.
        result: Index of the result's scale.
        bias: Index of an int32 bias.
    """

    op_type: str
    operands: tuple[int, ...]
    result: int
    bias: int | None = None


READINGS = {
    "QLinearConv": _Reading("Conv", (0, 3), 6, bias=8),
    "QLinearMatMul": _Reading("MatMul", (0, 3), 6),
    "QGemm": _Reading("Gemm", (0, 3), 7, bias=6),
    "QLinearAdd": _Reading("Add", (0, 3), 6),
    "QLinearMul": _Reading("Mul", (0, 3), 6),
    "QLinearGlobalAveragePool": _Reading("GlobalAveragePool", (0,), 3),
    "QLinearAveragePool": _Reading("AveragePool", (0,), 3),
    "QLinearSigmoid": _Reading("Sigmoid", (0,), 3),
    "QLinearLeakyRelu": _Reading("LeakyRelu", (0,), 3),
    "QLinearSoftmax": _Reading("Softmax", (0,), 3),
}
CONCAT = "QLinearConcat"  # the result's scale and zero point, and three inputs for each operand


class RaiseQLinear(InPlacePass):
    """Put a float op between DequantizeLinear and QuantizeLinear in place of an integer one.

    Before::

        codes of x, of W, int32 bias, scales, zero points ─► QLinearConv ─► codes of y

    After::

        codes of x ─► DequantizeLinear ─► Conv ─► QuantizeLinear ─► codes of y
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every one whose scales are constant."""
        names = graphs.Names(model.graph)
        found = [(node, reading) for node in model.graph if (reading := _reading(node)) is not None]
        for node, reading in found:
            _raise(model.graph, node, reading, names)
        if found:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(found))


def _reading(node: ir.Node) -> _Reading | None:
    reading = READINGS.get(node.op_type)
    if node.op_type == CONCAT:
        reading = _Reading("Concat", tuple(range(2, len(node.inputs), 3)), 0)
    if reading is None or node.domain not in (*graphs.ONNX_DOMAINS, graphs.ONNXRUNTIME_DOMAIN):
        return None
    parameters = [operand(node, index + 1) for index in reading.operands] + [operand(node, reading.result)]
    if node.attributes.get_int("channels_last", 0):
        return None
    return reading if all(graphs.is_constant(value) for value in parameters if value is not None) else None


def _raise(graph: ir.Graph, node: ir.Node, reading: _Reading, names: graphs.Names) -> None:
    whole = InPlaceOf(graph, node, names)
    inputs = []
    for number, index in enumerate(reading.operands):
        # A convolution's weight has scales along its first axis, the weight of a product along its last.
        rows_first = reading.op_type == "Conv" or bool(node.attributes.get_int("transB", 0))
        axis = 0 if rows_first and number == 1 else 1
        codes, scale, zero_point = (operand(node, index + offset) for offset in range(3))
        dequantized = whole.op(f"operand_{number}", "DequantizeLinear", [codes, scale, zero_point], {"axis": axis})
        dequantized.type = ir.TensorType(ir.DataType.FLOAT)
        dequantized.shape = None if codes is None else codes.shape
        inputs.append(dequantized)
    bias = None if reading.bias is None else operand(node, reading.bias)
    if bias is not None:
        products = (array_of(operand(node, 1)) * array_of(operand(node, 4))).astype(np.float32)
        products = products.reshape(-1 if products.size > 1 else ())
        steps = new_initializer(graph, f"{bias.name}_steps", products, ir.DataType.FLOAT, names)
        inputs.append(whole.op("bias", "DequantizeLinear", [bias, steps], {"axis": 0}))
        inputs[-1].type, inputs[-1].shape = ir.TensorType(ir.DataType.FLOAT), bias.shape
    attributes = {name: value for name, value in node.attributes.items() if name not in DROPPED}
    result = whole.main(reading.op_type, inputs, attributes)
    step, zero = operand(node, reading.result), operand(node, reading.result + 1)
    if step is not None:  # a QGemm may give floats
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), node.outputs[0].shape
        result = whole.op("codes", "QuantizeLinear", [result, step, zero])
        result.type = ir.TensorType((zero.dtype if zero is not None else None) or ir.DataType.UINT8)
    whole.take_over(result)
