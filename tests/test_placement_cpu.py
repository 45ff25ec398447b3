"""Where the CPU target puts Q/DQ pairs, beyond what its lint can see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import graph as graphs
from onnxq import model as models
from onnxq import targets
from onnxq.passes.level_gates import LevelGates
from onnxq.runtime import Session

JOINED = """
<ir_version: 10, opset_import: ["" : 21]>
joined (float[N,8,16,16] x) => (float[N,8,8,8] y)
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
    "w1": (16, 8, 1, 1), "w2": (16, 8, 1, 1), "w3": (16, 8, 1, 1), "w4": (8, 16, 1, 1), "w5": (8, 48, 1, 1),
}  # fmt: skip


def test_what_only_a_concat_reads_has_its_scale(tmp_path: Path) -> None:
    ir.save(add_weights(JOINED, JOINED_SHAPES), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((8, 8, 16, 16)).astype(np.float32)
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
    x = np.random.default_rng(0).standard_normal((8, 8, 16, 16)).astype(np.float32)
    result = onnxq.quantize(tmp_path / "model.onnx", [{"x": x}], target="cpu")
    assert [value.name for value in result.model.graph.outputs] == outputs
    assert 30 < result.numbers["sqnr_db"] < 60


STREAM = """
<ir_version: 10, opset_import: ["" : 21]>
stream (float[2,32,8,8] x, float[2,1,32] token) => (float[2,1,64] y, float[2,32,8,8] z)
<int64[3] flat = {2, 32, 64}, int64[3] map = {2, 32, 1}, int64 first = {0}, int64[1] zero = {0}, int64[1] one = {1},
 int64[1] axis = {1}, int64[1] end = {65}, int64[4] image = {2, 32, 8, 8}>
{
    [position] p = Conv <pads=[1,1,1,1]> (x, w1)
    [rows] r = Reshape (p, flat)
    [turned] t = Transpose <perm=[0,2,1]> (r)
    [join] j = Concat <axis=1> (token, t)
    [norm] n = LayerNormalization (j, g1, b1)
    [up] u = MatMul (n, w2)
    [act] a = Gelu (u)
    [down] d = MatMul (a, w3)
    [shortcut] s = Add (j, d)
    [last] l = LayerNormalization (s, g1, b1)
    [picked] c = Slice (l, zero, one, axis)
    [head] y = MatMul (c, w4)
    [patches] e = Slice (s, one, end, axis)
    [back] f = Transpose <perm=[0,2,1]> (e)
    [grid] m = Reshape (f, image)
    [again] z = Conv <pads=[1,1,1,1]> (m, w1)
}
"""
STREAM_SHAPES = {"w1": (32, 32, 3, 3), "w2": (32, 64), "w3": (64, 32), "w4": (32, 64), "g1": (32,), "b1": (32,)}


def test_a_residual_stream_behind_a_convolution_stays_float(tmp_path: Path) -> None:
    """In codes, a class token that is a hundredth of the patches would be gone."""
    ir.save(add_weights(STREAM, STREAM_SHAPES), tmp_path / "model.onnx")
    generator = np.random.default_rng(0)
    token = 0.005 * generator.standard_normal((2, 1, 32)).astype(np.float32)
    x = generator.standard_normal((2, 32, 8, 8)).astype(np.float32)
    result = onnxq.quantize(tmp_path / "model.onnx", [{"x": x, "token": token}], target="cpu")
    quantized = {node.inputs[0].name for node in result.model.graph if graphs.is_quantize(node) and node.inputs[0]}
    assert not quantized & {"j", "s"}
    assert result.numbers["quantized_nodes"] == 5
    session, feed = Session(result.model), {"x": x, "token": token}
    found, expected = session.run(feed)[0], Session(tmp_path / "model.onnx").run(feed)[0]
    assert sqnr_db(expected, found) > 25


def test_more_matrices_than_become_products_have_one_scale(tmp_path: Path) -> None:
    """onnxruntime knows scales per column of a single matrix alone; up to 64 are a product each."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    experts (float[N,1,20,64] x) => (float[N,65,20,32] y)
    {
        [up] u = MatMul (x, w1)
        [act] a = Relu (u)
        [down] y = MatMul (a, w2)
    }
    """
    ir.save(add_weights(text, {"w1": (65, 64, 48), "w2": (65, 48, 32)}), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((8, 1, 20, 64)).astype(np.float32)
    result = onnxq.quantize(tmp_path / "model.onnx", [{"x": x}], target="cpu")
    assert result.numbers["quantized_nodes"] == 2
    assert result.numbers["integer_kernels"] >= 2
    assert result.numbers["sqnr_db"] > 25


@pytest.mark.parametrize(("channels", "reasons"), [(16, []), (12, ["only 12 channels, which are faster in float"] * 2)])
def test_products_of_few_channels_stay_float(channels: int, reasons: list[str]) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    heads (float[N,20,64] x) => (float[N,20,64] y)
    {
        [down] d = MatMul (x, w1)
        [up] y = MatMul (d, w2)
    }
    """
    model, cpu = add_weights(text, {"w1": (64, channels), "w2": (channels, 64)}), targets.get("cpu")
    models.normalise(model)
    assert list(cpu.place(model.graph, cpu.scheme(None, None)).left_float.values()) == reasons


@pytest.mark.parametrize(
    ("results", "reasons"), [(32, []), (64, ["several results of each channel are faster in float"])]
)
def test_a_depthwise_convolution_with_several_results_a_channel_stays_float(results: int, reasons: list[str]) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    widening (float[N,32,8,8] x) => (float[N,32,8,8] y)
    {
        [first] a = Conv <pads=[1,1,1,1]> (x, w1)
        [widen] b = Conv <pads=[1,1,1,1], group=32> (a, w2)
        [last] y = Conv (b, w3)
    }
    """
    shapes = {"w1": (32, 32, 3, 3), "w2": (results, 1, 3, 3), "w3": (32, results, 1, 1)}
    model, cpu = add_weights(text, shapes), targets.get("cpu")
    models.normalise(model)
    assert list(cpu.place(model.graph, cpu.scheme(None, None)).left_float.values()) == reasons


@pytest.mark.parametrize(
    ("first", "behind", "stays_float"),
    [
        ((32, 3, 3, 3), "b = Relu (a)", True),
        ((32, 3, 3, 3), "b = HardSwish (a)", True),
        ((32, 3, 3, 3), "g = Sigmoid (a) b = Mul (a, g)", True),
        ((32, 3, 3, 3), "g = Sigmoid (a) h = Relu (g) b = Mul (a, h)", False),  # several read what it makes
        ((64, 3, 7, 7), "b = Relu (a)", False),  # so many products are faster on codes
        ((32, 5, 3, 3), "b = Relu (a)", False),
    ],
)
def test_a_thin_first_layer_stays_float_with_its_activation(
    first: tuple[int, ...], behind: str, stays_float: bool
) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    image (float[N,{first[1]},32,32] x) => (float[N,16,32,32] y)
    {{
        [stem] a = Conv <pads=[{first[2] // 2},{first[2] // 2},{first[2] // 2},{first[2] // 2}]> (x, w1)
        {behind}
        [last] y = Conv <pads=[1,1,1,1]> (b, w2)
    }}
    """
    model, cpu = add_weights(text, {"w1": first, "w2": (16, first[0], 3, 3)}), targets.get("cpu")
    models.normalise(model)
    left_float = cpu.place(model.graph, cpu.scheme(None, None)).left_float
    assert left_float == ({"stem": "a thin first layer is faster in float"} if stays_float else {})


@pytest.mark.parametrize("behind", ["b = HardSwish (a)", "g = Sigmoid (a) b = Mul (a, g)"])
def test_a_thin_first_layer_stays_float_with_a_levelled_gate_too(behind: str) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    image (float[N,3,32,32] x) => (float[N,16,32,32] y)
    {{
        [stem] a = Conv <pads=[1,1,1,1]> (x, w1)
        {behind}
        [last] y = Conv <pads=[1,1,1,1]> (b, w2)
    }}
    """
    model, cpu = add_weights(text, {"w1": (32, 3, 3, 3), "w2": (16, 32, 3, 3)}), targets.get("cpu")
    models.normalise(model)
    assert LevelGates({"b": np.linspace(0.5, 2, 32)})(model).modified
    left_float = cpu.place(model.graph, cpu.scheme(None, None)).left_float
    assert left_float == {"stem": "a thin first layer is faster in float"}


@pytest.mark.parametrize(
    ("behind", "stays_float"),
    [("c = Transpose <perm=[0,2,3,1]> (b) y = LayerNormalization (c, g)", True), ("y = Conv (b, w2)", False)],
)
def test_a_depthwise_layer_alone_between_floats_stays_float(behind: str, stays_float: bool) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    mixer (float[N,32,8,8] x) => (float[N,a,b,c] y)
    {{
        e = Tanh (x)
        [mix] b = Conv <pads=[3,3,3,3], group=32> (e, w1)
        {behind}
    }}
    """
    model, cpu = add_weights(text, {"w1": (32, 1, 7, 7), "w2": (32, 32, 1, 1), "g": (32,)}), targets.get("cpu")
    models.normalise(model)
    placement = cpu.place(model.graph, cpu.scheme(None, None))
    reason = "a small layer alone between floats gains nothing from codes"
    assert placement.left_float == ({"mix": reason} if stays_float else {})


@pytest.mark.parametrize(
    ("weights", "before", "behind", "stays_float"),
    [
        ((384, 4, 2, 2), "e = Reshape (x, size)", "d = LayerNormalization (c, g) y = MatMul (d, big)", True),
        ((384, 16, 2, 2), "e = Reshape (x, size)", "d = LayerNormalization (c, g) y = MatMul (d, big)", True),
        ((384, 4, 2, 2), "e = Reshape (x, size)", "y = LayerNormalization (c, g)", False),  # all of the network
        ((384, 3, 16, 16), "e = Reshape (x, size)", "d = LayerNormalization (c, g) y = MatMul (d, big)", False),
        (  # not first
            (384, 4, 2, 2),
            "h = Reshape (x, size) e = Conv (h, w0)",
            "d = LayerNormalization (c, g) y = MatMul (d, big)",
            False,
        ),
        ((384, 4, 2, 2), "e = Reshape (x, size)", "y = Conv (b, w2)", False),  # read as codes
    ],
)
def test_what_cuts_latents_into_patches_between_floats_stays_float(
    weights: tuple[int, ...], before: str, behind: str, stays_float: bool
) -> None:
    channels, side = weights[1], weights[-1]
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    patches (float[1,{channels},1,{64 * side * side}] x) => (float[N,a,b,c] y)
    <int64[4] size = {{1, {channels}, {8 * side}, {8 * side}}}>
    {{
        {before}
        [cut] b = Conv <strides=[{side},{side}]> (e, w1)
        c = Transpose <perm=[0,2,3,1]> (b)
        {behind}
    }}
    """
    shapes = {"w1": weights, "w0": (channels, channels, 1, 1), "w2": (32, 384, 1, 1), "g": (384,), "big": (384, 4096)}
    model, cpu = add_weights(text, {name: shape for name, shape in shapes.items() if name in text}), targets.get("cpu")
    models.normalise(model)
    assert ("cut" in cpu.place(model.graph, cpu.scheme(None, None)).left_float) is stays_float


@pytest.mark.parametrize(
    ("given", "before", "behind", "stays_float"),
    [
        ("float[N,4,64]", "e = Identity (x)", "LayerNormalization (a, g)", True),
        ("float[N,4,64]", "e = Identity (x)", "Relu (a)", False),  # read as codes
        ("int64[N,4]", "e = Gather (table, x)", "LayerNormalization (a, g)", False),  # words, not numbers
    ],
)
def test_a_first_product_of_few_numbers_stays_float(given: str, before: str, behind: str, stays_float: bool) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    tokens ({given} x) => (float[N,4,4096] y)
    {{
        {before}
        [first] a = MatMul (e, w)
        b = {behind}
        y = MatMul (b, v)
    }}
    """
    shapes = {"w": (64, 384), "v": (384, 4096), "g": (384,), "table": (50, 64)}
    model, cpu = add_weights(text, shapes), targets.get("cpu")
    models.normalise(model)
    assert ("first" in cpu.place(model.graph, cpu.scheme(None, None)).left_float) is stays_float
