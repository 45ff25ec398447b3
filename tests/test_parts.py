"""A model that runs part by part gives what it gives whole, and takes less memory than its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from benchmarks.large_models import BLOCK_BYTES, SEQUENCE, WIDTH, measured, write_model
from conftest import DATA, MODELS

from onnxq import model as models
from onnxq import shapes
from onnxq.parts import Parts
from onnxq.runtime import Session
from onnxq.serialized import serialize

LOOP = """
<ir_version: 10, opset_import: ["" : 21]>
loop (float[4] x) => (float[4] y)
<int64 three = {3}, bool yes = {1}, float[4] outer = {1, 2, 3, 4}, float[4] late = {5, 6, 7, 8}>
{
    first = Add (x, outer)
    y0 = Loop (three, yes, first) <body = step (int64 i, bool more, float[4] state) => (bool again, float[4] next) {
        again = Identity (more)
        scaled = Mul (state, late)
        next = Sub (scaled, first)
    }>
    y = Mul (y0, outer)
}
"""


def in_parts(model: ir.Model, taps: list[str], part_bytes: int) -> Parts:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def open_session(data: bytes, initializers: object) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(data, options)

    return Parts(serialize(model, taps).model, open_session, part_bytes)


def test_parts_give_what_the_whole_gives_taps_included(network: Path) -> None:
    model = models.load(network)
    taps = [value.name or "" for node in model.graph for value in node.outputs if node.op_type == "Relu"]
    parts = in_parts(model, taps, part_bytes=1)
    weighted = [node for node in model.graph if any(value and value.is_initializer() for value in node.inputs)]
    assert len(parts) == len(weighted) > 4  # what follows a node with weights goes along with it
    whole = Session(model, taps=taps, optimize=False)
    assert [item.name for item in parts.get_outputs()] == whole.output_names
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}
    for found, expected in zip(parts.run(None, feed), whole.run(feed), strict=True):
        np.testing.assert_array_equal(found, expected)
    (tapped,) = parts.run([taps[0]], feed)
    np.testing.assert_array_equal(tapped, whole.run(feed, [taps[0]])[0])


@pytest.mark.parametrize("typed", [True, False])
def test_what_an_inner_graph_reads_from_outside_is_handed_on(typed: bool) -> None:
    model = ir.from_onnx_text(LOOP)
    if typed:
        shapes.infer(model)
    parts = in_parts(model, [], part_bytes=20)
    assert (len(parts) > 1) is typed  # no session takes in a value whose type is unknown
    feed = {"x": np.arange(4, dtype=np.float32)}
    np.testing.assert_array_equal(parts.run(None, feed)[0], Session(model, optimize=False).run(feed)[0])


@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_unet_guided", "mnist_dit_guided"])
def test_real_networks_run_in_parts(name: str) -> None:
    path = next(
        (path for path in (MODELS / f"{name}.onnx", DATA / "denoisers" / f"{name}.onnx") if path.is_file()), None
    )
    if path is None:
        pytest.skip(f"{name} is not there")
    model = models.load(path)
    parts = in_parts(model, [], part_bytes=64 << 10)
    assert len(parts) > 2
    random = np.random.default_rng(0)
    feed = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [size if isinstance(size, int) else 2 for size in value.shape]
        feed[value.name or ""] = random.integers(0, 9, shape).astype(value.dtype.numpy())
    for found, expected in zip(parts.run(None, feed), Session(model, optimize=False).run(feed), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gigabytes_are_quantized_and_compared_in_less_than_its_weights(tmp_path: Path) -> None:
    blocks = (5 << 28) // BLOCK_BYTES
    write_model(tmp_path / "float.onnx", blocks)
    np.savez(tmp_path / "data.npz", x=np.ones((2, SEQUENCE, WIDTH), np.float32))
    command = [sys.executable, "-m", "onnxq"]
    data = ["--data", str(tmp_path / "data.npz")]
    quantized = str(tmp_path / "quantized.onnx")
    weights_mib = blocks * BLOCK_BYTES / 2**20
    for arguments in (
        ["quantize", str(tmp_path / "float.onnx"), "--recipe", "int4-weights", *data, "-o", quantized],
        ["compare", str(tmp_path / "float.onnx"), quantized, *data],
    ):
        _, anonymous_mib, resident_mib, status = measured([*command, *arguments])
        assert status == 0
        assert anonymous_mib < 0.9 * weights_mib
        assert resident_mib < weights_mib
    weights = [node for node in models.read(quantized).graph if node.op_type == "DequantizeLinear"]
    assert len(weights) == 2 * blocks


def test_a_weight_that_is_another_s_transpose_runs_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As folding the tied embedding of a language model leaves it: a view that onnxruntime takes for its own copy."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>'
        "tied (float[2,512] x, float[512,1024] w) => (float[2,1024] y) { y = MatMul (x, w) }"
    )
    weight = model.graph.inputs[1]
    model.graph.inputs.remove(weight)
    array = np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32).T
    weight.const_value = ir.Tensor(array, name="w")
    model.graph.register_initializer(weight)
    monkeypatch.setattr("onnxq.serialized.IN_MEMORY_LIMIT_BYTES", 1 << 20)
    session = Session(model)
    assert session.in_parts
    x = np.random.default_rng(1).standard_normal((2, 512)).astype(np.float32)
    np.testing.assert_allclose(session.run({"x": x})[0], x @ array, rtol=1e-4, atol=1e-4)
