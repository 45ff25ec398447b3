"""Residual expansion: the factor per order, the same function in every form, budgets, and real models without data."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DATA, MODELS, add_weights

import onnxq
from onnxq import layer_nodes
from onnxq import model as models
from onnxq.errors import OnnxqError
from onnxq.folding import array_of
from onnxq.formats import parse_format
from onnxq.passes.expand_residuals import ExpandResiduals
from onnxq.runtime import Session
from onnxq.scheme import Spec
from onnxq.synthesis.synthesize import synthesise
from onnxq.weights.residuals import Residuals, share_out, strongest

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
LAYERS = f"""{HEAD}
layers (float[N,8,9,9] x, float[N,6,8] s) => (float[N,12,9,9] y, float[N,6,10] z, float[N,5] g)
{{
    [plain] c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r = Relu (c)
    [grouped] d = Conv <pads=[1,1,1,1], group=4> (r, w2, b2)
    [depthwise] y = Conv <pads=[1,1,1,1], group=12> (d, w3)
    [product] z = MatMul (s, w4)
    p = GlobalAveragePool (y)
    f = Flatten (p)
    [head] g = Gemm <transB=1> (f, w5, b5)
}}
"""
SHAPES = {
    "w1": (12, 8, 3, 3), "b1": (12,), "w2": (12, 3, 3, 3), "b2": (12,), "w3": (12, 1, 3, 3), "w4": (8, 10),
    "w5": (5, 12), "b5": (5,),
}  # fmt: skip


def per_channel(name: str) -> Spec:
    return Spec(parse_format(name)[0], "channel", True)


def residuals(model: ir.Model, spec: Spec) -> dict[str, Residuals]:
    layers = {}
    for item in layer_nodes.weighted_nodes(model.graph):
        rows = np.moveaxis(array_of(item.weight), item.channel_axis, 0)
        groups = item.node.attributes.get_int("group", 1)
        layers[item.node.name] = Residuals(rows.reshape(len(rows), -1), spec, groups if groups > 1 else len(rows))
    return layers


@pytest.mark.parametrize(
    ("bits", "clip", "factor"),
    [(2, False, 2.0), (3, False, 6.0), (4, False, 14.0), (2, True, 3.0), (3, True, 7.0), (4, True, 15.0)],
)
def test_each_order_divides_the_largest_error(bits: int, clip: bool, factor: float) -> None:
    """The bound is tight in the worst row, so the measured ratio is the factor, not merely below it."""
    matrix = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
    expansion = Residuals(matrix, per_channel(f"int{bits}"), 64, clip=clip)
    largest = [np.abs(matrix).max(axis=1)]
    for _ in range(3):
        expansion.refine(np.arange(64))
        largest.append(np.abs(expansion.rest).max(axis=(1, 2)))
    ratios = [float(np.median(before / after)) for before, after in itertools.pairwise(largest)]
    assert all(0.97 * factor <= ratio <= 1.05 * factor for ratio in ratios), ratios
    assert (largest[3] <= largest[0] * factor**-3 * (1 + 1e-4)).all()


def test_reusing_the_first_scale_would_stop_the_decay() -> None:
    """What a wrong implementation does: the rest is below half a step, so nothing of it survives."""
    matrix = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    expansion = Residuals(matrix, per_channel("int4"), 4)
    expansion.refine(np.arange(4))
    scale = np.abs(matrix).max(axis=1, keepdims=True) / 7
    assert not np.rint(expansion.rest[:, 0] / scale / (1 + 1e-5)).any()
    assert expansion.errors().sum() < 0.01 * np.square(expansion.rest).sum()


@pytest.mark.parametrize("form", ["channels", "branches"])
@pytest.mark.parametrize("density", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("orders", [2, 3])
def test_the_expanded_graph_computes_the_same(form: str, density: float, orders: int) -> None:
    """Orders add up to the weight and the bias counts once, whatever is kept and whatever the layer."""
    model = add_weights(LAYERS, SHAPES)
    generator = np.random.default_rng(3)
    feed = {
        "x": generator.standard_normal((2, 8, 9, 9)).astype(np.float32),
        "s": generator.standard_normal((2, 6, 8)).astype(np.float32),
    }
    expected = Session(model, optimize=False).run(feed)
    layers = residuals(model, per_channel("int4"))
    for _ in range(orders - 1):
        for name, kept in strongest(layers, density, "layer").items():
            layers[name].refine(kept)
    assert all(len(layer.orders) == (1 if density == 0 else orders) for layer in layers.values())
    result = ExpandResiduals({name: layer.orders for name, layer in layers.items()}, form)(model)
    assert result.modified == (density > 0)
    for wanted, found in zip(expected, Session(model, optimize=False).run(feed), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_strongest_units_are_worth_more_than_others_and_budgets_hold() -> None:
    generator = np.random.default_rng(1)
    spread = np.exp(generator.standard_normal((40, 1))).astype(np.float32)
    wide = generator.standard_normal((40, 64)).astype(np.float32) * spread
    narrow = generator.standard_normal((20, 16)).astype(np.float32)

    def left(kept: dict[str, np.ndarray]) -> float:
        layers = fresh()
        for name, units in kept.items():
            layers[name].refine(units)
        return sum(layer.errors().sum() / layer.norm for layer in layers.values())

    def fresh() -> dict[str, Residuals]:
        return {"wide": Residuals(wide, per_channel("int3"), 40), "narrow": Residuals(narrow, per_channel("int3"), 20)}

    densities = (0.0, 0.1, 0.25, 0.5, 1.0)
    for allocation in ("network", "layer"):
        errors = [left(strongest(fresh(), density, allocation)) for density in densities]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]
    kept = strongest(fresh(), 0.25, "network")
    assert len(kept["wide"]) * 64 + len(kept["narrow"]) * 16 <= 0.25 * (wide.size + narrow.size)
    picked = {"wide": np.sort(generator.permutation(40)[:10]), "narrow": np.sort(generator.permutation(20)[:5])}
    assert left(strongest(fresh(), 0.25, "layer")) < left(picked)


def test_one_budget_for_all_orders_goes_where_it_matters() -> None:
    generator = np.random.default_rng(2)
    thin, wide = generator.standard_normal((8, 9)), generator.standard_normal((64, 64))
    layers = {
        "thin": Residuals(thin.astype(np.float32), per_channel("int4"), 8),
        "wide": Residuals(wide.astype(np.float32), per_channel("int4"), 64),
    }
    budget = thin.size + wide.size
    second, third = share_out(layers, {"thin": 1e4, "wide": 1.0}, budget, 2)
    assert len(third["thin"]) == 8 and len(third["wide"]) == 0 and 60 <= len(second["wide"]) < 64
    assert sum(len(order["thin"]) * 9 + len(order["wide"]) * 64 for order in (second, third)) <= budget
    assert all(len(layer.orders) == 1 for layer in layers.values())
    for order in (second, third):
        for name, kept in order.items():
            layers[name].refine(kept)
    for name, matrix in (("thin", thin), ("wide", wide)):
        left = np.square(layers[name].rounded().reshape(matrix.shape) - matrix).sum()
        np.testing.assert_allclose(left, layers[name].errors().sum(), rtol=1e-3)


def test_what_is_stored_is_what_was_expanded(tmp_path: Path) -> None:
    """The scale that a stored order gets is the one that it was rounded with, though it left half a step out."""
    weight = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    model = add_weights(f"{HEAD} g (float[N,16] x) => (float[N,32] y) {{ [p] y = MatMul (x, w) }}", {"w": weight.shape})
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    ir.save(model, tmp_path / "model.onnx")
    expected = Residuals(weight.T, per_channel("int4"), 32, clip=True)
    expected.refine(np.arange(32))
    onnxq.quantize(
        tmp_path / "model.onnx", [{"x": np.eye(16, dtype=np.float32)}], output=tmp_path / "rex.onnx", recipe="rex",
        weights="int4", activations="float", knobs={"bias_correction": False},
    )  # fmt: skip
    (found,) = Session(tmp_path / "rex.onnx").run({"x": np.eye(16, dtype=np.float32)})
    np.testing.assert_allclose(found, expected.rounded()[:, 0].T, atol=1e-6)


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_both_targets_run_every_order_on_integers(network: Path, calibration: Path, target: str) -> None:
    plain = onnxq.quantize(network, calibration, recipe="rex", target=target, knobs={"orders": 1})
    expanded = onnxq.quantize(network, calibration, recipe="rex", target=target)
    assert expanded.numbers["quantized_nodes"] == plain.numbers["quantized_nodes"] > 0
    assert expanded.numbers["sqnr_db"] > plain.numbers["sqnr_db"] + 6
    if target == "cpu":
        assert expanded.numbers["optimized_nodes"].get("Conv", 0) == plain.numbers["optimized_nodes"].get("Conv", 0)


def test_what_cannot_be_expanded_is_refused(network: Path) -> None:
    with pytest.raises(OnnxqError, match="per channel"):
        onnxq.quantize(network, recipe="rex", weights="int4:tensor")
    with pytest.raises(OnnxqError, match="density"):
        onnxq.quantize(network, recipe="rex", knobs={"density": 2.0})
    with pytest.raises(OnnxqError, match="form of channels, branches"):
        onnxq.quantize(network, recipe="rex", knobs={"form": "ensemble"})


def test_orders_bring_real_networks_back_without_data(shared_data: Path) -> None:
    """One order of int4 ruins a depthwise network, three are as good as float; a residual network needs two."""

    for name, ruined, orders in (("mobilenet_v1_025_224", 5, 3), ("resnet20_cifar10", 20, 2)):
        path = DATA / "models" / f"{name}.onnx"
        made = synthesise(models.load(path), count=16, budget="quick")
        data = [{made.name: made.inputs}]
        found = {}
        for order in (1, orders):
            knobs = {"orders": order, "depthwise_orders": 0}
            found[order] = onnxq.quantize(path, data, recipe="rex", knobs=knobs, activations="float").numbers["sqnr_db"]
        assert found[1] < ruined and found[orders] > 30, name


def test_a_budget_spent_on_the_outputs_beats_one_spent_on_weights(tmp_path: Path) -> None:
    """Half of the second order's weights, without data, judged on real images: 27.5 dB against 25.5."""
    codes, sqnr_db = {}, {}
    for allocation in ("network", "outputs"):
        path = tmp_path / f"{allocation}.onnx"
        knobs = {"density": 0.5, "allocation": allocation, "depthwise_orders": 0}
        result = onnxq.quantize(
            MODELS / "fashion_resnet.onnx",
            recipe="rex",
            activations="float",
            synthesis="noise",
            samples=16,
            knobs=knobs,
            output=path,
        )
        stored = [value.const_value for value in result.model.graph.initializers.values() if value.const_value]
        codes[allocation] = sum(
            tensor.size for tensor in stored if tensor.dtype in (ir.DataType.INT8, ir.DataType.INT4)
        )
        compared = onnxq.compare(MODELS / "fashion_resnet.onnx", path, MODELS / "fashion_test.npz", latency=False)
        sqnr_db[allocation] = compared.sqnr_db
    assert abs(codes["outputs"] / codes["network"] - 1) < 0.01
    assert sqnr_db["outputs"] > sqnr_db["network"] + 1
