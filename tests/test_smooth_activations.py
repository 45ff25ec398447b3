"""Scales move from activations into weights, and the function stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
import torch
from conftest import add_weights

import onnxq
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration.channels import KEPT_ROWS, ChannelStatistics, record_channels
from onnxq.calibration.data import RANGE_RULE_KEY, Iterables, input_specs
from onnxq.config import make_settings
from onnxq.job import Job
from onnxq.learning.channel_scales import expected_error, migration, round_matrix, weight_maxima, weight_specs
from onnxq.passes.smooth_activations import SmoothActivations, groups, is_foldable
from onnxq.progress import Progress
from onnxq.recipes.smoothquant import SmoothQuant
from onnxq.recipes.static import Static
from onnxq.runtime import Session
from onnxq.targets import get as get_target

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'

NORM = f"""{HEAD}
norm (float[N,5,16] x) => (float[N,5,20] y, float[N,5,24] z)
{{
    a = LayerNormalization <axis=-1> (x, g, b)
    [left] y = MatMul (a, w1)
    [right] z = MatMul (a, w2)
}}
"""
NORM_SHAPES = {"g": (16,), "b": (16,), "w1": (16, 20), "w2": (16, 24)}

# An RMSNorm taken apart, a gated feed-forward layer, and an output projection that reads the gate's product.
GATE = f"""{HEAD}
gate (float[N,5,16] x) => (float[N,5,16] y)
<float two = {{2.0}}, float tiny = {{0.00001}}, int64[1] last = {{-1}}>
{{
    square = Pow (x, two)
    mean = ReduceMean (square, last)
    shifted = Add (mean, tiny)
    root = Sqrt (shifted)
    inverse = Reciprocal (root)
    normed = Mul (x, inverse)
    a = Mul (normed, g)
    [gate] h = MatMul (a, w1)
    s = Sigmoid (h)
    silu = Mul (h, s)
    [up] u = MatMul (a, w2)
    product = Mul (silu, u)
    [down] d = MatMul (product, w3)
    y = Add (x, d)
}}
"""
GATE_SHAPES = {"g": (16,), "w1": (16, 24), "w2": (16, 24), "w3": (24, 16)}

BIASED = f"""{HEAD}
biased (float[N,16] x) => (float[N,8] y)
{{
    [fc1] h = Gemm <transB=1> (x, w1, b1)
    r = Relu (h)
    [fc2] m = MatMul (r, w2)
    a = Add (b2, m)
    l = LeakyRelu (a)
    [fc3] y = Gemm (l, w3)
}}
"""
BIASED_SHAPES = {"w1": (24, 16), "b1": (24,), "w2": (24, 12), "b2": (12,), "w3": (12, 8)}

CONVOLUTIONS = f"""{HEAD}
convolutions (float[N,4,9,9] x) => (float[N,6,A,B] y)
{{
    [conv1] c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    n = BatchNormalization (c, g2, b2, m2, v2)
    r = Relu (n)
    p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r)
    [conv2] d = Conv <pads=[1,1,1,1], group=4> (p, w2, b3)
    [conv3] y = Conv (d, w3)
}}
"""
CONVOLUTION_SHAPES = {
    "w1": (8, 4, 3, 3), "b1": (8,), "g2": (8,), "b2": (8,), "m2": (8,), "v2": (8,), "w2": (12, 2, 3, 3), "b3": (12,),
    "w3": (6, 12, 1, 1),
}  # fmt: skip

TRANSPOSED = f"""{HEAD}
transposed (float[5,16] x) => (float[7,5] y, float[5,6] z)
{{
    a = LayerNormalization <axis=-1> (x, g)
    t = Transpose <perm=[1,0]> (a)
    [left] y = MatMul (w1, t)
    q = Mul (x, c)
    p = Transpose <perm=[1,0]> (q)
    [gemm] z = Gemm <transA=1, transB=1> (p, w2)
}}
"""

SHARED = f"""{HEAD}
shared (float[N,16] x) => (float[N,16] y, float[N,8] z)
{{
    a = LayerNormalization <axis=-1> (x, g, b)
    [first] h = MatMul (a, w1)
    c = LayerNormalization <axis=-1> (h, g, b)
    [second] y = MatMul (c, w1)
    [third] z = MatMul (c, w2)
}}
"""

RESIDUAL = f"""{HEAD}
residual (float[N,16] x) => (float[N,16] y)
{{
    a = LayerNormalization <axis=-1> (x, g)
    [fc] h = MatMul (a, w)
    y = Add (a, h)
}}
"""


def build(text: str, shapes: dict[str, tuple[int, ...]]) -> ir.Model:
    model = add_weights(text, shapes)
    common_passes.ShapeInferencePass()(model)
    return model


def scales(model: ir.Model, convolutions: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    return {group.name: np.exp(generator.normal(size=group.channels)) for group in groups(model.graph, convolutions)}


def run(model: ir.Model, taps: tuple[str, ...] = ()) -> list[np.ndarray]:
    (value,) = [value for value in model.graph.inputs if not value.is_initializer()]
    shape = [size if isinstance(size, int) else 3 for size in value.shape]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return Session(model, taps=taps, optimize=False).run({value.name: x})


def check_function(model: ir.Model, taps: tuple[str, ...], convolutions: bool = False) -> SmoothActivations:
    """Smooth every group and compare outputs, and the tapped values with what they are divided by."""
    count = len(model.graph.outputs)
    nodes = len(list(model.graph))
    expected, given = run(model, taps), scales(model, convolutions)
    axes = {group.name: group.axis for group in groups(model.graph, convolutions)}
    smooth = SmoothActivations(given, convolutions=convolutions)
    assert smooth(model).modified
    found = run(model, tuple(f"{name}_rescaled" for name in taps))
    for wanted, got in zip(expected[:count], found[:count], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)
    for name, wanted, got in zip(taps, expected[count:], found[count:], strict=True):
        divisor = given[name].reshape([-1 if axis == axes[name] % wanted.ndim else 1 for axis in range(wanted.ndim)])
        np.testing.assert_allclose(got, wanted / divisor, rtol=2e-4, atol=2e-5)
    assert len(list(model.graph)) == nodes
    assert not SmoothActivations(given, convolutions=convolutions)(model).modified
    return smooth


@pytest.mark.parametrize(
    ("text", "shapes", "taps"),
    [
        (NORM, NORM_SHAPES, ("a",)),
        (GATE, GATE_SHAPES, ("a", "product")),
        (BIASED, BIASED_SHAPES, ("r", "l")),
    ],
)
def test_matrix_products_keep_the_function(text: str, shapes: dict, taps: tuple[str, ...]) -> None:
    smooth = check_function(build(text, shapes), taps)
    assert set(taps) <= set(smooth.folded)


def test_convolutions_keep_the_function() -> None:
    model = build(CONVOLUTIONS, CONVOLUTION_SHAPES)
    assert check_function(model, ("p", "d"), convolutions=True).folded == ["p", "d"]


def test_transposes_and_weights_on_the_left() -> None:
    model = build(TRANSPOSED, {"g": (16,), "w1": (7, 16), "w2": (6, 16), "c": (16,)})
    assert set(check_function(model, ("t", "p")).folded) == {"t", "p"}


def test_norms_and_products_need_no_known_ranks() -> None:
    model = add_weights(NORM, NORM_SHAPES)
    assert check_function(model, ("a",)).folded == ["a"]


def test_shared_initializers_are_copied() -> None:
    model = build(SHARED, {"g": (16,), "b": (16,), "w1": (16, 16), "w2": (16, 8)})
    smooth = check_function(model, ("a", "c"))
    assert smooth.folded == ["a", "c"]
    first, second = (node for node in model.graph if node.name in ("first", "second"))
    assert first.inputs[1] is not second.inputs[1]


def test_a_weight_that_one_group_shares_stays_shared() -> None:
    model = build(NORM.replace("w2", "w1").replace("24] z", "8] z"), {"g": (16,), "b": (16,), "w1": (16, 8)})
    check_function(model, ("a",))
    left, right = (node for node in model.graph if node.op_type == "MatMul")
    assert left.inputs[1] is right.inputs[1]


def test_what_others_read_is_left_alone_or_gets_one_mul() -> None:
    model = build(RESIDUAL, {"g": (16,), "w": (16, 16)})
    (group,) = groups(model.graph)
    given = scales(model)
    assert not is_foldable(group)
    assert not SmoothActivations(given)(model).modified
    expected = run(model)
    smooth = SmoothActivations(given, insert=True)
    assert smooth(model).modified
    assert smooth.inserted == ["a"]
    np.testing.assert_allclose(run(model)[0], expected[0], rtol=2e-4, atol=2e-5)
    assert [node.op_type for node in model.graph].count("Mul") == 1
    assert not SmoothActivations(given, insert=True)(model).modified


@pytest.mark.parametrize("op", ["Sigmoid", "Gelu", "Softmax", "Neg"])
def test_what_is_not_homogeneous_is_not_passed(op: str) -> None:
    model = build(BIASED.replace("Relu (h)", f"{op} (h)", 1), BIASED_SHAPES)
    first = next(group for group in groups(model.graph) if group.name == "r")
    assert not is_foldable(first)


def test_a_sum_of_two_activations_is_not_passed() -> None:
    text = BIASED.replace("r = Relu (h)", "r = Add (h, h2)").replace(
        "    [fc2]", "    [fc4] h2 = Gemm <transB=1> (x, w1)\n    [fc2]"
    )
    lines = text.splitlines()
    add = next(index for index, line in enumerate(lines) if "r = Add" in line)
    lines[add], lines[add + 1] = lines[add + 1], lines[add]
    model = build("\n".join(lines), BIASED_SHAPES)
    assert not is_foldable(next(group for group in groups(model.graph) if group.name == "r"))


def test_migration_is_equation_four_and_evens_out_the_maxima() -> None:
    activations, weights = np.array([64.0, 1.0, 0.0]), np.array([1.0, 4.0, 2.0])
    np.testing.assert_allclose(migration(activations, weights, 0.5), [8.0, 0.5, 1.0])
    even = migration(activations, weights, 0.5)[:2]
    np.testing.assert_allclose(activations[:2] / even, weights[:2] * even)  # at one half both have the same maxima


def test_channel_statistics_merge_and_stay_small() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.standard_normal((3, 5, 7, 11)).astype(np.float32) for _ in range(40)]
    whole, left, right = ChannelStatistics(), ChannelStatistics(), ChannelStatistics()
    for index, part in enumerate(parts):
        whole.update(part, 1)
        (left if index < 20 else right).update(part, 1)
    left.merge(right)
    everything = np.concatenate(parts).transpose(0, 2, 3, 1).reshape(-1, 5)
    for statistics in (whole, left):
        np.testing.assert_array_equal(statistics.maxima, np.abs(everything).max(axis=0))
        np.testing.assert_allclose(
            statistics.mean_magnitude, np.abs(everything).mean(axis=0, dtype=np.float64), rtol=1e-6
        )
        assert KEPT_ROWS // 3 < len(statistics.rows) <= KEPT_ROWS


def test_channels_are_recorded_from_the_float_graph() -> None:
    model = build(NORM, NORM_SHAPES)
    x = np.random.default_rng(2).standard_normal((10, 5, 16)).astype(np.float32)
    found = record_channels(model, {"a": 2, "x": -1}, Iterables([{"x": x}]), input_specs(model), samples=10)
    np.testing.assert_array_equal(found["x"].maxima, np.abs(x).reshape(-1, 16).max(axis=0))
    tapped = Session(model, taps=["a"]).run({"x": x})[-1]
    np.testing.assert_allclose(found["a"].maxima, np.abs(tapped).reshape(-1, 16).max(axis=0), rtol=1e-5)


@pytest.mark.parametrize("search", [False, True])
def test_smoothquant_takes_outliers_out_of_an_activation(search: bool) -> None:
    """One channel is a hundred times the others: a single scale leaves them few codes, smoothing gives them back."""
    model = build(NORM, NORM_SHAPES)
    gain = np.ones(16, np.float32)
    gain[3] = 100
    model.graph.initializers["g"].const_value = ir.tensor(gain, name="g")
    errors = []
    samples = [{"x": np.random.default_rng(4).standard_normal((32, 5, 16)).astype(np.float32)}]
    expected = Session(model).run(samples[0])[0]
    for recipe in (Static(observer="minmax", smooth=0.0), SmoothQuant(search=search, observer="minmax")):
        copied = ir.from_proto(ir.to_proto(model))
        target = get_target("cpu")
        settings = make_settings({})
        job = Job(copied, target, target.scheme(None, None), settings, Iterables(samples), Progress())
        recipe.run(job)
        errors.append(np.square(Session(job.model).run(samples[0])[0] - expected).mean())
    assert errors[1] < errors[0] / 4


# What PaddleOCR's readers of text are made of: a scalar Mul and Add between a HardSwish and a depthwise convolution.
DEPTHWISE = f"""{HEAD}
depthwise (float[N,16,9,9] x) => (float[N,32] y)
<float[1] half = {{0.5}}, float[1] less = {{-0.2}}>
{{
    [first] a = Conv (x, w1, b1)
    h = HardSwish (a)
    m = Mul (half, h)
    s = Add (m, less)
    [deep] d = Conv <group=16, pads=[1, 1, 1, 1]> (s, w2)
    r = Relu (d)
    [last] c = Conv (r, w3)
    p = GlobalAveragePool (c)
    y = Flatten (p)
}}
"""
DEPTHWISE_SHAPES = {"w1": (16, 16, 1, 1), "b1": (16,), "w2": (16, 1, 3, 3), "w3": (32, 16, 1, 1)}


def uneven() -> ir.Model:
    """A network in which one channel is three hundred times the others, before weights that are so much smaller."""
    model = build(DEPTHWISE, DEPTHWISE_SHAPES)
    for name, factor in (("w1", 300.0), ("b1", 300.0), ("w2", 1 / 300.0)):
        array = model.graph.initializers[name].const_value.numpy().copy()
        array[3] *= factor
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


def test_channels_that_stick_out_between_convolutions_are_levelled_by_default(tmp_path: Path) -> None:
    path = tmp_path / "depthwise.onnx"
    ir.save(uneven(), path)
    data = [{"x": np.random.default_rng(5).standard_normal((32, 16, 9, 9)).astype(np.float32)}]
    plain, smooth = (onnxq.quantize(path, data, knobs={"smooth": smooth}) for smooth in (0, 0.75))
    assert smooth.numbers["sqnr_db"] > plain.numbers["sqnr_db"] + 12
    assert len(smooth.model.graph) == len(plain.model.graph)


def test_made_inputs_level_only_if_they_match_what_the_model_remembers(tmp_path: Path) -> None:
    """Others do not show which channels are large."""
    path = tmp_path / "depthwise.onnx"
    ir.save(uneven(), path)
    rows = np.random.default_rng(5).standard_normal((32, 16, 9, 9)).astype(np.float32)
    found = {}
    for rule in ("widened", "robust"):
        np.savez(tmp_path / f"{rule}.npz", x=rows, **{RANGE_RULE_KEY: np.array(rule)})
        found[rule] = onnxq.quantize(path, tmp_path / f"{rule}.npz").numbers["sqnr_db"]
    assert found["widened"] > found["robust"] + 12
    judged = [onnxq.quantize(path, knobs={"smooth": smooth}).numbers["sqnr_db"] for smooth in (0, 0.75)]
    assert judged[0] == judged[1]  # random inputs


@pytest.mark.parametrize(
    ("recipe", "module", "knobs"),
    [
        ("gptq", "onnxq.recipes.gptq", {}),
        ("brecq", "onnxq.learning.reconstruction_knobs", {"iterations": 20}),
        ("lsq", "onnxq.recipes.lsq", {"steps": 5}),
        ("mixed", "onnxq.recipes.mixed", {"budget_bits": 8}),
    ],
)
def test_recipes_that_learn_level_first(
    recipe: str, module: str, knobs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "depthwise.onnx"
    ir.save(uneven(), path)
    data = [{"x": np.random.default_rng(5).standard_normal((32, 16, 9, 9)).astype(np.float32)}]
    weights = None if recipe == "mixed" else "int4"
    levelled = onnxq.quantize(path, data, recipe=recipe, weights=weights, activations="int8", knobs=knobs).numbers
    monkeypatch.setattr(f"{module}.level", lambda job: None)
    plain = onnxq.quantize(path, data, recipe=recipe, weights=weights, activations="int8", knobs=knobs).numbers
    assert levelled["sqnr_db"] > plain["sqnr_db"] + 3


def test_nothing_is_levelled_where_weights_and_activations_are_narrow(tmp_path: Path) -> None:
    path = tmp_path / "depthwise.onnx"
    ir.save(uneven(), path)
    data = [{"x": np.random.default_rng(5).standard_normal((32, 16, 9, 9)).astype(np.float32)}]
    plain, smooth = (
        onnxq.quantize(path, data, weights="int4", activations="int4", knobs={"smooth": smooth}).numbers["sqnr_db"]
        for smooth in (0, 0.75)
    )
    assert smooth == plain


def test_the_expected_error_of_a_convolution_is_near_the_one_it_makes() -> None:
    model = uneven()
    x = np.random.default_rng(6).standard_normal((24, 16, 9, 9)).astype(np.float32)
    target = get_target("tensorrt")
    scheme = target.scheme(None, None)
    specs = weight_specs(target.place(model.graph, scheme))
    found = {group.name: group for group in groups(model.graph, convolutions=True)}
    recorded = record_channels(model, {"s": 1, "r": 1}, Iterables([{"x": x}]), input_specs(model), samples=24)
    for name, output in (("s", "d"), ("r", "c")):
        group, statistics = found[name], recorded[name]
        for alpha in (0.5, 1.0):
            scale = migration(statistics.maxima, weight_maxima(group), alpha)
            expected = expected_error(group, statistics, scale, specs, scheme.activations)
            exact, rounded = outputs_of(group, statistics, scale, specs, scheme, model, x, output)
            shares = np.square(rounded - exact).mean(axis=(0, 2, 3)) / np.square(exact).mean(axis=(0, 2, 3))
            assert 0.4 < expected / shares.mean() < 2.5


def outputs_of(group, statistics, scale, specs, scheme, model, x, output):  # type: ignore[no-untyped-def]
    """The layer's output in float, and with its input and its weight rounded after a scale."""
    value, exact = Session(model, taps=[group.name, output]).run({"x": x}, [group.name, output])
    layer = group.layers[0].node
    spread = scale.reshape(1, -1, 1, 1)
    low, high = (statistics.low / scale).min(), (statistics.high / scale).max()
    step, zero_point = scale_and_zero_point(low, high, scheme.activations.format, symmetric=True)
    weight = layer.inputs[1].const_value.numpy().astype(np.float64)
    depthwise = weight.shape[1] == 1
    factor = scale.reshape(-1, 1, 1, 1) if depthwise else spread
    flat = (weight * factor).reshape(len(weight), -1)
    codes = round_matrix(flat, specs[layer]).reshape(weight.shape) / factor
    rounded = fake_quantize(value / spread, step, zero_point, scheme.activations.format) * spread
    pads = 1 if depthwise else 0
    found = torch.nn.functional.conv2d(
        torch.from_numpy(rounded), torch.from_numpy(codes), padding=pads, groups=len(scale) if depthwise else 1
    )
    return exact, found.numpy()


def test_weight_maxima_are_over_all_layers_of_a_group() -> None:
    model = build(NORM, NORM_SHAPES)
    (group,) = groups(model.graph)
    both = np.concatenate([model.graph.initializers[name].const_value.numpy() for name in ("w1", "w2")], axis=1)
    np.testing.assert_array_equal(weight_maxima(group), np.abs(both).max(axis=1))


def test_a_recipe_that_finds_nothing_to_smooth_says_so(tmp_path: Path) -> None:
    path = tmp_path / "residual.onnx"
    ir.save(build(RESIDUAL, {"g": (16,), "w": (16, 16)}), path)
    data = [{"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}]
    said = {
        insert: onnxq.quantize(path, data, recipe="smoothquant", knobs={"insert": insert}).numbers["warnings"]
        for insert in (False, True)
    }
    assert any("nothing was smoothed" in line and "insert=true" in line for line in said[False])
    assert not any("nothing was smoothed" in line for line in said[True])
