"""Language models in the form of onnxruntime-genai, with ops of onnxruntime's own, go through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from fused_decoder import fused_decoder
from typer.testing import CliRunner

import onnxq
from onnxq import targets
from onnxq.calibration.data import input_specs
from onnxq.calibration.text import text_feed
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.kinds import Kind, kind_of
from onnxq.runtime import Session


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused") / "decoder.onnx"
    ir.save(fused_decoder(), path)
    return path


def quantize(decoder: Path, out: Path, *options: str) -> dict[str, object]:
    done = CliRunner().invoke(
        app, ["quantize", str(decoder), "-o", str(out), "-q", "--json", str(out.with_suffix(".json")), *options]
    )
    assert done.exit_code == 0, done.output
    return dict(json.loads(out.with_suffix(".json").read_text()))


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_all_layers_get_codes_and_attention_stays_float(decoder: Path, tmp_path: Path, target: str) -> None:
    found = quantize(decoder, tmp_path / "out.onnx", "--target", target)
    assert found["quantized_nodes"] == 15
    assert found["sqnr_db"] > 26  # type: ignore[operator]
    ops = [node.op_type for node in onnxq.load(tmp_path / "out.onnx").graph]
    assert ops.count("GroupQueryAttention") == (2 if target == "cpu" else 0)
    if target == "tensorrt":
        assert not [node for node in ir.load(tmp_path / "out.onnx").graph if node.domain]


def test_caches_of_the_tensorrt_form_are_those_of_the_float_model(decoder: Path, tmp_path: Path) -> None:
    quantize(decoder, tmp_path / "out.onnx", "--target", "tensorrt")
    before, after = Session(decoder), Session(tmp_path / "out.onnx")
    feed = text_feed(input_specs(onnxq.load(decoder)), np.arange(12).reshape(2, 6))
    for name, expected, found in zip(before.output_names, before.run(feed), after.run(feed), strict=True):
        noise = np.square(expected - found).sum() / np.square(expected).sum()
        assert noise < 0.01, name


def test_torch_runs_fused_attention(decoder: Path) -> None:
    torch = pytest.importorskip("torch", reason="gradients need torch: pip install 'onnxq[learn]'")
    from onnxq.autograd.interpreter import TorchGraph

    model = onnxq.load(decoder)
    assert kind_of(model) is Kind.LANGUAGE
    feed = text_feed(input_specs(model), np.arange(12).reshape(2, 6))
    graph = TorchGraph(model)
    given = {name: torch.from_numpy(value) for name, value in feed.items()}
    weight = "layers.0.k.weight"
    graph.trainable([weight])
    found = graph.run(given, graph.output_names)
    for name, expected in zip(graph.output_names, Session(decoder).run(feed), strict=True):
        np.testing.assert_allclose(found[name].detach().numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=name)
    found["logits"].square().mean().backward()
    assert graph.parameters[weight].grad.abs().max() > 0


def test_weights_of_four_bits_are_learned_around_it(decoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="gptq needs torch: pip install 'onnxq[learn]'")
    nearest, learned = (
        quantize(decoder, tmp_path / f"{recipe}.onnx", "--target", "cpu", "--recipe", recipe, "--samples", "8")
        for recipe in ("int4-weights", "gptq")
    )
    assert learned["sqnr_db"] > nearest["sqnr_db"] + 2  # type: ignore[operator]


def test_what_tensorrt_has_no_op_for_is_named(tmp_path: Path) -> None:
    model = fused_decoder()
    attention = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    attention.attributes.add(ir.AttrInt64("smooth_softmax", 1))
    ir.save(model, tmp_path / "sinks.onnx")
    with pytest.raises(OnnxqError, match=r"com\.microsoft GroupQueryAttention"):
        onnxq.quantize(tmp_path / "sinks.onnx", output=tmp_path / "out.onnx", target="tensorrt", samples=2)
    assert not (tmp_path / "out.onnx").exists()
    assert onnxq.quantize(tmp_path / "sinks.onnx", output=tmp_path / "out.onnx", target="cpu", samples=2)


def test_codes_of_onnxruntimes_own_are_no_float_model(tmp_path: Path) -> None:
    model = fused_decoder()
    head = next(node for node in model.graph if node.name == "head")
    codes = ir.tensor(np.zeros((128, 2, 16), np.uint8), name="codes")
    scales = ir.tensor(np.ones((128, 2), np.float32), name="scales")
    for tensor in (codes, scales):
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        model.graph.register_initializer(value)
    head.op_type, head.domain = "MatMulNBits", "com.microsoft"
    head.resize_inputs(3)
    for index, name in enumerate(("codes", "scales"), start=1):
        head.replace_input_with(index, model.graph.initializers[name])
    for name, number in {"K": 64, "N": 128, "bits": 4, "block_size": 32}.items():
        head.attributes.add(ir.AttrInt64(name, number))
    ir.save(model, tmp_path / "coded.onnx")
    with pytest.raises(OnnxqError, match=r"quantized already .*MatMulNBits"):
        onnxq.quantize(tmp_path / "coded.onnx", output=tmp_path / "out.onnx", samples=2)


CACHED = """<ir_version: 11, opset_import: ["" : 23]>
cached (float[1,8,64] x, float[1,2,4,16] past_k, float[1,2,4,16] past_v) =>
    (float[1,8,64] y, float[1,2,12,16] present_k, float[1,2,12,16] present_v)
{
    [query] q = MatMul (x, wq)
    [key] k = MatMul (x, wk)
    [value] v = MatMul (x, wv)
    [attend] m, present_k, present_v =
        Attention <q_num_heads=4, kv_num_heads=2, is_causal=1> (q, k, v, , past_k, past_v)
    [out] y = MatMul (m, wo)
}
"""


def test_attention_with_a_cache_is_written_out_for_tensorrt_which_does_not_read_it(tmp_path: Path) -> None:
    shapes = {"wq": (64, 64), "wk": (64, 32), "wv": (64, 32), "wo": (64, 64)}
    ir.save(add_weights(CACHED, shapes), tmp_path / "cached.onnx")
    errors = targets.get("tensorrt").lint(onnxq.load(tmp_path / "cached.onnx"))
    assert [(item.rule, item.node) for item in errors if item.severity == "error"] == [("E9", "attend")]
    options = ("--target", "tensorrt", "--synthesis", "noise")
    found = quantize(tmp_path / "cached.onnx", tmp_path / "out.onnx", *options)
    assert found["quantized_nodes"] == found["weighted_nodes"] == 6
    assert found["sqnr_db"] > 30  # type: ignore[operator]
    pytest.importorskip("tensorrt_rtx", reason="the compiler is missing: pip install 'onnxq[tensorrt]'")
    assert not onnxq.build(tmp_path / "out.onnx", tmp_path / "engine", sm=["89"]).promised_but_float
