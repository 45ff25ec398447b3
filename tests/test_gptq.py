"""Rounding column by column: against brute force, for every kind of layer, and from end to end."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import NETWORK, SHAPES, add_weights
from torch.nn import functional

from onnxq import layer_nodes
from onnxq import model as models
from onnxq.calibration.data import Iterables
from onnxq.config import make_settings
from onnxq.job import Job
from onnxq.learning.gptq import Columns, round_columns, towards_float, weighted_error, with_best_steps
from onnxq.learning.hessian import Hessian, Layer, layer, unfold
from onnxq.progress import Progress
from onnxq.recipes.gptq import Gptq
from onnxq.recipes.static import Static
from onnxq.runtime import Session
from onnxq.targets import get as get_target

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'

PRODUCTS = f"""{HEAD}
products (float[N,6,32] x) => (float[N,6,24] y, float[N,24,6] z)
{{
    [first] h = MatMul (x, w1)
    a = Add (h, b1)
    r = Relu (a)
    [second] y = MatMul (r, w2)
    t = Transpose <perm=[0,2,1]> (r)
    [left] z = MatMul (w3, t)
}}
"""
PRODUCT_SHAPES = {"w1": (32, 40), "b1": (40,), "w2": (40, 24), "w3": (24, 40)}

TIED_APART = f"""{HEAD}
tied (float[N,32] x) => (float[N,32] y)
{{
    [zero] a = MatMul (x, w1)
    b = Gelu (a)
    [one] c = MatMul (b, w)
    d = Gelu (c)
    [between] e = MatMul (d, w3)
    f = Gelu (e)
    [two] y = MatMul (f, w)
}}
"""

TIED = f"""{HEAD}
tied (float[N,32] x) => (float[N,32] y, float[N,8] z)
<int64[8] index = {{0, 3, 5, 7, 9, 11, 13, 30}}>
{{
    [one] h1 = MatMul (x, w)
    r1 = Tanh (h1)
    [two] h2 = MatMul (r1, w)
    r2 = Tanh (h2)
    [three] y = MatMul (r2, w)
    g = Gather <axis=1> (w, index)
    [last] z = MatMul (r2, g)
}}
"""

GROUPED = f"""{HEAD}
grouped (float[N,8,9,9] x) => (float[N,8,A,B] y)
{{
    [wide] c = Conv <pads=[2,1,2,1], dilations=[2,1], strides=[2,2], group=2> (x, w1)
    r = Relu (c)
    [depthwise] d = Conv <auto_pad="SAME_UPPER", strides=[2,2], group=16> (r, w2, b2)
    [point] y = Conv (d, w3)
}}
"""
GROUPED_SHAPES = {"w1": (16, 4, 3, 3), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (8, 16, 1, 1)}


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Columns, torch.Tensor]:
    """A random weight on a 3-bit grid and a Hessian whose inputs depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, rows, columns, generator=generator)
    common = torch.randn(1000, 1, generator=generator)
    inputs = common + torch.randn(1000, columns, generator=generator) * torch.linspace(0.2, 0.6, columns)
    scale = (weight.abs().amax(dim=2, keepdim=True) / 2.6).expand_as(weight)
    hessian = (inputs.mT @ inputs / 1000).to(torch.float64)[None]
    return Columns(weight, scale, torch.zeros_like(weight), -4, 3), hessian


def test_two_columns_are_rounded_as_well_as_brute_force_can() -> None:
    """Once the first column is rounded, the best code of the last one is the nearest of where it has moved to."""
    columns, hessian = problem(50, 2)
    rounded, _, _ = round_columns(columns, hessian, damping=1e-9)
    found = weighted_error(rounded - columns.weight, hessian)[0]
    first = columns.nearest()[:, :, 0]
    best = torch.full((50,), torch.inf, dtype=torch.float64)
    for code in range(-4, 4):
        tried = torch.stack([first, code * columns.scale[:, :, 1]], dim=2)
        best = torch.minimum(best, weighted_error(tried - columns.weight, hessian)[0])
    torch.testing.assert_close(found, best)


def test_it_lies_between_nearest_rounding_and_the_best_of_all_codes() -> None:
    columns, hessian = problem(12, 4)
    best = torch.full((12,), torch.inf, dtype=torch.float64)
    for codes in itertools.product(range(-4, 4), repeat=4):
        tried = torch.tensor(codes) * columns.scale
        best = torch.minimum(best, weighted_error(tried - columns.weight, hessian)[0])
    nearest = weighted_error(columns.nearest() - columns.weight, hessian)[0].sum()
    found = weighted_error(round_columns(columns, hessian)[0] - columns.weight, hessian)[0].sum()
    assert best.sum() <= found < 0.6 * nearest
    assert found < 2 * best.sum()


@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_of_columns_change_nothing(act_order: bool) -> None:
    """150 columns in blocks of 128 give what the plain loop over the inverse Hessian of the rest gives."""
    columns, hessian = problem(4, 150)
    rounded, _, _ = round_columns(columns, hessian, act_order=act_order)
    damped = hessian[0] + 0.01 * hessian[0].diagonal().mean() * torch.eye(150)
    rest = hessian[0].diagonal().argsort(descending=True) if act_order else torch.arange(150)
    weight, expected = columns.weight[0].to(torch.float64).clone(), torch.empty(4, 150, dtype=torch.float64)
    while len(rest):
        column = rest[0]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        scale = columns.scale[0, :, column].to(torch.float64)
        expected[:, column] = (weight[:, column] / scale).round().clamp(-4, 3) * scale
        error = (weight[:, column] - expected[:, column]) / inverse[0, 0]
        weight[:, rest] -= error[:, None] * inverse[0]
        rest = rest[1:]
    torch.testing.assert_close(rounded[0].to(torch.float64), expected, rtol=1e-5, atol=1e-5)


def test_other_steps_stay_only_in_rows_where_they_lose_less() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 16, 12, generator=generator)
    inputs = torch.randn(2, 200, 12, generator=generator) @ torch.randn(2, 12, 12, generator=generator)
    hessian = (inputs.mT @ inputs / 200).double()
    step = weight.abs().amax(dim=2, keepdim=True) / 3
    columns = Columns(weight, step.expand_as(weight), torch.zeros_like(weight), -4, 3)
    own, _, _ = round_columns(columns, hessian)
    rounded, factors = with_best_steps(columns, hessian, own, (0.7, 0.85, 1.15))
    before, after = (weighted_error(weight - value, hessian) for value in (own, rounded))
    assert (after <= before).all() and (after < 0.9 * before).any()
    assert torch.equal(rounded[factors == 1], own[factors == 1]) and (factors != 1).any()
    codes = rounded / (step * factors[:, :, None])
    assert (codes - codes.round()).abs().max() < 1e-4 and codes.min() > -4.5 and codes.max() < 3.5


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    columns, _ = problem(5, 7)
    hessian = torch.diag_embed(torch.tensor([[3.0, 1, 0, 2, 5, 0, 1]], dtype=torch.float64))
    rounded, _, _ = round_columns(columns, hessian, act_order=True)
    torch.testing.assert_close(rounded, columns.nearest())
    zero, _, _ = round_columns(columns, torch.zeros(1, 7, 7, dtype=torch.float64))
    torch.testing.assert_close(zero, columns.nearest())


def test_scales_of_blocks_follow_the_columns_where_they_are_not_static() -> None:
    columns, hessian = problem(6, 200)
    seen = []

    def rescale(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(rows.clone())
        return rows.abs().amax(dim=1) / 3, torch.zeros(len(rows))

    rounded, scale, _ = round_columns(columns, hessian, rescale=rescale, block_size=48)
    assert [rows.shape for rows in seen] == [(6, 48)] * 4 + [(6, 8)]
    codes = rounded / scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    for start in range(0, 200, 48):
        assert (scale[:, :, start : start + 48] == scale[:, :, start : start + 1]).all()
    torch.testing.assert_close(seen[0], columns.weight[0, :, :48])
    # The third block begins inside the first 128 columns and ends beyond: all errors before it have reached it.
    plain, _, _ = round_columns(columns, hessian, rescale=None)
    assert not torch.equal(plain, rounded)


@pytest.mark.parametrize(
    ("attributes", "arguments", "shape", "groups"),
    [
        ("<pads=[1,1,1,1]>", {"padding": 1}, (8, 3, 3, 3), 1),
        (
            "<strides=[2,2], dilations=[2,1], pads=[2,1,2,1], group=2>",
            {"stride": 2, "dilation": (2, 1), "padding": (2, 1), "groups": 2},
            (8, 2, 3, 2),
            2,
        ),
        ('<auto_pad="SAME_LOWER", group=6>', {"padding": "same", "groups": 6}, (6, 1, 3, 3), 6),
        ("<pads=[1,1]>", {"padding": 1}, (4, 3, 3), 1),
        ("", {}, (4, 2, 2, 2, 2), 1),
    ],
)
def test_im2col_makes_a_convolution_a_product(attributes: str, arguments: dict, shape: tuple, groups: int) -> None:
    axes = ",".join("9" * (len(shape) - 2))
    sizes = ",".join(map(str, shape))
    head = f"float[N,{shape[1] * groups},{axes}] x, float[{sizes}] w"
    model = ir.from_onnx_text(f"{HEAD} conv ({head}) => (float[N] y) {{ y = Conv {attributes} (x, w) }}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, shape[1] * groups, *[9] * (len(shape) - 2), generator=generator)
    weight = torch.randn(shape, generator=generator)
    unfolded = unfold(x, model.graph[0], shape)
    product = (weight.reshape(groups, shape[0] // groups, -1) @ unfolded).mT  # [groups, positions, rows]
    expected = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[len(shape)](x, weight, **arguments)
    found = product.permute(1, 0, 2).reshape(2, -1, shape[0]).mT.reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def layers_of(text: str, shapes: dict[str, tuple[int, ...]]) -> list[Layer]:
    model = add_weights(text, shapes)
    return [found for item in layer_nodes.weighted_nodes(model.graph) if (found := layer(item)) is not None]


def test_hessians_of_products_merge() -> None:
    first, second, left = layers_of(PRODUCTS, PRODUCT_SHAPES)
    x = torch.randn(10, 6, 40, generator=torch.Generator().manual_seed(0))
    rows = x.reshape(-1, 40).to(torch.float64)
    whole, half, other = Hessian(), Hessian(), Hessian()
    whole.update(second, x)
    half.update(left, x[:5].mT)
    other.update(second, x[5:])
    half.merge(other)
    for hessian in (whole, half):
        torch.testing.assert_close(hessian.value[0], rows.mT @ rows / 60, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hessian.covariance[0], torch.cov(rows.mT, correction=0), rtol=1e-4, atol=1e-5)
    assert first.matrix(torch.zeros(32, 40)).shape == (1, 40, 32)
    weight = torch.randn(24, 40)
    torch.testing.assert_close(left.weight(left.matrix(weight)), weight)


def test_a_weight_makes_up_for_what_its_inputs_have_lost() -> None:
    (_, second, _) = layers_of(PRODUCTS, PRODUCT_SHAPES)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, 40, generator=generator) + 0.3
    weight = torch.randn(1, 24, 40, generator=generator)
    lost = torch.eye(40) + 0.1 * torch.randn(40, 40, generator=generator)
    hessian, split = Hessian(), Hessian()
    hessian.update(second, x, x @ lost.mT)
    for part in torch.split(x, 20):
        other = Hessian()
        other.update(second, part, part @ lost.mT)
        split.merge(other)
    exact = weight @ lost  # then W·(x + d) is found from x alone
    for found in (hessian, split):
        whole = towards_float(weight, found.value, found.drift, 1.0, ridge=1e-9)
        torch.testing.assert_close(whole, exact, rtol=1e-4, atol=1e-4)
        half = towards_float(weight, found.covariance, found.centred_drift, 0.5, ridge=1e-9)
        torch.testing.assert_close(half, (weight + exact) / 2, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mean_drift + found.mean, found.mean @ lost.double().mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("correct_biases", [True, False])
def test_later_layers_make_up_for_earlier_ones(correct_biases: bool) -> None:
    errors = [
        quantize(NETWORK, SHAPES, Gptq(asymmetry=part, correct_biases=correct_biases), "int3")[1] for part in (0, 0.5)
    ]
    assert errors[1] < 0.9 * errors[0]


def quantize(
    text: str, shapes: dict, recipe: Gptq | Static, weights: str, activations: str = "float", **options: object
) -> tuple[ir.Model, float]:
    """The quantized model and the mean squared error of its outputs."""
    model = add_weights(text, shapes)
    models.normalise(model)
    (value,) = [value for value in model.graph.inputs if not value.is_initializer()]
    size = [64, *(int(size) for size in value.shape[1:])]
    generator = np.random.default_rng(7)
    x = generator.standard_normal(size).astype(np.float32)
    channels = 1 if len(size) == 4 else len(size) - 1
    common = [1 if axis == channels else count for axis, count in enumerate(size)]
    x = (
        0.4 * x + generator.standard_normal(common).astype(np.float32) + np.float32(0.3)
    )  # channels depend on each other
    expected = Session(model).run({value.name: x})
    target = get_target("cpu")
    scheme = target.scheme(weights, activations)
    job = Job(model, target, scheme, make_settings({}), Iterables([{value.name: x}]), Progress(), **options)
    recipe.run(job)
    found = Session(job.model, optimize=False).run({value.name: x})
    return job.model, sum(float(np.square(a - b).mean()) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("text", "shapes", "weights", "activations"),
    [
        (NETWORK, SHAPES, "int4", "float"),
        (NETWORK, SHAPES, "int4", "uint8"),
        (GROUPED, GROUPED_SHAPES, "int4", "float"),
        (PRODUCTS, PRODUCT_SHAPES, "int3", "float"),
        (PRODUCTS, PRODUCT_SHAPES, "int4:16", "float"),
        (PRODUCTS, PRODUCT_SHAPES, "uint4:16", "float"),
        (PRODUCTS, PRODUCT_SHAPES, "int4", "uint8"),
    ],
)
def test_it_beats_nearest_rounding(text: str, shapes: dict, weights: str, activations: str) -> None:
    _, nearest = quantize(text, shapes, Static(weight_ranges="mse"), weights, activations)
    _, found = quantize(text, shapes, Gptq(), weights, activations)
    assert found < 0.7 * nearest
    _, papers = quantize(text, shapes, Gptq(correct_biases=False), weights, activations)
    assert papers < nearest


def test_scales_of_blocks_that_are_not_static_are_stored() -> None:
    recipe = Gptq(act_order=False, static_groups=False, weight_ranges="minmax")
    model, found = quantize(PRODUCTS, PRODUCT_SHAPES, recipe, "int4:16")
    _, nearest = quantize(PRODUCTS, PRODUCT_SHAPES, Static(), "int4:16")
    assert found < 0.7 * nearest
    assert model.graph.initializers["w2_scale"].const_value.numpy().shape == (3, 24)


def test_a_shared_weight_is_rounded_once_and_other_readers_keep_the_float_one() -> None:
    model, found = quantize(TIED, {"w": (32, 32)}, Gptq(), "int4")
    _, nearest = quantize(TIED, {"w": (32, 32)}, Static(weight_ranges="mse"), "int4")
    assert found < nearest
    readers = [node for node in model.graph if node.name in ("one", "two", "three")]
    assert {node.op_type for node in readers} == {"MatMulNBits"}  # which onnxruntime would not make of a shared weight
    assert len({node.inputs[1] for node in readers}) == 1


def test_a_weight_is_rounded_for_readers_in_blocks_ahead() -> None:
    """The network's inputs are still there when the first of them is no longer read."""
    shapes = {"w1": (32, 32), "w": (32, 32), "w3": (32, 32)}
    _, found = quantize(TIED_APART, shapes, Gptq(), "int4")
    _, nearest = quantize(TIED_APART, shapes, Static(weight_ranges="mse"), "int4")
    assert found < nearest


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq.learning import columnwise

    expected = ir.to_proto(quantize(NETWORK, SHAPES, Gptq(), "int4")[0]).SerializeToString()
    real, calls = columnwise.round_columns, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(columnwise, "round_columns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(NETWORK, SHAPES, Gptq(), "int4", checkpoint=tmp_path / "state")
    calls.clear()
    monkeypatch.setattr(columnwise, "round_columns", lambda *a, **o: (calls.append(1), real(*a, **o))[1])
    found = ir.to_proto(quantize(NETWORK, SHAPES, Gptq(), "int4", checkpoint=tmp_path / "state")[0])
    assert found.SerializeToString() == expected
    assert len(calls) < 3
