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
IMAGES = "g (float[N,4,7,7] x) => (float[N,6,H,W] y) { [gate] s = Sigmoid (x) [silu] a = Mul (x, s) "
ROWS = "g (float[N,5,4] x) => (float[N,5,6] y) { [gate] s = Sigmoid (x) [silu] a = Mul (x, s) "
GRAPHS = {
    "uneven pads and strides": (
        IMAGES + "[l] y = Conv <pads=[2,0,1,3], strides=[2,1], dilations=[1,2]> (a, w, b) }",
        {"w": (6, 4, 3, 3), "b": (6,)},
    ),
    "groups, no bias": (IMAGES + "[l] y = Conv <pads=[1,1,1,1], group=2> (a, w) }", {"w": (6, 2, 3, 3)}),
    "two layers and another reader": (
        IMAGES + "[l] p = Conv <pads=[1,1,1,1]> (a, w) [k] q = Conv (a, v, b) [m] r = ReduceMean <keepdims=1> (a)"
        "[sum] u = Add (p, q) [end] y = Add (u, r) }",
        {"w": (6, 4, 3, 3), "v": (6, 4, 1, 1), "b": (6,)},
    ),
    "MatMul with its bias behind it": (ROWS + "[l] p = MatMul (a, w) [end] y = Add (p, b) }", {"w": (4, 6), "b": (6,)}),
    "MatMul that is an output": (ROWS + "[l] y = MatMul (a, w) }", {"w": (4, 6)}),
    "Gemm": (
        "g (float[N,4] x) => (float[N,6] y) { [silu] a = Softplus (x)"
        "[l] y = Gemm <transB=1, alpha=0.5, beta=2.0> (a, w, b) }",
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
def test_the_function_stays(name: str) -> None:
    model = network(*GRAPHS[name])
    expected = Session(model, optimize=False).run(samples(model))[0]
    rewrite = ShiftToSymmetric({"a": -1.7, "s": 0.4, "nothing": 1.0})
    assert rewrite(model).modified and rewrite.shifted == ["a"]
    np.testing.assert_allclose(Session(model, optimize=False).run(samples(model))[0], expected, rtol=1e-5, atol=1e-5)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert not ShiftToSymmetric({"a": -1.7})(model).modified
    layers = list(graphs.weighted_nodes(model.graph))
    assert all(item.activation.name != "a" for item in layers) and len(layers) in (1, 2)


@pytest.mark.parametrize("name", ["uneven pads and strides", "MatMul with its bias behind it"])
def test_a_silu_gains_most_of_a_bit(tmp_path: Path, name: str) -> None:
    """As wide as a layer has to be to be quantized; weights stay float, so that activations alone make the error."""
    text, shapes = GRAPHS[name]
    wide = {key: tuple({4: 64, 6: 16}.get(size, size) for size in shape) for key, shape in shapes.items()}
    model = network(
        text.replace("N,4,7", "N,64,7").replace("N,5,4", "N,5,64").replace("N,6,H", "N,16,H").replace("5,6]", "5,16]"),
        wide,
    )
    ir.save(model, tmp_path / "model.onnx")
    exact = Session(tmp_path / "model.onnx").run(samples(model))[0]
    sqnr = []
    for shift in (False, True):
        result = onnxq.quantize(
            tmp_path / "model.onnx",
            [samples(model)],
            weights="float",
            activations="int8",
            knobs={"shift": shift, "observer": "minmax"},
        )
        seen = Sqnr()
        seen.update(exact, Session(result.model, optimize=False).run(samples(model))[0])
        sqnr.append(seen.value or 0.0)
        assert result.numbers.get("shifted_activations", 0) == shift
    assert 3.5 < sqnr[1] - sqnr[0] < 7


def test_only_symmetric_codes_are_helped(network: Path, calibration: Path) -> None:
    """Zero points do the same for the CPU's codes; the residual network's Relus are shifted for TensorRT alone."""
    shifted = {
        target: onnxq.quantize(network, calibration, target=target, knobs={"shift": True}).numbers
        for target in ("cpu", "tensorrt")
    }
    assert "shifted_activations" not in shifted["cpu"] and shifted["tensorrt"]["shifted_activations"] == 1


def test_a_real_denoiser_gains(shared_data: Path) -> None:
    path = shared_data / "denoisers" / "mnist_unet_attention.onnx"
    sqnr = {}
    for shift in (False, True):
        result = onnxq.quantize(path, steps=5, samples=32, knobs={"shift": shift, "step_floor_db": 0.0})
        sqnr[shift] = float(result.numbers["sqnr_db"])
        assert models.load(path).graph.outputs[0].name == result.model.graph.outputs[0].name
    assert sqnr[True] > sqnr[False] + 0.5
