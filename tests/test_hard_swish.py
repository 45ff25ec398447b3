"""HardSwish between codes runs on integer kernels for cpu, means what it meant, and can be stripped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import model as models
from onnxq.passes.strip_qdq import StripQDQ
from onnxq.retarget import retarget
from onnxq.runtime import Session, optimized_nodes

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
swish (float[N,32,16,16] x) => (float[N,32,16,16] y)
<int64[2] sides = {2, 3}>
{
    [first] a = Conv <pads=[1,1,1,1]> (x, w1)
    [swish] b = HardSwish (a)
    [mean] m = ReduceMean (b, sides)
    [squeeze] s = Conv (m, w2)
    [gate] g = HardSigmoid (s)
    [excite] e = Mul (b, g)
    [last] y = Conv <pads=[1,1,1,1]> (e, w3)
}
"""
X = np.random.default_rng(0).normal(size=(8, 32, 16, 16)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shapes = {"w1": (32, 32, 3, 3), "w2": (32, 32, 1, 1), "w3": (32, 32, 3, 3)}
    return models.save(add_weights(TEXT, shapes), tmp_path / "m.onnx")


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_it_runs_on_integer_kernels(path: Path, activations: str) -> None:
    result = onnxq.quantize(path, [{"x": X}], target="cpu", activations=activations)
    assert result.numbers["sqnr_db"] > 30
    assert "HardSwish" not in {node.op_type for node in result.model.graph}
    nodes = optimized_nodes(result.model)
    assert nodes["QLinearConv"] == 3
    assert nodes["QLinearAdd"] == 1
    assert nodes["QLinearMul"] == 2
    assert nodes["QLinearGlobalAveragePool"] == 1
    assert nodes["DequantizeLinear"] <= 2  # around the gate's HardSigmoid, and at the end


def test_the_graph_means_what_the_kernels_compute(path: Path) -> None:
    model = onnxq.quantize(path, [{"x": X}], target="cpu").model
    literal, optimized = (Session(model, optimize=flag).run({"x": X})[0] for flag in (False, True))
    assert sqnr_db(literal, optimized) > 35


def test_stripping_gives_the_function_back(path: Path) -> None:
    model = onnxq.quantize(path, [{"x": X}], target="cpu", knobs={"bias_correction": False}).model
    assert StripQDQ()(model).modified
    assert not any(node.op_type.endswith("quantizeLinear") for node in model.graph)
    (found,), (expected,) = Session(model).run({"x": X}), Session(path).run({"x": X})
    assert sqnr_db(expected, found) > 35  # weights stay rounded


def test_it_changes_targets(path: Path, tmp_path: Path) -> None:
    result = tmp_path / "q.onnx"
    onnxq.quantize(path, [{"x": X}], target="cpu", output=result)
    for target in ("tensorrt", "cpu"):
        model = retarget(result, target).model
        (found,), (expected,) = Session(model).run({"x": X}), Session(path).run({"x": X})
        assert sqnr_db(expected, found) > 25
        assert optimized_nodes(model)["QLinearAdd"] == (target == "cpu")


@pytest.mark.parametrize("settings", [{"activations": "int4"}, {"exclude": ["HardSwish"]}, {"target": "tensorrt"}])
def test_elsewhere_it_stays_whole(path: Path, settings: dict) -> None:
    model = onnxq.quantize(path, [{"x": X}], **{"target": "cpu", **settings}).model
    assert [node.name for node in model.graph if node.op_type == "HardSwish"] == ["swish"]
    assert isinstance(model, ir.Model)
