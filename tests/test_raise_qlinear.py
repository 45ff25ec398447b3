"""Integer operators of onnxruntime's older format: read as what they mean, and brought to either target."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

from onnxq import model as models
from onnxq import retarget
from onnxq.errors import OnnxqError
from onnxq.passes.raise_qlinear import READINGS
from onnxq.runtime import Session

NETWORK = """
<ir_version: 10, opset_import: ["" : 17]>
network (float[N,16,12,12] x) => (float[N,24] y)
{
    [stem] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    s = Sigmoid (a)
    [gate] g = Mul (a, s)
    [right] b = Conv <pads = [1, 1, 1, 1]> (g, w2)
    l = LeakyRelu <alpha = 0.1> (b)
    [shortcut] d = Add (l, g)
    [joined] j = Concat <axis = 1> (d, g)
    [shrink] k = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (j)
    [whole] p = GlobalAveragePool (k)
    f = Flatten (p)
    [classes] y = Gemm <transB = 1> (f, w3, b3)
}
"""
SHAPES = {"w1": (32, 16, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "w3": (24, 64), "b3": (24,)}
EXTRA = """
<ir_version: 10, opset_import: ["" : 13]>
extra (float[N,6,32] x) => (float[N,48] y)
{
    [first] a = MatMul (x, w1)
    s = Softmax <axis = -1> (a)
    [second] b = MatMul (s, w2)
    y = ReduceMean <axes = [1], keepdims = 0> (b)
}
"""
EXTRA_SHAPES = {"w1": (32, 64), "w2": (64, 48)}


def samples(shape: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(count, *shape)).astype(np.float32)


class Reader:
    """What onnxruntime's quantizer reads calibration data from."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.rows, None)
        return None if row is None else {"x": row[None]}


def by_onnxruntime(text: str, shapes: dict[str, tuple[int, ...]], folder: Path, **options: object) -> tuple[Path, Path]:
    """A float model, and its integer operators."""
    from onnxruntime.quantization import QuantFormat, quantize_static

    logging.disable(logging.WARNING)
    model = add_weights(text, shapes)
    source, output = folder / "float.onnx", folder / "integers.onnx"
    ir.save(model, source)
    rows = samples(tuple(model.graph.inputs[0].shape[1:]), 32)  # type: ignore[index,arg-type]
    quantize_static(str(source), str(output), Reader(rows), quant_format=QuantFormat.QOperator, **options)
    logging.disable(logging.NOTSET)
    return source, output


def run(model: Path | ir.Model, x: np.ndarray, optimize: bool = True) -> np.ndarray:
    found: np.ndarray = Session(model, optimize=optimize).run({"x": x})[0]
    return found


@pytest.mark.parametrize("per_channel", [False, True])
def test_convolutions_sums_and_pools_are_read(per_channel: bool, tmp_path: Path) -> None:
    source, integers = by_onnxruntime(NETWORK, SHAPES, tmp_path, per_channel=per_channel)
    ops = {node.op_type for node in ir.load(integers).graph}
    assert {"QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearConcat"} <= ops
    assert {"QLinearAveragePool", "QLinearGlobalAveragePool", "QGemm"} <= ops
    x = samples((16, 12, 12), 8)
    model = retarget.strip(integers)
    assert not any(node.op_type in READINGS or "Quantize" in node.op_type for node in model.graph)
    assert sqnr_db(run(source, x), run(model, x)) > 30  # weights and biases are rounded, activations are not
    for target in ("cpu", "tensorrt"):
        fixed = retarget.retarget(integers, target)
        assert len(fixed.quantized_nodes) == 3
        assert sqnr_db(run(integers, x), run(fixed.model, x, optimize=target == "cpu")) > 25


def test_products_and_means_are_read(tmp_path: Path) -> None:
    source, integers = by_onnxruntime(EXTRA, EXTRA_SHAPES, tmp_path)
    assert {"QLinearMatMul", "QLinearSoftmax"} <= {node.op_type for node in ir.load(integers).graph}
    x = samples((6, 32), 8)
    model = retarget.strip(integers)
    assert [node.op_type for node in model.graph] == ["MatMul", "Softmax", "MatMul", "ReduceMean"]
    assert sqnr_db(run(source, x), run(model, x)) > 30


def test_scales_that_are_computed_are_refused(tmp_path: Path) -> None:
    model = ir.load(by_onnxruntime(EXTRA, EXTRA_SHAPES, tmp_path)[1])
    node = next(node for node in model.graph if node.op_type == "QLinearMatMul")
    scale = ir.Value(name="scale", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
    model.graph.inputs.append(scale)
    node.replace_input_with(1, scale)
    path = models.save(model, tmp_path / "computed.onnx")
    with pytest.raises(OnnxqError, match="found QLinearMatMul"):
        retarget.strip(path)
