"""A thin first layer and the MaxPool behind it run in float, and only what the pool leaves becomes codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import add_weights
from onnx_ir.passes import PassResult

import onnxq
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.passes.keep_pools_float import KeepPoolsFloat
from onnxq.runtime import Session
from onnxq.targets import get

STEM = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,3,32,32] x) => (float[N,16,16,16] y)
{
    [first] a = Conv <pads=[3,3,3,3]> (x, w1)
    b = Relu (a)
    [pool] p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (b)
    [second] c = Conv <pads=[1,1,1,1]> (p, w2)
    d = Relu (c)
    e = Add (p, d)
    [third] y = Conv <pads=[1,1,1,1]> (e, w3)
}
"""
SHAPES = {"w1": (32, 3, 7, 7), "w2": (32, 32, 3, 3), "w3": (16, 32, 3, 3)}


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    path = models.save(add_weights(STEM, SHAPES), tmp_path / "network.onnx")
    x = np.random.default_rng(0).standard_normal((8, 3, 32, 32), np.float32)
    numbers = onnxq.quantize(path, [{"x": x}], target="cpu", output=tmp_path / "quantized.onnx").numbers
    assert numbers["left_float"] == {"first": "a thin first layer is faster in float"}
    return tmp_path / "quantized.onnx"


def pool_reads(path: Path) -> str:
    """The op whose result the pool reads in the session that is deployed."""
    optimized = path.with_name("optimized.onnx")
    Session(path, optimized_path=str(optimized))
    pool = next(node for node in models.read(optimized).graph if "MaxPool" in node.op_type)
    producer = None if pool.inputs[0] is None else pool.inputs[0].producer()
    return "" if producer is None else producer.op_type


def test_the_pool_behind_a_float_layer_reads_floats(quantized: Path) -> None:
    assert pool_reads(quantized) == "Conv"
    graph = models.load(quantized).graph
    pair = next(node for node in graph if graphs.is_quantize(node) and node.inputs[0] is not None
                and graphs.is_op(node.inputs[0].producer(), "MaxPool"))  # fmt: skip
    assert [value.const_value.shape for value in pair.inputs[1:]] == [(32,), (32,)]  # type: ignore[union-attr]
    assert not get("cpu").lint(models.load(quantized))


def test_it_computes_the_same_without_and_is_still_needed(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once onnxruntime leaves such pools alone, the pass can go."""
    x = np.random.default_rng(1).standard_normal((4, 3, 32, 32), np.float32)
    expected = Session(quantized).run({"x": x})[0]
    monkeypatch.setattr(KeepPoolsFloat, "call", lambda self, model: PassResult(model, False))
    rows = np.random.default_rng(0).standard_normal((8, 3, 32, 32), np.float32)
    other = quantized.with_name("other.onnx")
    onnxq.quantize(quantized.with_name("network.onnx"), [{"x": rows}], target="cpu", output=other)
    assert pool_reads(other) == "QuantizeLinear"
    np.testing.assert_array_equal(Session(other).run({"x": x})[0], expected)


def test_a_pool_behind_codes_reads_codes(tmp_path: Path) -> None:
    text = STEM.replace("float[N,3,", "float[N,32,")
    path = models.save(add_weights(text, SHAPES | {"w1": (32, 32, 7, 7)}), tmp_path / "network.onnx")
    x = np.random.default_rng(0).standard_normal((8, 32, 32, 32), np.float32)
    model = onnxq.quantize(path, [{"x": x}], target="cpu", output=tmp_path / "quantized.onnx").model
    assert pool_reads(tmp_path / "quantized.onnx") == "QLinearConv"
    # Where the pair stands behind the pool alone, onnxruntime moves it in front of it, and that is well.
    first = next(node for node in model.graph if node.name == "pool").inputs[0]
    assert first is not None and graphs.is_dequantized(first)
    while graphs.is_dequantized(first) or graphs.is_quantize(first.producer()):
        first = first.producer().inputs[0]  # type: ignore[union-attr]
        assert first is not None
    next(node for node in model.graph if node.name == "pool").replace_input_with(0, first)
    assert not KeepPoolsFloat()(model).modified


def test_other_targets_read_it(quantized: Path) -> None:
    """The scales of one activation, written for each channel, are one scale to those who take Q/DQ out."""
    from onnxq import retarget

    network = quantized.with_name("network.onnx")
    x = np.random.default_rng(1).standard_normal((4, 3, 32, 32), np.float32)
    stripped = models.save(retarget.strip(quantized), quantized.with_name("float.onnx"))
    found, expected = Session(stripped).run({"x": x})[0], Session(network).run({"x": x})[0]
    assert 10 * np.log10(np.mean(expected**2) / np.mean((found - expected) ** 2)) > 35
    moved = retarget.retarget(quantized, "tensorrt")
    assert moved.quantized_nodes == ["second", "third"]
    assert not get("tensorrt").lint(moved.model)
