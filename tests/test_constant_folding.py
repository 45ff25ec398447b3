"""Constants that are computed when a model is read: known sizes, whatever inference could say of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models

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
