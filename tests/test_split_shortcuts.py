"""Layers behind a Concat: the function of the split is the same, its error much smaller where ranges differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
from conftest import add_weights

import onnxq
from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq import model as models
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration.channels import ChannelStatistics
from onnxq.calibration.shortcuts import gain_of, powers_of_two
from onnxq.diffusion import denoiser as denoisers
from onnxq.errors import OnnxqError
from onnxq.learning.channel_scales import round_matrix
from onnxq.passes.smooth_activations import SmoothActivations
from onnxq.passes.split_shortcuts import SplitShortcuts, find_shortcuts
from onnxq.report.metrics import Sqnr
from onnxq.runtime import Session
from onnxq.targets import get

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
IMAGES = "g (float[N,3,6,6] a, float[N,5,6,6] b, float[N,2,6,6] c) => (float[N,4,6,6] y) "
ROWS = "g (float[N,3] a, float[N,5] b, float[N,2] c) => (float[N,4] y) "
TOKENS = "g (float[N,7,3] a, float[N,7,5] b, float[N,7,2] c) => (float[N,7,4] y) "
CONV = {"w": (4, 10, 3, 3), "bias": (4,)}

GRAPHS = {
    "three parts, padded": (
        IMAGES + "{ [join] j = Concat <axis=1> (a, b, c) [l] y = Conv <pads=[1,1,1,1]> (j, w, bias) }",
        CONV,
    ),
    "behind SiLU": (
        IMAGES + "{ [join] j = Concat <axis=-3> (a, b, c) [s] g1 = Sigmoid (j) [m] h = Mul (j, g1)"
        "[l] y = Conv <pads=[1,1,1,1]> (h, w, bias) }",
        CONV,
    ),
    "other readers": (
        IMAGES + "{ [join] j = Concat <axis=1> (a, b, c) [r] h = Relu (j) [l] k = Conv <pads=[1,1,1,1]> (h, w, bias)"
        "[sum] n = ReduceSum <keepdims=1> (h) [add] y = Add (k, n) }",
        CONV,
    ),
    "a Concat of Concats": (
        IMAGES + "{ [inner] i = Concat <axis=1> (a, b) [join] j = Concat <axis=1> (i, c)"
        "[l] y = Conv <pads=[1,1,1,1]> (j, w, bias) }",
        CONV,
    ),
    "Gemm with alpha and beta": (
        ROWS + "{ [join] j = Concat <axis=1> (a, b, c) [l] y = Gemm <transB=1, alpha=0.5, beta=2.0> (j, w, bias) }",
        {"w": (4, 10), "bias": (4,)},
    ),
    "tokens": (
        TOKENS + "<float half = {0.5}> { [join] j = Concat <axis=2> (a, b, c) [h] h = Mul (half, j) [t] t = Tanh (h)"
        "[l] y = MatMul (t, w) }",
        {"w": (10, 4)},
    ),
}  # fmt: skip


def network(text: str, weights: dict[str, tuple[int, ...]]) -> ir.Model:
    """A model with random weights and known shapes."""
    model = add_weights(HEADER + text, weights)
    common_passes.ShapeInferencePass()(model)
    return model


def feed_of(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {value.name or "": [2, *list(value.shape or [])[1:]] for value in model.graph.inputs}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_function_stays(name: str) -> None:
    text, weights = GRAPHS[name]
    model = network(text, weights)
    feed = feed_of(model)
    expected = Session(model, optimize=False).run(feed)[0]
    rewrite = SplitShortcuts()
    assert rewrite(model).modified and rewrite.split == {"l": ("l", "l_part1", "l_part2")}
    layers = list(layer_nodes.weighted_nodes(model.graph))
    assert len(layers) == 3 and sum(len(item.node.inputs) > 2 for item in layers) == ("bias" in weights)
    np.testing.assert_allclose(Session(model, optimize=False).run(feed)[0], expected, rtol=1e-5, atol=1e-5)
    assert not SplitShortcuts()(model).modified
    assert ("j" in graphs.values(model.graph)) == (name == "other readers")


@pytest.mark.parametrize(
    "body",
    [
        "[n] i = InstanceNormalization (j, one, one) [l] y = Conv <pads=[1,1,1,1]> (i, w)",
        "[p] i = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (j) [l] y = Conv <pads=[1,1,1,1]> (i, w)",
        "[p] i = Mul (j, one4) [l] y = Conv <pads=[1,1,1,1]> (i, w)",
        "[l] y = Conv <pads=[1,1,1,1], group=2> (j, half)",
    ],
)
def test_what_is_no_sum_of_parts_is_left_alone(body: str) -> None:
    """Normalization, pooling, a factor per channel, groups: not split, although the third one could be."""
    text = IMAGES + "{ [join] j = Concat <axis=1> (a, b, c) " + body + " }"
    shapes = {"w": (4, 10, 3, 3), "half": (4, 5, 3, 3), "one": (10,), "one4": (1, 10, 1, 1)}
    model = network(text, {name: shape for name, shape in shapes.items() if f" {name}" in body})
    assert not SplitShortcuts()(model).modified


# One 1x1 convolution of two times 128 channels, the second half of which is `ratio` times wider.

WIDE = """g (float[N,128,4,4] a, float[N,128,4,4] b) => (float[N,128,4,4] y)
{ [join] j = Concat <axis=1> (a, b) [l] y = Conv (j, w) }"""


def bimodal(ratio: float, compensated: bool = True) -> ir.Model:
    model = network(WIDE, {"w": (128, 256, 1, 1)})
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    weight = value.const_value.numpy().copy()
    weight[:, 128:] /= ratio if compensated else 1
    value.const_value = ir.tensor(weight, name="w")
    return model


def inputs(ratio: float, rows: int = 16, seed: int = 1) -> dict[str, np.ndarray]:
    a, b = np.random.default_rng(seed).standard_normal((2, rows, 128, 4, 4)).astype(np.float32)
    return {"a": a, "b": b * np.float32(ratio)}


def statistics_of(feed: dict[str, np.ndarray]) -> ChannelStatistics:
    statistics = ChannelStatistics()
    statistics.update(np.concatenate([feed["a"], feed["b"]], axis=1), 1)
    return statistics


def rewritten(model: ir.Model, form: str, ratio: float) -> ir.Model:
    if form == "two_op":
        SplitShortcuts()(model)
    elif form == "equalize":
        gain = gain_of(find_shortcuts(model.graph)[0], statistics_of(inputs(ratio)), get("tensorrt").scheme(None, None))
        SmoothActivations({"j": powers_of_two(gain)}, insert=True, convolutions=True)(model)
    return model


def sqnr_db(folder: Path, form: str, ratio: float, weights: str = "int8", compensated: bool = True) -> float:
    model = bimodal(ratio, compensated)
    exact = Session(model).run(inputs(ratio, seed=2))[0]
    ir.save(rewritten(model, form, ratio), folder / "model.onnx")
    result = onnxq.quantize(
        folder / "model.onnx",
        [inputs(ratio)],
        weights=weights,
        activations="int8",
        knobs={"observer": "minmax", "bias_correction": False},
    )
    seen = Sqnr()
    seen.update(exact, Session(result.model, optimize=False).run(inputs(ratio, seed=2))[0])
    assert seen.value is not None
    return seen.value


@pytest.mark.parametrize("form", ["two_op", "equalize"])
@pytest.mark.parametrize(("weights", "least"), [("int8", 25), ("int4", 12)])
def test_the_gain_where_one_half_is_a_hundred_times_wider(
    tmp_path: Path, form: str, weights: str, least: float
) -> None:
    assert sqnr_db(tmp_path, form, 100, weights) - sqnr_db(tmp_path, "none", 100, weights) > least


def test_no_gain_where_there_is_nothing_to_gain(tmp_path: Path) -> None:
    """Halves of one range; and a narrow half whose weights do not make it matter."""
    assert sqnr_db(tmp_path, "two_op", 1) - sqnr_db(tmp_path, "none", 1) < 1
    gain = sqnr_db(tmp_path, "two_op", 100, compensated=False) - sqnr_db(tmp_path, "none", 100, compensated=False)
    assert gain < 3


def test_weights_have_to_be_split_too() -> None:
    model, feed = bimodal(100), inputs(100)
    spec = get("tensorrt").scheme("int8", "int8")
    matrix = model.graph.initializers["w"].const_value.numpy().reshape(128, 256)  # type: ignore[union-attr]
    halves = [half.transpose(0, 2, 3, 1).reshape(-1, 128) for half in feed.values()]
    own = []
    for half in halves:
        step, zero_point = scale_and_zero_point(half.min(), half.max(), spec.activations.format, symmetric=True)
        own.append(fake_quantize(half, step, zero_point, spec.activations.format))
    expected = np.hstack(halves) @ matrix.T
    sqnr = []
    for rounded in (
        round_matrix(matrix, spec.weights),
        np.hstack([round_matrix(part, spec.weights) for part in np.hsplit(matrix, 2)]),
    ):
        seen = Sqnr()
        seen.update(expected, np.hstack(own) @ rounded.T)
        sqnr.append(seen.value or 0.0)
    assert sqnr[1] - sqnr[0] > 20


@pytest.mark.parametrize(("ratio", "compensated"), [(1, True), (10, True), (100, True), (100, False)])
def test_the_gain_is_foreseen(tmp_path: Path, ratio: float, compensated: bool) -> None:
    """What decides on a split is what the split then brings."""
    found = find_shortcuts(bimodal(ratio, compensated).graph)
    gain = gain_of(found[0], statistics_of(inputs(ratio)), get("tensorrt").scheme(None, None))
    measured = [sqnr_db(tmp_path, form, ratio, compensated=compensated) for form in ("none", "two_op")]
    assert gain.gain_db == pytest.approx(measured[1] - measured[0], abs=1)
    assert gain.ratio == pytest.approx(ratio, rel=0.3)
    assert np.all(np.log2(powers_of_two(gain)) % 1 == 0)


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_each_part_keeps_its_own_scale(tmp_path: Path, target: str) -> None:
    """One Q/DQ of its own before each convolution; on the CPU nothing ties the parts to what the Concat made."""
    ir.save(rewritten(bimodal(100), "two_op", 100), tmp_path / "model.onnx")
    result = onnxq.quantize(tmp_path / "model.onnx", [inputs(100)], target=target)
    scales = []
    for item in layer_nodes.weighted_nodes(result.model.graph):
        producer = item.activation.producer()
        assert producer is not None and graphs.is_dequantize(producer) and producer.inputs[1] is not None
        assert producer.inputs[1].const_value is not None
        scales.append(float(producer.inputs[1].const_value.numpy()))
    assert len(scales) == 2 and scales[1] / scales[0] == pytest.approx(100, rel=0.5)
    assert not any(graphs.is_op(node, "Concat") for node in result.model.graph)


DENOISER = """
denoiser (float[N,1,8,8] x, int64[N] t) => (float[N,1,8,8] eps)
<float rate = {0.01}, int64[3] places = {1, 2, 3}, float wide = {80.0}>
{
    [cast] number = Cast <to=1> (t)
    [rate] angle = Mul (number, rate)
    [wave] wave = Sin (angle)
    [spread] embedding = Unsqueeze (wave, places)
    [first] h1 = Conv <pads=[1,1,1,1]> (x, w1)
    [time] h2 = Add (h1, embedding)
    [middle] h3 = Conv <pads=[1,1,1,1]> (h2, w2)
    [deep] h4 = Mul (h3, wide)
    [shortcut] both = Concat <axis=1> (h1, h4)
    [join] h5 = Conv (both, w3)
    [gate] s = Sigmoid (h5)
    [silu] a = Mul (h5, s)
    [last] eps = Conv <pads=[1,1,1,1]> (a, w4)
}
"""
DENOISER_SHAPES = {"w1": (32, 1, 3, 3), "w2": (32, 32, 3, 3), "w3": (32, 64, 1, 1), "w4": (1, 32, 3, 3)}


def test_q_diffusion_splits_where_it_pays(tmp_path: Path) -> None:
    """Rounding learned or not, W8A8 and W4A8: the error with the split is a third of the error without, or less."""
    model = network(DENOISER, DENOISER_SHAPES)
    value = model.graph.initializers["w3"]
    assert value.const_value is not None
    weight = value.const_value.numpy().copy()
    weight[:, 32:] /= 80
    value.const_value = ir.tensor(weight, name="w3")
    ir.save(model, tmp_path / "denoiser.onnx")
    generator = np.random.default_rng(3)
    held_out = {
        "x": generator.standard_normal((32, 1, 8, 8)).astype(np.float32),
        "t": generator.integers(0, 1000, 32),
    }
    exact = Session(tmp_path / "denoiser.onnx").run(held_out)[0]
    for weights in ("int8", "int4"):
        errors = {}
        for form in ("none", "two_op", "equalize"):
            result = onnxq.quantize(
                tmp_path / "denoiser.onnx",
                recipe="q-diffusion",
                weights=weights,
                activations="int8",
                steps=8,
                exclude=["first", "last"],
                knobs={"iterations": 200, "trajectories": 4, "kept_steps": 8, "split": form},
            )
            errors[form] = float(np.mean((Session(result.model, optimize=False).run(held_out)[0] - exact) ** 2))
            assert list(result.numbers.get("split_shortcuts", {})) == ([] if form == "none" else ["join"])
        assert max(errors["two_op"], errors["equalize"]) < errors["none"] / 3


def test_a_form_that_there_is_not(tmp_path: Path) -> None:
    ir.save(network(DENOISER, DENOISER_SHAPES), tmp_path / "denoiser.onnx")
    with pytest.raises(OnnxqError, match="two_op, equalize, none"):
        onnxq.quantize(tmp_path / "denoiser.onnx", recipe="q-diffusion", steps=4, knobs={"split": "half"})


def test_the_shortcuts_of_a_real_denoiser(shared_data: Path) -> None:
    path = shared_data / "denoisers" / "fashion_unet_guided.onnx"
    model = models.load(path)
    found = {shortcut.name: shortcut.sizes for shortcut in find_shortcuts(model.graph)}
    assert len([sizes for sizes in found.values() if sizes[0] >= 32]) == 6
    SplitShortcuts()(model)
    denoiser = denoisers.find(model)
    generator = np.random.default_rng(0)
    feed = {
        denoiser.sample.name: generator.standard_normal((2, 1, 28, 28)).astype(np.float32),
        denoiser.timestep.name: np.asarray([900, 20]),
        **{item.spec.name: np.asarray([3, 8]) for item in denoiser.conditions},
    }
    expected, got = (Session(item).run(feed)[0] for item in (path, model))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
