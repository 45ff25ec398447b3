"""Cross-layer equalisation keeps the function, evens out ranges, and helps weights with one scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models
from onnxq.passes.equalize_layers import EqualizeLayers
from onnxq.runtime import Session

CHAIN = """
<ir_version: 10, opset_import: ["" : 21]>
chain (float[N,3,8,8] x) => (float[N,6] y)
<float zero = {0.0}, float six = {6.0}>
{
    [first] a = Conv <pads=[1,1,1,1]> (x, w1, b1)
    [relu] r = Relu (a)
    [depthwise] d = Conv <pads=[1,1,1,1], group=8> (r, w2, b2)
    [leaky] l = LeakyRelu (d)
    [grouped] g = Conv <group=2> (l, w3)
    [clip] c = Clip (g, zero, six)
    [last] e = Conv (c, w4)
    [pool] p = GlobalAveragePool (e)
    [flat] f = Flatten (p)
    [up] u = MatMul (f, w5)
    [bias] v = Add (u, b5)
    [relu2] s = Relu (v)
    [down] y = Gemm <transB=1> (s, w6)
}
"""
CHAIN_SHAPES = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (12, 4, 1, 1), "w4": (10, 12, 1, 1),
    "w5": (10, 16), "b5": (16,), "w6": (6, 16),
}  # fmt: skip
X = np.random.default_rng(5).standard_normal((4, 3, 8, 8)).astype(np.float32)


def uneven() -> ir.Model:
    """The chain, with output channels whose ranges differ a hundredfold."""
    model = add_weights(CHAIN, CHAIN_SHAPES)
    spread = np.random.default_rng(6)
    for name in ("w1", "w2"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        factors = (10 ** spread.uniform(-1, 1, 8)).reshape(-1, 1, 1, 1)
        value.const_value = ir.tensor((value.const_value.numpy() * factors).astype(np.float32), name=name)
    models.normalise(model)
    return model


def weight(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def test_the_function_stays() -> None:
    model = uneven()
    before = Session(model).run({"x": X})[0]
    assert EqualizeLayers()(model).modified
    np.testing.assert_allclose(Session(model).run({"x": X})[0], before, rtol=1e-4, atol=1e-5)
    assert not EqualizeLayers()(model).modified


def test_both_sides_of_a_channel_get_one_range() -> None:
    model = uneven()
    EqualizeLayers()(model)
    made = np.abs(weight(model, "w1")).max(axis=(1, 2, 3))
    read = np.abs(weight(model, "w2")).max(axis=(1, 2, 3))
    np.testing.assert_allclose(made, read, rtol=0.03)
    made = np.abs(weight(model, "w5")).max(axis=0)
    read = np.abs(weight(model, "w6")).max(axis=0)
    np.testing.assert_allclose(made, read, rtol=0.03)


def test_nothing_goes_through_a_clip() -> None:
    model = uneven()
    before = weight(model, "w4").copy()
    EqualizeLayers()(model)
    np.testing.assert_array_equal(weight(model, "w4"), before)


@pytest.mark.parametrize("shared", ["w2", "b1"])
def test_what_others_read_is_left_alone(shared: str) -> None:
    model = uneven()
    graph = model.graph
    value = graph.initializers[shared]
    node = ir.node("Abs", [value], name="other")
    graph.append(node)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "z", ir.DataType.FLOAT, value.shape
    graph.outputs.append(node.outputs[0])
    before = weight(model, "w1").copy()
    EqualizeLayers()(model)
    np.testing.assert_array_equal(weight(model, "w1"), before)


def test_one_scale_for_all_channels_gets_better(tmp_path: Path) -> None:
    """The paper's claim: with one scale per weight, equalised channels lose far less."""
    path, data = tmp_path / "uneven.onnx", tmp_path / "data.npz"
    models.save(uneven(), path)
    np.savez(data, x=X)
    sqnr = [
        onnxq.quantize(path, data, weights="int8:tensor", activations="float", knobs={"equalize": on}).numbers[
            "sqnr_db"
        ]
        for on in (False, True)
    ]
    assert sqnr[1] > sqnr[0] + 3
