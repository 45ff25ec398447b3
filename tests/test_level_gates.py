"""HardSwish and SiLU whose channels are levelled compute what they did, and lose less when they are rounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import model as models
from onnxq.passes.level_gates import LevelGates, gates
from onnxq.passes.strip_qdq import StripQDQ
from onnxq.runtime import Session, optimized_nodes

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
gated (float[N,32,12,12] x) => (float[N,24] y)
<float[1] half = {0.5}, float[1] less = {-0.1}>
{
    [first] a = Conv (x, w1, b1)
GATE
    [deep] c = Conv <group=32, pads=[1,1,1,1]> (b, w2)
    r = Relu (c)
    [last] d = Conv (r, w3)
    p = GlobalAveragePool (d)
    y = Flatten (p)
}
"""
GATES = {
    "hard swish": "    [swish] b = HardSwish (a)",
    "silu": "    [sigmoid] s = Sigmoid (a)\n    [silu] b = Mul (a, s)",
    "shifted hard swish": "    [swish] h = HardSwish (a)\n    m = Mul (half, h)\n    b = Add (m, less)",
    "silu, turned": "    [sigmoid] s = Sigmoid (a)\n    [silu] b = Mul (s, a)",
}
SHAPES = {"w1": (32, 32, 1, 1), "b1": (32,), "w2": (32, 1, 3, 3), "w3": (24, 32, 1, 1)}
X = np.random.default_rng(0).normal(size=(16, 32, 12, 12)).astype(np.float32)


def network(gate: str, outputs: str = "float[N,24] y") -> ir.Model:
    """Three channels are two hundred times the others, before weights that are so much smaller."""
    text = TEXT.replace("GATE", GATES[gate]).replace("float[N,24] y", outputs)
    model = add_weights(text, SHAPES)
    for name, factor in (("w1", 200.0), ("b1", 200.0), ("w2", 1 / 200.0)):
        array = model.graph.initializers[name].const_value.numpy().copy()
        array[[3, 11, 20]] *= factor
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


@pytest.mark.parametrize("gate", list(GATES))
def test_the_function_stays(gate: str, tmp_path: Path) -> None:
    model = models.load(models.save(network(gate), tmp_path / "m.onnx"))
    (expected,) = Session(model).run({"x": X})
    levels = LevelGates({"b": np.random.default_rng(1).uniform(0.01, 100, 32)})
    assert levels(model).modified and levels.levelled == ["b"]
    found, value = Session(model, taps=["b_rescaled"]).run({"x": X}, ["y", "b_rescaled"])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert not LevelGates({"b": np.full(32, 2.0)})(model).modified  # once
    assert value.shape == (16, 32, 12, 12)


@pytest.mark.parametrize("outputs", ["float[N,24] y, float[N,32,12,12] a", "float[N,24] y, float[N,32,12,12] b"])
def test_what_others_read_is_left_alone(outputs: str) -> None:
    assert not gates(network("hard swish", outputs).graph)


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_it_is_the_default_where_it_pays(gate: str, target: str, tmp_path: Path) -> None:
    path = models.save(network(gate), tmp_path / "m.onnx")
    plain, level = (
        onnxq.quantize(path, [{"x": X}], target=target, knobs={"smooth": smooth}).numbers["sqnr_db"]
        for smooth in (0, 0.75)
    )
    assert level > plain + 6
    even = models.save(add_weights(TEXT.replace("GATE", GATES[gate]), SHAPES), tmp_path / "even.onnx")
    names = {node.name for node in onnxq.quantize(even, [{"x": X}], target=target).model.graph}
    assert not any(name.endswith("_argument") for name in names if name)


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("gate", ["hard swish", "silu"])
def test_a_levelled_gate_runs_on_integer_kernels_and_can_be_stripped(
    gate: str, activations: str, tmp_path: Path
) -> None:
    path = models.save(network(gate), tmp_path / "m.onnx")
    result = onnxq.quantize(path, [{"x": X}], target="cpu", activations=activations)
    model, nodes = result.model, optimized_nodes(result.model)
    assert nodes["QLinearConv"] == 4 and nodes["QLinearMul"] == 1 and nodes["QLinearAdd"] == 0
    assert nodes["QLinearSigmoid"] == (1 if gate == "silu" else 0) and nodes["Sigmoid"] == 0
    assert all(value.uses() for value in model.graph.initializers.values())
    assert result.numbers["quantized_nodes"] == result.numbers["weighted_nodes"] == 3  # the gate's is none of them
    assert "HardSigmoid" not in nodes and "Mul" not in nodes
    literal, optimized = (Session(model, optimize=flag).run({"x": X})[0] for flag in (False, True))
    assert sqnr_db(literal, optimized) > 30
    assert StripQDQ()(model).modified
    assert sqnr_db(Session(path).run({"x": X})[0], Session(model).run({"x": X})[0]) > 30  # weights stay rounded


@pytest.mark.parametrize("gate", ["hard swish", "silu"])
@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_levelled_values_are_not_compared_with_what_they_were(gate: str, target: str, tmp_path: Path) -> None:
    path = models.save(network(gate), tmp_path / "m.onnx")
    result = onnxq.quantize(path, [{"x": X}] * 4, target=target, output=tmp_path / "q.onnx")
    assert any(value.name.endswith("_rescaled") for node in result.model.graph for value in node.outputs)
    compared = onnxq.compare(path, tmp_path / "q.onnx", [{"x": X}], latency=False)
    assert "last" in {layer["name"] for layer in compared.layers} <= {"deep", "last"}
    assert all(layer["sqnr_db"] > 15 for layer in compared.layers)
