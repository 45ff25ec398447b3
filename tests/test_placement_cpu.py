"""Where the CPU target puts Q/DQ pairs, beyond what its lint can see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import graph as graphs

JOINED = """
<ir_version: 10, opset_import: ["" : 21]>
joined (float[N,3,16,16] x) => (float[N,8,8,8] y)
{
    [a] a = Conv (x, w1)
    [ra] ra = Relu (a)
    [pool] pa = MaxPool <kernel_shape=[1,1]> (ra)
    [b] b = Conv (x, w2)
    [c] c = Conv (x, w3)
    [join] j = Concat <axis=1> (pa, b)
    [again] k = Concat <axis=1> (j, c)
    [d] d = Conv (c, w4)
    [e] e = Conv (k, w5)
    [sum] s = Add (d, e)
    [down] y = MaxPool <kernel_shape=[2,2], strides=[2,2]> (s)
}
"""
JOINED_SHAPES = {
    "w1": (16, 3, 1, 1), "w2": (16, 3, 1, 1), "w3": (16, 3, 1, 1), "w4": (8, 16, 1, 1), "w5": (8, 48, 1, 1),
}  # fmt: skip


def test_what_only_a_concat_reads_has_its_scale(tmp_path: Path) -> None:
    ir.save(add_weights(JOINED, JOINED_SHAPES), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    graph = onnxq.quantize(tmp_path / "model.onnx", [{"x": x}], target="cpu").model.graph
    scales = {
        node.inputs[0].name: node.inputs[1] for node in graph if graphs.is_quantize(node) and node.inputs[0] is not None
    }
    assert scales["ra"] is scales["pa"] is scales["b"] is scales["j"] is scales["k"]
    assert scales["c"] is not scales["k"], "others read it too, at its own range"


@pytest.mark.parametrize("outputs", [["e"], ["e", "s", "ra"]])
def test_a_convolution_can_be_the_output(tmp_path: Path, outputs: list[str]) -> None:
    """Its codes are made behind it, and the graph output keeps its name."""
    model = add_weights(JOINED, JOINED_SHAPES)
    values = graphs.values(model.graph)
    model.graph.outputs[:] = [values[name] for name in outputs]
    ir.save(model, tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    result = onnxq.quantize(tmp_path / "model.onnx", [{"x": x}], target="cpu")
    assert [value.name for value in result.model.graph.outputs] == outputs
    assert 30 < result.numbers["sqnr_db"] < 60
