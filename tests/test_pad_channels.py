"""Depthwise convolutions of codes get a multiple of 16 channels, and the model computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from onnx_ir.passes import PassResult

import onnxq
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.passes.pad_channels import PadChannels
from onnxq.retarget import retarget, strip
from onnxq.runtime import Session
from onnxq.targets import get

# An inverted residual of MobileNetV3, with a gate over its 40 channels, behind a stream of 24.
BLOCK = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,3,16,16] x) => (float[N,24,8,8] y)
{
    [stem] a0 = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w0, b0)
    a = HardSwish (a0)
    [widen] b0_ = Conv (a, w1, b1)
    b = HardSwish (b0_)
    [depthwise] c0 = Conv <group=40, pads=[2,2,2,2]> (b, w2, b1)
    c = Relu (c0)
    p = GlobalAveragePool (c)
    [squeeze] s0 = Conv (p, w3, b3)
    s = Relu (s0)
    [excite] e0 = Conv (s, w4, b1)
    e = HardSigmoid <alpha=0.1666667> (e0)
    g = Mul (c, e)
    [project] h = Conv (g, w5, b0)
    i = Add (a, h)
    [last] y = Conv <pads=[1,1,1,1]> (i, w6, b0)
}
"""
SHAPES = {
    "w0": (24, 3, 3, 3), "w1": (40, 24, 1, 1), "w2": (40, 1, 5, 5), "w3": (32, 40, 1, 1), "w4": (40, 32, 1, 1),
    "w5": (24, 40, 1, 1), "w6": (24, 24, 3, 3), "b0": (24,), "b1": (40,), "b3": (32,),
}  # fmt: skip


X = np.random.default_rng(0).standard_normal((8, 3, 16, 16), np.float32)

# What a region of channels cannot grow through, by what the block has there instead.
OBSTACLES = {
    "g = Mul (c, e)": [
        ("g_ = Mul (c, e) g = Concat <axis=1> (g_, g_)", {"w5": (24, 80, 1, 1)}),
        ("positive = Softplus (c) g = Div (e, positive)", {}),
        ("g_ = Mul (c, e) g = InstanceNormalization (g_, scale, b1)", {"scale": (40,)}),
        ("g_ = Mul (c, e) g = Softmax <axis=1> (g_)", {}),
        ("[grouped] g = Conv <group=2> (c, w7)", {"w7": (40, 20, 1, 1)}),
    ],
    "[project] h = Conv (g, w5, b0)": [("[project] h = Conv <group=8> (g, w5, b0)", {"w5": (24, 5, 1, 1)})],
}


def without_padding(folder: Path, text: str = BLOCK, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Path:
    """A quantized model as it is before channels are added."""
    path = models.save(add_weights(text, shapes), folder / "network.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PadChannels, "call", lambda self, model: PassResult(model, False))
        onnxq.quantize(path, [{"x": X}], target="cpu", output=folder / "plain.onnx")
    return folder / "plain.onnx"


def depthwise_channels(model: ir.Model) -> set[int]:
    found = {node.attributes.get_int("group", 1) for node in model.graph if graphs.is_op(node, "Conv")}
    return found - {1, 2, 8}


def answers(model: ir.Model | Path, *, optimize: bool = False) -> np.ndarray:
    return Session(model, optimize=optimize).run({"x": X}, ["y"])[0]


def test_a_gated_block_grows_to_the_next_multiple_of_sixteen_and_computes_the_same(tmp_path: Path) -> None:
    plain = without_padding(tmp_path)
    model = models.read(plain)
    assert depthwise_channels(model) == {40}
    expected = answers(plain), answers(plain, optimize=True)
    assert PadChannels()(model).modified
    assert depthwise_channels(model) == {48}
    grown = models.save(model, tmp_path / "grown.onnx")
    assert np.array_equal(answers(grown), expected[0])
    assert np.array_equal(answers(grown, optimize=True), expected[1])
    assert not PadChannels()(models.read(grown)).modified
    sizes = {node.name: node.inputs[1].shape[:2] for node in model.graph if graphs.is_op(node, "Conv")}  # type: ignore
    assert [sizes[name] for name in ("stem", "widen", "depthwise", "squeeze", "excite", "project", "last")] == [
        (24, 3), (48, 24), (48, 1), (32, 48), (48, 32), (24, 48), (24, 24),
    ]  # fmt: skip


def test_weights_that_several_layers_read_stay_those_of_the_others(tmp_path: Path) -> None:
    """Biases and weights are shared where exporters find them equal; what lies outside keeps its own."""
    text = BLOCK.replace("[last] y = Conv <pads=[1,1,1,1]> (i, w6, b0)", """
    [wide] j = Conv (i, w1, b1)
    k = Concat <axis=1> (j, j)
    [last] y = Conv (k, w7, b0)""")  # fmt: skip
    plain = without_padding(tmp_path, text, SHAPES | {"w7": (24, 80, 1, 1)})
    model, expected = models.read(plain), answers(plain)
    assert PadChannels()(model).modified and depthwise_channels(model) == {48}
    assert np.array_equal(answers(models.save(model, tmp_path / "grown.onnx")), expected)


def test_quantize_pads_and_layers_are_judged_on_the_channels_that_both_models_have(tmp_path: Path) -> None:
    plain = without_padding(tmp_path)
    path, grown = tmp_path / "network.onnx", tmp_path / "grown.onnx"
    onnxq.quantize(path, [{"x": X}], target="cpu", output=grown)
    assert depthwise_channels(models.read(grown)) == {48}
    before, after = (onnxq.compare(path, file, [{"x": X}], latency=False).layers for file in (plain, grown))
    assert before == after
    assert {"widen", "depthwise", "squeeze", "project"} <= {layer["name"] for layer in after}
    assert np.array_equal(answers(strip(grown)), answers(strip(plain)))


def test_lint_tells_of_channels_left_over_and_mends_them(tmp_path: Path) -> None:
    plain = without_padding(tmp_path)
    cpu = get("cpu")
    assert [(item.rule, item.node) for item in cpu.lint(models.load(plain))] == [("C13", "depthwise")]
    mended = retarget(plain, "cpu").model
    assert depthwise_channels(mended) == {48}
    assert not cpu.lint(mended)


@pytest.mark.parametrize(
    ("place", "instead", "extra"), [(place, *case) for place, cases in OBSTACLES.items() for case in cases]
)
def test_where_the_channels_meet_something_else_nothing_changes(
    place: str, instead: str, extra: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    assert place in BLOCK
    plain = without_padding(tmp_path, BLOCK.replace(place, instead), SHAPES | extra)
    model = models.read(plain)
    before = models.read(plain)
    assert depthwise_channels(model) == {40}
    assert not PadChannels()(model).modified
    assert ir.to_proto(model) == ir.to_proto(before)
