"""LSTMs on the CPU: weights become codes, onnxruntime's integer kernel computes what they mean, and all goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq import model as models
from onnxq.errors import OnnxqError
from onnxq.passes.lower_lstm import LowerLstm, RaiseLstm
from onnxq.passes.strip_qdq import StripQDQ
from onnxq.runtime import Session

INPUTS, HIDDEN, STEPS = 24, 32, 12


def network(direction: str, inputs: str = "", body: str = "s, h, c = LSTM") -> ir.Model:
    """A product, an LSTM over [sequence, batch, inputs], and a product of all directions' states."""
    directions = 2 if direction == "bidirectional" else 1
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    reader (float[{STEPS},N,{INPUTS}] x) => (float[{STEPS},N,24] y, float[{directions},N,{HIDDEN}] h)
    <int64[3] flat = {{{STEPS}, -1, {directions * HIDDEN}}}>
    {{
        [first] a = MatMul (x, w1)
        [lstm] {body} <hidden_size = {HIDDEN}, direction = "{direction}"> (a, w, r{inputs})
        [turn] t = Transpose <perm = [0, 2, 1, 3]> (s)
        [flatten] f = Reshape (t, flat)
        [last] y = MatMul (f, w2)
    }}
    """
    shapes = {
        "w1": (INPUTS, INPUTS), "w": (directions, 4 * HIDDEN, INPUTS), "r": (directions, 4 * HIDDEN, HIDDEN),
        "w2": (directions * HIDDEN, 24),
    }  # fmt: skip
    if inputs:
        shapes |= {"b": (directions, 8 * HIDDEN), "p": (directions, 3 * HIDDEN)}
    return add_weights(text, shapes)


def samples(count: int = 16) -> list[dict[str, np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(0)
    return [{"x": generator.normal(size=(STEPS, 1, INPUTS)).astype(np.float32)} for _ in range(count)]


def quantized(model: ir.Model, folder: Path, **options: Any) -> onnxq.Result:
    path = models.save(model, folder / "model.onnx")
    return onnxq.quantize(path, samples(), target=options.pop("target", "cpu"), **options)


@pytest.mark.parametrize("inputs", ["", ", b", ", b, , , , p"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_the_integer_kernel_computes_what_the_float_one_does(direction: str, inputs: str, tmp_path: Path) -> None:
    result = quantized(network(direction, inputs), tmp_path)
    assert result.numbers["quantized_nodes"] == result.numbers["weighted_nodes"] == 3
    assert result.numbers["optimized_nodes"]["DynamicQuantizeLSTM"] == 1
    assert result.numbers["integer_kernels"] == 3
    assert not result.numbers["left_float"]
    assert min(result.numbers["outputs"].values()) > 25


@pytest.mark.parametrize("weights", ["int8", "int8:tensor", "int4", "uint8"])
def test_the_kernel_reads_the_codes_that_were_stored(weights: str, tmp_path: Path) -> None:
    """Raised again, float inputs make the only difference to the integer kernel."""
    lowered = quantized(network("bidirectional", ", b"), tmp_path, weights=weights).model
    feed = samples(1)[0]
    found = Session(lowered).run(feed)
    node = next(node for node in lowered.graph if layer_nodes.is_integer_lstm(node))
    assert np.abs(node.inputs[1].const_value.numpy()).max() == 127  # narrower ones would lie in bytes all the same
    RaiseLstm()(lowered)
    assert graphs.is_op(node, "LSTM")
    expected = Session(lowered).run(feed)
    assert all(sqnr_db(wanted, output) > 30 for wanted, output in zip(expected, found, strict=True))


def test_strip_gives_a_float_lstm_back(tmp_path: Path) -> None:
    result = quantized(network("forward", ", b"), tmp_path)
    stripped = result.model
    StripQDQ()(stripped)
    assert not any(layer_nodes.is_integer_lstm(node) or graphs.is_dequantize(node) for node in stripped.graph)
    feed = samples(1)[0]
    expected = Session(network("forward", ", b")).run(feed)
    assert all(sqnr_db(a, b) > 30 for a, b in zip(expected, Session(stripped).run(feed), strict=True))


def test_a_result_is_no_float_model(tmp_path: Path) -> None:
    result = quantized(network("forward"), tmp_path, exclude=["MatMul"])
    models.drop_metadata(result.model, "recipe")
    with pytest.raises(OnnxqError, match="found one that is quantized already"):
        models.check_float(result.model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exclude": ["lstm"]}, "excluded"),
        ({"activations": "int16"}, "8 bits"),
        ({"target": "tensorrt"}, "no form with Q/DQ"),
    ],
)
def test_what_stays_float_says_why(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    numbers = quantized(network("forward"), tmp_path, **options).numbers
    assert reason in numbers["left_float"]["lstm"]
    assert numbers["weighted_nodes"] == 3 and numbers["quantized_nodes"] < 3
    warned = any("1 of 3 layers stay float; lstm: " in warning for warning in numbers["warnings"])
    assert warned is (reason != "excluded")  # who excludes a layer knows


def test_computed_weights_stay_float(tmp_path: Path) -> None:
    model = network("forward")
    lstm = next(node for node in model.graph if node.op_type == "LSTM")
    tape = ir.tape.Tape()
    computed = tape.op("Mul", [lstm.inputs[1], tape.op("ReduceMax", [model.graph.inputs[0]], {"keepdims": 0})])
    model.graph.insert_before(next(iter(model.graph)), tape.nodes)
    lstm.replace_input_with(1, computed)
    numbers = quantized(model, tmp_path).numbers
    assert numbers["left_float"] == {"lstm": "its weights are computed"}


def test_a_weight_without_codes_is_left_alone() -> None:
    model = network("forward")
    assert not LowerLstm()(model).modified and not RaiseLstm()(model).modified


def test_the_hint_names_layers_that_can_be_kept(tmp_path: Path) -> None:
    """What only moves the bad values of another node, as Transpose and Reshape here, is no layer to leave in float."""
    model = network("forward")
    for name in ("w", "r"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(300 * value.const_value.numpy(), name=name)  # gates that jump
    numbers = quantized(model, tmp_path, weights="int2", samples=4).numbers
    hint = next(step for step in numbers["next_steps"] if step.startswith("keep the worst layers"))
    assert {layer["op"] for layer in numbers["layers"]} >= {"Reshape", "DynamicQuantizeLSTM"}
    assert hint.count("'lstm'") == 1 and "turn" not in hint and "flatten" not in hint
