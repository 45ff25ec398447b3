"""One-sided activations in a symmetric range: the function is the same, borders too, and codes lie twice as dense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
from conftest import add_weights

import onnxq
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.passes.shift_to_symmetric import ShiftToSymmetric
from onnxq.report.metrics import Sqnr
from onnxq.runtime import Session

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
CODES = "<float s = {0.031}, int8 z = {-117}> "
SILU = (
    "[gate] s1 = Sigmoid (x) [silu] a = Mul (x, s1)"
    " [q] c = QuantizeLinear (a, s, z) [d] d = DequantizeLinear (c, s, z) "
)
IMAGES = "g (float[N,4,7,7] x) => (float[N,6,H,W] y) " + CODES + "{ " + SILU
ROWS = "g (float[N,5,4] x) => (float[N,5,6] y) " + CODES + "{ " + SILU
GRAPHS = {
    "uneven pads and strides": (
        IMAGES + "[l] y = Conv <pads=[2,0,1,3], strides=[2,1], dilations=[1,2]> (d, w, b) }",
        {"w": (6, 4, 3, 3), "b": (6,)},
    ),
    "groups, no bias": (IMAGES + "[l] y = Conv <pads=[1,1,1,1], group=2> (d, w) }", {"w": (6, 2, 3, 3)}),
    "three layers and a reader of floats": (
        IMAGES + "[l] p = Conv <pads=[1,1,1,1]> (d, w) [k] q = Conv (d, v, b) [n] o = Conv <pads=[0,0,2,2]> (d, w)"
        "[m] r = ReduceMean <keepdims=1> (a) [sum] u = Add (p, q) [more] t = Add (u, o) [end] y = Add (t, r) }",
        {"w": (6, 4, 3, 3), "v": (6, 4, 1, 1), "b": (6,)},
    ),
    "MatMul with its bias behind it": (ROWS + "[l] p = MatMul (d, w) [end] y = Add (p, b) }", {"w": (4, 6), "b": (6,)}),
    "MatMul that is an output": (ROWS + "[l] y = MatMul (d, w) }", {"w": (4, 6)}),
    "Gemm": (
        "g (float[N,4] x) => (float[N,6] y) " + CODES + "{ " + SILU + "[l] y = Gemm <transB=1, alpha=0.5, beta=2.0>"
        "(d, w, b) }",
        {"w": (6, 4), "b": (6,)},
    ),
}


def network(text: str, shapes: dict[str, tuple[int, ...]]) -> ir.Model:
    model = add_weights(HEADER + text, shapes)
    common_passes.ShapeInferencePass()(model)
    return model


def samples(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    shape = [3, *list(model.graph.inputs[0].shape or [])[1:]]
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 2}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_codes_stay(name: str) -> None:
    """Symmetric codes of shifted values mean what codes with a zero point meant, to the borders."""
    model = network(*GRAPHS[name])
    expected = Session(model, optimize=False).run(samples(model))[0]
    rewrite = ShiftToSymmetric()
    assert rewrite(model).modified and rewrite.shifted == ["a"]
    np.testing.assert_allclose(Session(model, optimize=False).run(samples(model))[0], expected, rtol=1e-4, atol=1e-4)
    assert [value.name for value in model.graph.outputs] == ["y"]
    for node in model.graph:
        if graphs.is_quantize(node):
            assert not node.inputs[2].const_value.numpy().any()  # type: ignore[union-attr]
    assert not ShiftToSymmetric()(model).modified


@pytest.mark.parametrize(
    "reader", ["[l] y = Add (d, x)", '[l] y = Conv <auto_pad="SAME_UPPER"> (d, w)', "[l] y = MatMul (d, x)"]
)
def test_what_has_no_bias_to_take_it_back(reader: str) -> None:
    text = "g (float[N,4,4,4] x) => (float[N,4,4,4] y) " + CODES + "{ " + SILU + reader + " }"
    assert not ShiftToSymmetric()(network(text, {"w": (4, 4, 3, 3)} if " w)" in reader else {})).modified


WIDE = {
    "convolution": (
        "g (float[N,64,7,7] x) => (float[N,16,7,7] y) { [gate] s = Sigmoid (x) [silu] a = Mul (x, s)"
        "[l] y = Conv <pads=[1,1,1,1]> (a, w, b) }",
        {"w": (16, 64, 3, 3), "b": (16,)},
    ),
    "rows": (
        "g (float[N,32,64] x) => (float[N,32,16] y) { [gate] s = Sigmoid (x) [silu] a = Mul (x, s)"
        "[l] y = MatMul (a, w) }",
        {"w": (64, 16)},
    ),
}


@pytest.mark.parametrize("weights", ["int8", "int4", "float"])
@pytest.mark.parametrize("name", WIDE)
def test_a_silu_gains_most_of_a_bit(tmp_path: Path, name: str, weights: str) -> None:
    """Where activations make the error; where weights of 4 bits make it, it stays: no constant of theirs comes in."""
    model = network(*WIDE[name])
    ir.save(model, tmp_path / "model.onnx")
    exact = Session(tmp_path / "model.onnx").run(samples(model))[0]
    sqnr = []
    for shift in (False, True):
        result = onnxq.quantize(
            tmp_path / "model.onnx",
            [samples(model)],
            weights=weights,
            activations="int8",
            knobs={"shift": shift, "observer": "minmax", "bias_correction": False},
        )
        seen = Sqnr()
        seen.update(exact, Session(result.model, optimize=False).run(samples(model))[0])
        sqnr.append(seen.value or 0.0)
        assert result.numbers.get("shifted_activations", 0) == shift
    least, most = {"int8": (1.5, 7), "int4": (-0.1, 1), "float": (4, 7)}[weights]
    assert least < sqnr[1] - sqnr[0] < most


def test_only_symmetric_codes_are_helped(network: Path, calibration: Path) -> None:
    """Zero points do the same for the CPU's codes; the residual network's Relus are shifted for TensorRT alone."""
    shifted = {
        target: onnxq.quantize(network, calibration, target=target, knobs={"shift": True}).numbers
        for target in ("cpu", "tensorrt")
    }
    assert shifted["cpu"]["shifted_activations"] == 0 and shifted["tensorrt"]["shifted_activations"] == 1


def test_a_real_denoiser_gains(shared_data: Path) -> None:
    path = shared_data / "denoisers" / "mnist_unet_attention.onnx"
    knobs = {"step_floor_db": 0.0, "observer": "mse"}
    sqnr = {}
    for shift in (False, True):
        result = onnxq.quantize(path, steps=5, samples=32, knobs={"shift": shift, **knobs})
        sqnr[shift] = float(result.numbers["sqnr_db"])
        assert models.load(path).graph.outputs[0].name == result.model.graph.outputs[0].name
    assert sqnr[True] > sqnr[False] + 1
