"""Constants that are computed when a model is read: known sizes, whatever inference could say of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models
from onnxq.runtime import Session

# The end of the Slice is computed, as exporters of relative positions (VITS) write it: inference knows no size of it.
SLICED = (
    '<ir_version: 10, opset_import: ["" : 21]> g (float[N,32] x) => (float[N,48] y)'
    " <int64[1] first = {0}, int64[1] half = {16}, int64[1] one = {1}> {"
    " end = Add (half, half) s = Slice (w0, first, end, first)"
    " long = Concat <axis = 0> (half, end) two = ReduceSum <keepdims = 1> (long) w = Slice (s, first, two, one)"
    " [layer] y = MatMul (x, w) }"
)


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_a_weight_cut_out_of_a_table_has_the_size_of_its_numbers(target: str, tmp_path: Path) -> None:
    path = models.save(add_weights(SLICED, {"w0": (40, 64)}), tmp_path / "m.onnx")
    graph = models.load(path).graph
    assert [node.op_type for node in graph] == ["MatMul"]
    assert [value.shape.numpy() for value in graph.initializers.values()] == [(32, 48)]
    x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    numbers = onnxq.quantize(path, [{"x": x}], target=target).numbers
    assert numbers["quantized_nodes"] == 1 and numbers["sqnr_db"] > 30


QUERIES = (
    '<ir_version: 10, opset_import: ["" : 21]> g (float[N,16,32] x) => (float[N,8,64] y, float[8,32] z)'
    " <int64[2] halves = {32, 32}, int64[2] shape = {8, 32}, int64[2] wide = {4096, 4096}, float one = {1.0},"
    " int8 zero = {0}> {"
    " zeros = ConstantOfShape (shape) [positions] moved = Add (zeros, w0) [norm] n = LayerNormalization (moved, w1, b1)"
    " [project] p = MatMul (n, w2) [cut] q, v = Split <axis = 1> (p, halves)"
    " codes = QuantizeLinear (v, one, zero) z = DequantizeLinear (codes, one, zero)"
    " [noise] r = RandomNormalLike (q) [masks] m = Expand (one, wide) [largest] top = ReduceMax <keepdims = 0> (m)"
    " noisy = Add (q, r) known = Mul (noisy, top) k = Transpose <perm = [0, 2, 1]> (x) a = MatMul (known, k)"
    " [mix] b = MatMul (a, x) [layer] y = MatMul (b, w3) }"
)
QUERY_SHAPES = {"w0": (8, 32), "w1": (32,), "b1": (32,), "w2": (32, 64), "w3": (32, 64)}


def test_what_depends_on_no_input_is_computed_once(tmp_path: Path) -> None:
    """Learned queries with norms and halves between them and the first attention; draws and codes stay."""
    path = models.save(add_weights(QUERIES, QUERY_SHAPES), tmp_path / "m.onnx")
    model = models.load(path)
    left = {node.op_type for node in model.graph}
    assert not left & {"ConstantOfShape", "LayerNormalization", "Split", "ReduceMax", "Expand"}
    assert {"RandomNormalLike", "QuantizeLinear", "DequantizeLinear"} <= left
    weights = {value.name for value in model.graph.initializers.values()}
    assert "w2" not in weights, "what is computed once is not stored"
    x = np.random.default_rng(0).normal(size=(2, 16, 32)).astype(np.float32)
    for before, after in zip(Session(models.read(path)).run({"x": x}), Session(model).run({"x": x}), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


def test_large_constants_stay_the_nodes_that_fill_them(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N,32] x) => (float[N,4096,2048] y)'
        " <int64[3] wide = {1, 4096, 2048}, int64[2] column = {-1, 1}, int64[1] axis = {1}> {"
        " zeros = ConstantOfShape (wide) [layer] h = MatMul (x, w0) s = ReduceSum (h, axis) t = Unsqueeze (s, axis)"
        " y = Add (zeros, t) }"
    )
    path = models.save(add_weights(text, {"w0": (32, 32)}), tmp_path / "m.onnx")
    model = models.load(path)
    assert "ConstantOfShape" in {node.op_type for node in model.graph}
    assert models.initializer_bytes(model) < 1 << 16
