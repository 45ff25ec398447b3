"""Models with ops that onnxruntime does not know are quantized around them, and get them back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import add_weights
from typer.testing import CliRunner

import onnxq
from onnxq import custom_ops, plugins
from onnxq.cli import app
from onnxq.engines import plugin_libraries
from onnxq.engines.runtimes import Runtime
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

# As exporters of detectors write it: the last op is no op of ONNX's, and reads an input of the model, too.
DETECTOR = """
<ir_version: 8, opset_import: ["" : 13{domain}]>
detector (float[N,3,16,16] x, float[N,2] sizes) => (int32[N,1] count, float[N,24,16,16] features, float[N,8,4] boxes) {{
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    b = Relu(a)
    features = Conv<pads = [1, 1, 1, 1]>(b, w2)
    pooled = GlobalAveragePool(features)
    flat = Flatten(pooled)
    scores = MatMul(flat, w3)
    count, found = {op}<score_threshold = 0.25, plugin_version = "1">(scores, sizes, anchors)
    boxes = Mul(found, anchors)
}}
"""
SHAPES = {"w1": (24, 3, 3, 3), "w2": (24, 24, 3, 3), "w3": (24, 32), "anchors": (8, 4)}


def write_detector(path: Path, domain: str = "TRT") -> Path:
    text = DETECTOR.format(
        domain=f', "{domain}" : 1' if domain else "", op=f"{domain}.Decode_TRT" if domain else "Decode_TRT"
    )
    model = add_weights(text, SHAPES)
    model.graph.outputs[0].shape = None  # what plugins make comes without
    ir.save(model, path)
    return path


def write_data(path: Path, samples: int = 16) -> Path:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((samples, 3, 16, 16), np.float32)
    np.savez(path, x=x, sizes=np.ones((samples, 2), np.float32))
    return path


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
@pytest.mark.parametrize("domain", ["TRT", ""])
def test_a_detector_gets_its_last_op_back(tmp_path: Path, domain: str, target: str) -> None:
    model, data = write_detector(tmp_path / "detector.onnx", domain), write_data(tmp_path / "data.npz")
    out, numbers = tmp_path / "out.onnx", tmp_path / "out.json"
    asked = ["quantize", str(model), "--data", str(data), "-o", str(out), "--target", target]
    done = CliRunner().invoke(app, [*asked, "--json", str(numbers)])
    assert done.exit_code == 0, done.output
    found = json.loads(numbers.read_text())
    assert found["quantized_nodes"] >= 2 and found["sqnr_db"] > 25
    assert found["plugins"] == [f"{domain or plugins.PLUGIN_DOMAIN} Decode_TRT"]
    written = onnx.load(out)
    assert not written.graph.output[0].type.tensor_type.HasField("shape")
    written.graph.output[0].type.tensor_type.shape.SetInParent()  # the checker wants one
    onnx.checker.check_model(written)
    assert [value.name for value in written.graph.output] == ["count", "features", "boxes"]
    decoder = next(node for node in written.graph.node if node.op_type == "Decode_TRT")
    assert list(decoder.input) == ["scores", "sizes", "anchors"]
    assert {attribute.name for attribute in decoder.attribute} == {"score_threshold", "plugin_version"}
    multiplied = next(node for node in written.graph.node if node.output[0] == "boxes")
    assert list(multiplied.input) == [decoder.output[1], "anchors"]
    compared = CliRunner().invoke(app, ["compare", str(model), str(out), "--data", str(data), "--no-latency"])
    assert compared.exit_code == 0 and "SQNR" in compared.output, compared.output
    linted = CliRunner().invoke(app, ["lint", str(out), "--target", target])
    assert linted.exit_code == 0 and ("C14" in linted.output) == (target == "cpu"), linted.output


def test_the_result_in_memory_is_whole_and_saves_once(tmp_path: Path) -> None:
    model, data = write_detector(tmp_path / "detector.onnx"), write_data(tmp_path / "data.npz")
    made = onnxq.quantize(model, data).model
    assert sum(map(plugins.is_plugin, made.graph)) == 1
    first, second = (onnxq.save(made, tmp_path / name).read_bytes() for name in ("first.onnx", "second.onnx"))
    assert first == second
    loaded = onnxq.load(model)
    assert [value.name for value in loaded.graph.outputs] == ["features", "scores"]
    onnxq.save(loaded, tmp_path / "again.onnx")
    assert [value.name for value in ir.load(tmp_path / "again.onnx").graph.outputs] == ["count", "features", "boxes"]


def test_copies_get_their_own_back(tmp_path: Path) -> None:
    loaded = onnxq.load(write_detector(tmp_path / "detector.onnx"))
    copy = loaded.clone()
    for model in (copy, loaded):
        plugins.put_back(model)
        assert sum(map(plugins.is_plugin, model.graph)) == 1
    assert all(a is not b for a, b in zip(copy.graph, loaded.graph, strict=True))


def test_sessions_run_what_needs_no_plugin(tmp_path: Path) -> None:
    """From a file and from memory, with and without taps."""
    path = write_detector(tmp_path / "detector.onnx", domain="")
    feed = dict(np.load(write_data(tmp_path / "data.npz", 2)))
    whole = Session(path)
    assert whole.output_names == ["features", "scores"]
    model = onnxq.load(path)
    plugins.put_back(model)
    for found in (Session(path, taps=["b"]), Session(model, taps=["b"])):
        assert found.output_names == ["features", "scores", "b"]
        np.testing.assert_array_equal(found.run(feed)[1], whole.run(feed)[1])


MATRICES = dict.fromkeys(("w1", "w2", "w3"), (32, 32))
BEHIND = """
<ir_version: 8, opset_import: ["" : 21, "mine" : 1]>
network (float[N,32] x) => (float[N,32] y) {
    a = MatMul(x, w1)
    b = mine.Fancy(a)
    c = MatMul(b, w2)
    y = MatMul(c, w3)
}
"""


def test_layers_behind_a_plugin_stay_float_and_are_counted(tmp_path: Path) -> None:
    ir.save(add_weights(BEHIND, MATRICES), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    numbers = onnxq.quantize(tmp_path / "model.onnx", [{"x": x}], output=tmp_path / "out.onnx").numbers
    assert (numbers["quantized_nodes"], numbers["weighted_nodes"]) == (1, 3)
    assert "2 of 3 layers stay float: they stand behind mine Fancy, which onnxruntime does not know" in "".join(
        numbers["warnings"]
    )
    before, after = onnxq.load(tmp_path / "model.onnx"), ir.load(tmp_path / "out.onnx")
    plugins.put_back(before)
    for name in ("w2", "w3"):
        kept = after.graph.initializers[name].const_value
        original = before.graph.initializers[name].const_value
        assert kept is not None and original is not None
        np.testing.assert_array_equal(kept.numpy(), original.numpy())


BRANCH = """
<ir_version: 8, opset_import: ["" : 21, "mine" : 1]>
network (float[N,32] x, bool flag) => (float[N,32] y) {
    a = MatMul(x, w1)
    b = Relu(a)
    y = If(flag)<
        then_branch = yes () => (float[N,32] t) { t = mine.Fancy(b) },
        else_branch = no () => (float[N,32] e) { e = Identity(b) }
    >
}
"""


def test_a_plugin_within_a_branch_reads_what_the_graph_around_it_makes(tmp_path: Path) -> None:
    ir.save(add_weights(BRANCH, {"w1": (32, 32)}), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    feed = [{"x": x, "flag": np.array(True)}]
    onnxq.quantize(tmp_path / "model.onnx", feed, target="cpu", output=tmp_path / "out.onnx")
    written = ir.load(tmp_path / "out.onnx")
    branch = next(node for node in written.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    fancy = next(node for node in branch if node.op_type == "Fancy")
    read = fancy.inputs[0]
    assert read is not None and read.name == "b" and read.graph is written.graph


def test_a_model_of_plugins_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 21, "mine" : 1]>
    network (float[N,32] x) => (float[N,32] y) {
        a = mine.Fancy(x)
        y = MatMul(a, w1)
    }
    """
    ir.save(add_weights(text, {"w1": (32, 32)}), tmp_path / "model.onnx")
    x = np.zeros((8, 32), np.float32)
    with pytest.raises(OnnxqError, match="Fancy") as error:
        onnxq.quantize(tmp_path / "model.onnx", [{"x": x}], output=tmp_path / "out.onnx")
    assert "--custom-ops" in (error.value.hint or "") and not (tmp_path / "out.onnx").exists()


CUSTOM = """
<ir_version: 8, opset_import: ["" : 21, "ai.onnx.contrib" : 1]>
network (float[N,32] x) => (float[N,32] y) {
    a = MatMul(x, w1)
    below, above = ai.onnx.contrib.NegPos(a)
    c = MatMul(above, w2)
    y = MatMul(c, w3)
}
"""


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_layers_behind_a_custom_op_get_codes_with_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, workers: str
) -> None:
    extensions = pytest.importorskip("onnxruntime_extensions", reason="onnxruntime-extensions is not installed")
    monkeypatch.delenv(custom_ops.VARIABLE, raising=False)
    ir.save(add_weights(CUSTOM, MATRICES), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    files = [str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz")]
    library, out = ["--custom-ops", extensions.get_library_path()], str(tmp_path / "out.onnx")
    asked = ["quantize", *files, "-o", out, "--target", target, "--workers", workers, *library]
    done = CliRunner().invoke(app, [*asked, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    plain = add_weights(CUSTOM.replace("below, above = ai.onnx.contrib.NegPos(a)", "above = Relu(a)"), MATRICES)
    ir.save(plain, tmp_path / "plain.onnx")
    usual = onnxq.quantize(tmp_path / "plain.onnx", tmp_path / "data.npz", target=target).numbers
    assert (found["quantized_nodes"], found["weighted_nodes"]) == (3, 3)
    assert found["sqnr_db"] == pytest.approx(usual["sqnr_db"], abs=0.5)
    for command in (["compare", files[0], out, *files[1:], "--no-latency"], ["analyze", *files, "--target", target]):
        again = CliRunner().invoke(app, [*command, *library])
        assert again.exit_code == 0, again.output


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    model, data = write_detector(tmp_path / "detector.onnx"), write_data(tmp_path / "data.npz")
    with pytest.raises(OnnxqError, match="library of custom ops"):
        onnxq.quantize(model, data, custom_ops=[str(tmp_path / "none.so")])


class Registry:
    """TensorRT's, which needs a GPU: it takes libraries whose names end in .so."""

    def load_library(self, file: str) -> object:
        return object() if file.endswith(".so") else None


class Module:
    __version__ = "10.0"

    def __init__(self) -> None:
        self.started = False

    def init_libnvinfer_plugins(self, logger: object, namespace: str) -> bool:
        self.started = True
        return True

    def get_plugin_registry(self) -> Registry:
        return Registry()


class Logger:
    def __init__(self) -> None:
        self.errors: list[str] = []


def test_full_tensorrt_is_told_of_plugins_and_rtx_refuses_them(tmp_path: Path) -> None:
    for name in ("good.so", "bad.txt"):
        (tmp_path / name).touch()
    module = Module()
    full, small = Runtime("tensorrt", module, ("89",)), Runtime("tensorrt-rtx", module, ("89",))
    plugin_libraries.load(small, Logger(), [])
    assert not module.started
    plugin_libraries.load(full, Logger(), [tmp_path / "good.so"])
    assert module.started
    for runtime, file, words in (
        (full, "bad.txt", "plugins in"),
        (full, "missing.so", "plugins in"),
        (small, "good.so", "full TensorRT"),
    ):
        with pytest.raises(OnnxqError, match=words):
            plugin_libraries.load(runtime, Logger(), [tmp_path / file])


def test_an_engine_of_a_model_with_a_plugin_says_who_can_build_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    path = write_detector(tmp_path / "detector.onnx")
    with pytest.raises(OnnxqError) as done:
        onnxq.engines.build(path, tmp_path / "out.engine", runtime="tensorrt-rtx")
    assert "Decode_TRT" in done.value.message and "--runtime tensorrt" in (done.value.hint or "")
