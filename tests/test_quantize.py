"""The main job, end to end, on a small network and on real models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import MODELS, add_weights

import onnxq
from onnxq import layer_nodes, targets
from onnxq import model as models
from onnxq.calibration.data import input_specs
from onnxq.calibration.noise import Noise
from onnxq.errors import OnnxqError
from onnxq.report.table import plain_lines
from onnxq.runtime import Session

JSON_KEYS = {
    "recipe", "target", "quantized_nodes", "integer_kernels", "float_bytes", "quantized_bytes", "sqnr_db", "seconds",
    "float_inference_seconds", "peak_rss_mib",
}  # fmt: skip


@pytest.mark.parametrize("target", targets.names())
def test_the_command_line_does_the_whole_job(target: str, tmp_path: Path) -> None:
    output, numbers, page = tmp_path / "o.onnx", tmp_path / "o.json", tmp_path / "o.html"
    command = [sys.executable, "-m", "onnxq.cli", "quantize", str(MODELS / "fashion_resnet.onnx")]
    command += ["--data", str(MODELS / "fashion_calibration.npz"), "--target", target, "-o", str(output)]
    done = subprocess.run(
        [*command, "--json", str(numbers), "--report", str(page)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(numbers.read_text())
    assert set(found) >= JSON_KEYS
    assert found["sqnr_db"] > 25 and found["float_bytes"] > 3 * found["quantized_bytes"]
    assert found["quantized_bytes"] == output.stat().st_size
    assert "SQNR" in done.stdout and "worst layer" in done.stdout
    assert "<html" in page.read_text() and page.stat().st_size < 2_000_000
    onnx.checker.check_model(onnx.load(output))
    written = models.read(output)
    assert not [item for item in targets.get(target).lint(written) if item.severity == "error"]
    assert models.get_metadata(written)["target"] == target


@pytest.mark.parametrize("target", targets.names())
def test_accuracy_on_images_that_calibration_never_saw(target: str, tmp_path: Path) -> None:
    output = tmp_path / "o.onnx"
    onnxq.quantize(MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz", target=target, output=output)
    found = onnxq.compare(MODELS / "fashion_resnet.onnx", output, MODELS / "fashion_test.npz", latency=False)
    assert found.top1_quantized is not None and found.top1_float is not None
    assert found.top1_quantized >= found.top1_float - 0.005
    assert found.agreement is not None and found.agreement >= 0.98


def test_the_cpu_target_runs_on_integers(network: Path, calibration: Path) -> None:
    numbers = onnxq.quantize(network, calibration, target="cpu").numbers
    nodes = numbers["optimized_nodes"]
    # The thin first layer stays float only where one convolution reads it; here a shortcut does.
    assert nodes["QLinearConv"] == 2 and nodes["QLinearAdd"] == 1 and nodes["QGemm"] == 1
    assert "Conv" not in nodes and "FusedConv" not in nodes


@pytest.mark.parametrize("target", targets.names())
def test_the_same_seed_gives_the_same_bytes(target: str, network: Path, calibration: Path, tmp_path: Path) -> None:
    for name in "ab":
        onnxq.quantize(network, calibration, target=target, output=tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("tensorrt", {"weights": "fp8"}),
        ("tensorrt", {"weights": "int6", "activations": "int6"}),
        ("tensorrt", {"weights": "int4", "activations": "int8"}),
        ("tensorrt", {"activations": "float"}),
        ("cpu", {"activations": "int8"}),
        ("cpu", {"activations": "int16"}),
        ("cpu", {"weights": "int7"}),
        ("cpu", {"weights": "int4"}),
    ],
)
def test_formats_run_and_lint(target: str, options: dict[str, str], network: Path, calibration: Path) -> None:
    result = onnxq.quantize(network, calibration, target=target, **options)
    assert result.numbers["quantized_nodes"] > 0
    assert result.numbers["sqnr_db"] > 8


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_bias_correction_takes_the_mean_error_back(activations: str, shared_data: Path) -> None:
    """On a network of depthwise convolutions it is worth several dB (Nagel et al., 2019), also of weights alone."""
    path = shared_data / "models" / "mobilenet_v1_025_224.onnx"
    x = np.random.default_rng(0).uniform(-1, 1, (8, 3, 224, 224)).astype(np.float32)
    sqnr = {
        on: onnxq.quantize(path, [{"input": x}], activations=activations, knobs={"bias_correction": on}).numbers[
            "sqnr_db"
        ]
        for on in (True, False)
    }
    assert sqnr[True] > sqnr[False] + 3


def test_without_data_it_says_so(network: Path) -> None:
    result = onnxq.quantize(network, samples=4, synthesis="noise")
    assert any("random" in warning for warning in result.numbers["warnings"])


CONVOLUTIONAL_HEAD = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,3,16,16] x) => (float[N,10] logits)
{
    [conv] c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    [relu] r = Relu (c)
    [pool] p = GlobalAveragePool (r)
    [head] scores = Conv (p, w2, b2)
    [flat] logits = Flatten (scores)
}
"""


def test_logits_of_made_up_inputs_get_headroom(tmp_path: Path) -> None:
    """Real images reach further there, and in the means that they come from: MobileNetV1 0.25 kept 35 % on cpu."""
    path = tmp_path / "network.onnx"
    shapes = {"w1": (32, 3, 3, 3), "b1": (32,), "w2": (10, 32, 1, 1), "b2": (10,)}
    ir.save(add_weights(CONVOLUTIONAL_HEAD, shapes), path)

    def ranges(data: list[dict[str, np.ndarray]] | None) -> dict[str, tuple[float, float]]:
        result = onnxq.quantize(path, data, target="cpu", synthesis="noise", samples=8)
        return {tensor["name"]: (tensor["clip_low"], tensor["clip_high"]) for tensor in result.tensors}

    specs = input_specs(models.load(path))
    given = ranges([{name: row[None] for name, row in sample.items()} for sample in Noise(specs, count=8, seed=0)])
    made_up = ranges(None)
    assert {name for name, found in made_up.items() if found != given[name]} == {"p", "scores"}
    limit = 2 * max(-given["scores"][0], given["scores"][1])
    assert made_up["scores"] == pytest.approx((-limit, limit))


def test_an_iterable_of_dicts_is_data(network: Path) -> None:
    batches = ({"x": np.ones((2, 3, 16, 16), np.float32) * scale} for scale in (0.5, 1.0))
    assert onnxq.quantize(network, batches, target="cpu").numbers["samples"] == 4


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_only_quantizes_what_is_named(target: str, tmp_path: Path) -> None:
    network, options = MODELS / "fashion_resnet.onnx", {"target": target, "samples": 16}
    calibration = MODELS / "fashion_calibration.npz"
    names = [item.node.name or "" for item in layer_nodes.weighted_nodes(models.load(network).graph)]
    whole = onnxq.quantize(network, calibration, **options)
    chosen = [name for name in names if name not in whole.numbers["left_float"]]
    result = onnxq.quantize(network, calibration, **options, only=chosen[:1], output=tmp_path / "o.onnx")
    assert result.numbers["quantized_nodes"] == 1
    assert {name for name, why in result.numbers["left_float"].items() if why == "excluded"} == set(names) - {chosen[0]}
    assert json.loads(models.get_metadata(models.read(tmp_path / "o.onnx"))["config"])["only"] == chosen[:1]
    rest = onnxq.quantize(network, calibration, **options, only=("Conv", "Gemm"), exclude=chosen[:1])
    assert rest.numbers["quantized_nodes"] == len(chosen) - 1
    with pytest.raises(OnnxqError, match="--only 'convolution'"):
        onnxq.quantize(network, calibration, **options, only=("convolution",))


def test_exclude_keeps_nodes_in_float(network: Path, calibration: Path) -> None:
    result = onnxq.quantize(network, calibration, target="cpu", exclude=("conv2",))
    assert result.numbers["left_float"]["conv2"] == "excluded"


@pytest.mark.parametrize("name", ["resnet20_cifar10", "r20vit_hybrid_cifar10", "mobilenet_v1_025_224"])
def test_engines_of_real_models_keep_every_promise(name: str, shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT-RTX: pip install 'onnxq[tensorrt]'")
    output = tmp_path / "o.onnx"
    numbers = onnxq.quantize(shared_data / "models" / f"{name}.onnx", samples=4, output=output).numbers
    built = onnxq.build(output, tmp_path / "o.engine", sm=["89"])
    assert built.is_proven and not built.promised_but_float
    assert len(built.low_precision_nodes) == numbers["quantized_nodes"]


def test_an_initializer_that_has_the_name_of_a_scale_is_left_alone(network: Path, calibration: Path) -> None:
    model = ir.load(network)
    names = {value.name: value for value in model.graph.initializers.values()}
    feed = {"x": np.load(calibration)["x"]}
    expected = onnxq.quantize(network, [feed]).model
    names["b3"].name = "r1_scale"
    ir.save(model, network)
    found = onnxq.quantize(network, [feed]).model
    outputs = [Session(item, optimize=False).run(feed)[0] for item in (expected, found)]
    np.testing.assert_array_equal(*outputs)
    assert found.graph.initializers["r1_scale"].shape == (10,)


@pytest.mark.parametrize(
    ("tail", "kind", "why"),
    [
        ("Compress <axis=0> (p, none)", "float[M,8]", "the outputs are empty"),
        ("ArgMax <axis=1> (p)", "int64[N,1]", "the outputs are whole numbers"),
    ],
)
def test_what_cannot_be_judged_is_said(tail: str, kind: str, why: str, tmp_path: Path) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    detector (float[N,16,8,8] x) => ({kind} y)
    <bool[1] none = {{0}}>
    {{
        [conv] c = Conv (x, w)
        g = GlobalAveragePool (c)
        p = Flatten (g)
        y = {tail}
    }}
    """
    path = models.save(add_weights(text, {"w": (8, 16, 1, 1)}), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((8, 16, 8, 8)).astype(np.float32)
    (warning,) = onnxq.quantize(path, [{"x": x}], target="cpu").numbers["warnings"]
    assert warning.startswith(why)
    lines = "\n".join(plain_lines(onnxq.compare(path, path, [{"x": x}], latency=False).to_json()))
    assert "worst output" not in lines


def test_a_silent_sample_makes_no_layer_the_worst(network: Path, calibration: Path) -> None:
    with np.load(calibration) as arrays:
        rows = [{"x": row[None]} for row in arrays["x"]]
    loud = onnxq.quantize(network, rows, target="cpu").numbers["layers"]
    assert {"input", "Relu"} & {layer["op"] for layer in loud}
    silent = onnxq.quantize(network, [{"x": np.zeros_like(rows[0]["x"])}, *rows], target="cpu").numbers["layers"]
    assert "input" not in {layer["op"] for layer in silent}  # zeros, of which no error can be told
    assert all(layer["sqnr_db"] > 0 for layer in silent)
