"""Ranges of activations that are found while the model runs: written, run, learned with, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import add_weights, sqnr_db
from typer.testing import CliRunner

import onnxq
from onnxq import graph as graphs
from onnxq import layer_nodes, retarget, targets
from onnxq import model as models
from onnxq.autograd.interpreter import TorchGraph
from onnxq.calibration import calibrate
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.runtime import Session

WIDTH = 64
NETWORK = f"""
<ir_version: 10, opset_import: ["" : 21]>
reader (float[N,7,{WIDTH}] x) => (float[N,7,48] y, float[N,7,32] z)
{{
    [query] q = MatMul (x, w1)
    [key] k = MatMul (x, w2)
    s = Mul (q, k)
    r = Relu (s)
    [last] y = MatMul (r, w3)
    [tap] z = MatMul (r, w4)
}}
"""
SHAPES = {"w1": (WIDTH, WIDTH), "w2": (WIDTH, WIDTH), "w3": (WIDTH, 48), "w4": (WIDTH, 32)}
MIXED = """
<ir_version: 10, opset_import: ["" : 21]>
mixed (float[N,16,8,8] x) => (float[N,24] y)
{
    [convolution] c = Conv <pads = [1, 1, 1, 1]> (x, w1)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    [classes] y = Gemm <transB = 1> (f, w2, b2)
}
"""
MIXED_SHAPES = {"w1": (32, 16, 3, 3), "w2": (24, 32), "b2": (24,)}


def feeds(count: int = 4, scale: float = 1.0) -> list[dict[str, np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(0)
    return [{"x": (scale * generator.normal(size=(1, 7, WIDTH))).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return models.save(add_weights(NETWORK, SHAPES), tmp_path / "network.onnx")


def run(model: Path | ir.Model, feed: dict[str, np.ndarray[Any, Any]], optimize: bool = True) -> np.ndarray[Any, Any]:
    return np.concatenate([value.reshape(-1) for value in Session(model, optimize=optimize).run(feed)])


def test_products_run_on_integers_without_data(network: Path) -> None:
    result = onnxq.quantize(network, recipe="int8-dynamic")
    assert result.numbers["target"] == "cpu"  # the only one that has kernels for it
    assert result.numbers["quantized_nodes"] == result.numbers["weighted_nodes"] == 4
    assert result.numbers["integer_kernels"] == 4
    assert "MatMul" not in result.numbers["optimized_nodes"]
    makers = [node for node in result.model.graph if graphs.is_op(node, "DynamicQuantizeLinear")]
    assert len(makers) == 2  # one for each value, whoever reads it
    assert not targets.get("cpu").lint(result.model)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_ranges_follow_what_is_there(network: Path, scale: float) -> None:
    """A calibrated model is right at the scale that it saw; this one at each."""
    result = onnxq.quantize(network, recipe="int8-dynamic")
    for feed in feeds(scale=scale):
        assert sqnr_db(run(network, feed), run(result.model, feed)) > 30


def test_torch_computes_the_same_and_hands_gradients_on(network: Path) -> None:
    model, cpu = models.load(network), targets.get("cpu")
    InsertQDQ(cpu.place(model.graph, cpu.scheme("int8", "dynamic")).sites)(model)
    calibrate.set_weight_scales(model)
    feed = feeds()[0]
    found = TorchGraph(model).run({"x": torch.from_numpy(feed["x"])}, ["y"])["y"]
    expected = Session(model, optimize=False).run(feed, ["y"])[0]
    assert sqnr_db(expected, found.detach().numpy()) > 60
    gradients = []
    for graph in (models.load(network), model):
        x = torch.from_numpy(feed["x"]).requires_grad_()
        TorchGraph(graph).run({"x": x}, ["y"])["y"].square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.numpy())
    assert sqnr_db(*gradients) > 20
    cpu.lower(model)
    lowered = TorchGraph(model).run({"x": torch.from_numpy(feed["x"])}, ["y"])["y"]
    assert sqnr_db(expected, lowered.numpy()) > 60


@pytest.mark.parametrize(
    ("recipe", "knobs", "floor_db"),
    [
        ("int8", {}, 30), ("gptq", {}, 13), ("adaround", {"iterations": 20}, 10), ("smoothquant", {}, 30),
        ("rex", {}, 15), ("zeroquant", {}, 30),
    ],
)  # fmt: skip
def test_other_recipes_take_them(network: Path, recipe: str, knobs: dict[str, Any], floor_db: float) -> None:
    result = onnxq.quantize(network, feeds(16), recipe=recipe, target="cpu", activations="dynamic", knobs=knobs)
    assert result.numbers["quantized_nodes"] == result.numbers["integer_kernels"] == 4
    assert result.numbers["sqnr_db"] > floor_db
    assert result.numbers["activations"].endswith("dynamic")


def test_the_ends_are_dynamic_too(network: Path) -> None:
    options: dict[str, Any] = {"target": "cpu", "activations": "dynamic", "weights": "int4", "first_last": "int8"}
    result = onnxq.quantize(network, feeds(), **options)
    assert not any(graphs.is_quantize(node) for node in result.model.graph)
    assert result.numbers["integer_kernels"] == 4


def test_convolutions_stay_float_and_say_why(tmp_path: Path) -> None:
    path = models.save(add_weights(MIXED, MIXED_SHAPES), tmp_path / "mixed.onnx")
    result = onnxq.quantize(path, recipe="int8-dynamic")
    assert list(result.numbers["left_float"]) == ["convolution"]
    assert result.numbers["integer_kernels"] == 1
    with pytest.raises(OnnxqError, match="need ranges that are known") as caught:
        onnxq.quantize(path, recipe="int8-dynamic", exclude=("classes",))
    assert "--recipe int8" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "tensorrt"}, "known when TensorRT builds"),
        ({"target": "cpu", "weights": "float"}, "weights of up to 8 bits"),
        ({"target": "cpu", "weights": "int4:32"}, "without blocks"),
    ],
)
def test_what_has_no_kernel_is_refused(network: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OnnxqError, match=words):
        onnxq.quantize(network, activations="dynamic", **options)


def test_the_float_model_comes_back(network: Path, tmp_path: Path) -> None:
    onnxq.quantize(network, recipe="int8-dynamic", output=tmp_path / "codes.onnx")
    model = retarget.strip(tmp_path / "codes.onnx")
    assert not any(graphs.is_dequantize(node) or node.op_type in layer_nodes.QUANTIZED_OPS for node in model.graph)
    assert sqnr_db(run(network, feeds()[0]), run(model, feeds()[0])) > 40  # weights are rounded, activations are not


def test_a_target_keeps_them_or_says_that_it_cannot(network: Path, tmp_path: Path) -> None:
    onnxq.quantize(network, recipe="int8-dynamic", output=tmp_path / "codes.onnx")
    on_cpu = retarget.retarget(tmp_path / "codes.onnx", "cpu")
    assert not on_cpu.lost_ranges and sorted(on_cpu.quantized_nodes) == ["key", "last", "query", "tap"]
    np.testing.assert_array_equal(run(on_cpu.model, feeds()[0]), run(tmp_path / "codes.onnx", feeds()[0]))
    output = tmp_path / "fixed.onnx"
    found = CliRunner().invoke(
        app, ["lint", str(tmp_path / "codes.onnx"), "--target", "tensorrt", "--fix", str(output)]
    )
    assert "weights alone have codes" in found.stdout
    assert sqnr_db(run(network, feeds()[0]), run(output, feeds()[0], optimize=False)) > 40


@pytest.mark.parametrize("per_channel", [False, True])
def test_what_onnxruntime_writes_is_read(per_channel: bool, network: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    theirs = tmp_path / "theirs.onnx"
    quantize_dynamic(str(network), str(theirs), per_channel=per_channel, weight_type=QuantType.QInt8)
    feed = feeds()[0]
    model = retarget.strip(theirs)
    assert {node.op_type for node in model.graph} == {"MatMul", "Mul", "Relu"}
    assert sqnr_db(run(network, feed), run(model, feed)) > 35
    fixed = retarget.retarget(theirs, "cpu")
    assert len(fixed.quantized_nodes) == 4
    assert sqnr_db(run(theirs, feed), run(fixed.model, feed)) > 35


def test_integer_convolutions_of_onnxruntime_are_read(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    text = MIXED.replace("Gemm <transB = 1> (f, w2, b2)", "MatMul (f, w2)")  # a Gemm's shapes trip their quantizer
    mixed = add_weights(text, {"w1": (32, 16, 3, 3), "w2": (32, 24)})
    path, theirs = models.save(mixed, tmp_path / "mixed.onnx"), tmp_path / "theirs.onnx"
    quantize_dynamic(str(path), str(theirs))
    feed = {"x": np.random.default_rng(4).normal(size=(4, 16, 8, 8)).astype(np.float32)}
    assert {"ConvInteger", "MatMulInteger"} <= {node.op_type for node in models.load(theirs).graph}
    model = retarget.strip(theirs)
    assert not any(node.op_type in layer_nodes.QUANTIZED_OPS for node in model.graph)
    assert sqnr_db(run(path, feed), run(model, feed)) > 35


def test_the_command_line_tells_it(network: Path, tmp_path: Path) -> None:
    output, numbers = tmp_path / "codes.onnx", tmp_path / "numbers.json"
    arguments = ["quantize", str(network), "--recipe", "int8-dynamic", "-o", str(output), "--json", str(numbers)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "uint8 per tensor, dynamic" in found.output
    assert json.loads(numbers.read_text())["target"] == "cpu"
    first = output.read_bytes()
    output.unlink()
    assert CliRunner().invoke(app, arguments).exit_code == 0 and output.read_bytes() == first


def test_inputs_that_nothing_can_be_made_for_are_asked_for_once(tmp_path: Path) -> None:
    text = NETWORK.replace(f"(float[N,7,{WIDTH}] x)", f"(float[N,7,{WIDTH}] x, int64 rate)")
    path = models.save(add_weights(text, SHAPES), tmp_path / "rated.onnx")
    with pytest.raises(OnnxqError, match="int64 input 'rate'") as caught:
        onnxq.quantize(path, recipe="int8-dynamic")
    assert "one sample is enough" in (caught.value.hint or "")
    with pytest.raises(OnnxqError) as caught:
        onnxq.quantize(path, target="cpu")
    assert "one sample is enough" not in (caught.value.hint or "")


def test_codes_that_onnxruntime_makes_of_constants_are_worked_out(tmp_path: Path) -> None:
    """Weights that lie in Constant nodes, as paddle2onnx writes them, have their codes made while the model runs."""
    from onnxruntime.quantization import quantize_dynamic

    text = MIXED.replace("[convolution]", "w1 = Identity (w)\n    [convolution]")
    text = text.replace("Gemm <transB = 1> (f, w2, b2)", "MatMul (f, w2)")
    mixed = ir.to_proto(add_weights(text, {"w": (32, 16, 3, 3), "w2": (32, 24)}))
    held = next(item for item in mixed.graph.initializer if item.name == "w")
    identity = next(node for node in mixed.graph.node if node.op_type == "Identity")
    identity.op_type = "Constant"
    del identity.input[:]
    identity.attribute.add(name="value", type=4).t.CopyFrom(held)
    mixed.graph.initializer.remove(held)
    source, theirs = tmp_path / "source.onnx", tmp_path / "theirs.onnx"
    source.write_bytes(mixed.SerializeToString())
    quantize_dynamic(str(source), str(theirs))
    assert [node.op_type for node in ir.load(theirs).graph].count("DynamicQuantizeLinear") == 3
    feed = {"x": np.random.default_rng(4).normal(size=(4, 16, 8, 8)).astype(np.float32)}
    model = retarget.strip(theirs)
    assert not any(node.op_type in layer_nodes.QUANTIZED_OPS for node in model.graph)
    assert sqnr_db(run(source, feed), run(model, feed)) > 35
