"""Token-wise activations as a division and a constant scale, groups of rows, and layers that learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DATA, add_weights

import onnxq
from onnxq import graph as graphs
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration.weight_ranges import extremes
from onnxq.errors import OnnxqError
from onnxq.formats import parse_format
from onnxq.passes.normalise_tokens import NormaliseTokens
from onnxq.recipes.zeroquant import ZeroQuant
from onnxq.runtime import Session

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
PRODUCTS = f"""{HEAD}
products (float[N,6,32] x) => (float[N,6,24] y, float[N,6,48] z)
{{
    [first] h = MatMul (x, w1)
    a = Add (h, b1)
    r = Relu (a)
    [second] y = MatMul (r, w2)
    [third] z = MatMul (r, w3)
}}
"""
SHAPES = {"w1": (32, 40), "b1": (40,), "w2": (40, 24), "w3": (40, 48)}


@pytest.fixture
def tokens() -> np.ndarray:
    """Tokens whose ranges differ a hundred times, and one of zeros."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((24, 6, 32)).astype(np.float32)
    x *= np.exp(generator.uniform(-2.3, 2.3, (24, 6, 1))).astype(np.float32)
    x[3, 2] = 0
    return x


def test_the_rewrite_keeps_the_function_and_shares_divisions(tokens: np.ndarray) -> None:
    model = add_weights(PRODUCTS, SHAPES)
    expected = Session(model, optimize=False).run({"x": tokens})
    assert NormaliseTokens(["first", "second", "third"])(model).modified
    for wanted, found in zip(expected, Session(model, optimize=False).run({"x": tokens}), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert sum(graphs.is_op(node, "Div") for node in model.graph) == 2  # y and z read one value


def test_codes_are_those_of_a_range_for_each_token(tokens: np.ndarray) -> None:
    """x / t on a constant scale of 1/127 is symmetric token-wise int8, to the code."""
    int8, _ = parse_format("int8")
    rows = tokens.reshape(-1, 32)
    largest = np.maximum(np.abs(rows).max(axis=1), 1e-12)
    constant = fake_quantize(rows / largest[:, None], np.float32(1 / 127), None, int8) * largest[:, None]
    scale, zero_point = scale_and_zero_point(-largest, largest, int8, symmetric=True)
    tokenwise = fake_quantize(rows, scale, zero_point, int8, axis=0)
    np.testing.assert_allclose(constant, tokenwise, atol=np.abs(rows).max() * 1e-5)


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_tokens_of_different_ranges_come_out_better(tokens: np.ndarray, tmp_path: Path, target: str) -> None:
    path = tmp_path / "products.onnx"
    ir.save(add_weights(PRODUCTS, SHAPES), path)
    data = [{"x": tokens}]
    results = {
        tokenwise: onnxq.quantize(path, data, recipe="zeroquant", target=target, knobs={"tokenwise": tokenwise})
        for tokenwise in (True, False)
    }
    with_tokens, without = results[True].numbers, results[False].numbers
    assert with_tokens["quantized_nodes"] == without["quantized_nodes"] == 3
    x = Session(results[True].model, optimize=False).run({"x": tokens / 100})[0]
    wanted = Session(path, optimize=False).run({"x": tokens / 100})[0]
    small = Session(results[False].model, optimize=False).run({"x": tokens / 100})[0]
    assert np.square(x - wanted).sum() < 0.1 * np.square(small - wanted).sum()  # far below the calibrated range
    if target == "cpu":
        assert with_tokens["integer_kernels"] == 3


def test_groups_of_rows_are_coarser_than_channels_and_the_full_range_is_a_free_clip() -> None:
    generator = np.random.default_rng(0)
    spread = np.exp(generator.standard_normal((64, 1)) * 0.5)
    rows = (generator.standard_t(5, (64, 512)) * spread).astype(np.float32)

    def error(number_format: str, **knobs: object) -> float:
        chosen, _ = parse_format(number_format)
        search = extremes if not knobs else ZeroQuant(**knobs)._search()  # type: ignore[arg-type]
        scale, zero_point = scale_and_zero_point(*search(rows, chosen, True), chosen, symmetric=True)
        rounded = fake_quantize(rows, scale, zero_point, chosen, axis=0)
        return float(np.square(rounded - rows).sum())

    per_channel = error("int4", weight_range="symmetric")
    assert per_channel == pytest.approx(error("int4"))
    assert error("int4", weight_range="full") < 0.9 * per_channel
    groups = [error("int4", row_groups=count, weight_range="full") for count in (1, 8, 64)]
    assert groups[0] > 1.2 * groups[1] > 1.2 * 1.2 * groups[2]
    assert error("int8", weight_range="auto") == error("int8", weight_range="symmetric")


def test_distilled_layers_come_closer(tokens: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "products.onnx"
    ir.save(add_weights(PRODUCTS, SHAPES), path)
    data = [{"x": tokens}]
    knobs = {"distil": True, "steps": 60, "rate": 1e-3}
    plain = onnxq.quantize(path, data, recipe="zeroquant", weights="int4")
    learned = onnxq.quantize(path, data, recipe="zeroquant", weights="int4", knobs=knobs)
    assert learned.numbers["sqnr_db"] > plain.numbers["sqnr_db"] + 1
    with pytest.raises(OnnxqError, match="weight_range"):
        onnxq.quantize(path, data, recipe="zeroquant", knobs={"weight_range": "half"})


def test_a_language_model_at_eight_bits(shared_data: Path) -> None:
    """Token-wise activations are closer to float on a real decoder than static ones, from the same data."""
    tokens = np.random.default_rng(0).integers(3, 512, (8, 48))
    data = [{"input_ids": tokens}]
    model = DATA / "language" / "stories260k.onnx"
    sqnr = [
        onnxq.quantize(model, data, recipe="zeroquant", knobs={"tokenwise": tokenwise}).numbers["sqnr_db"]
        for tokenwise in (True, False)
    ]
    assert sqnr[0] > sqnr[1] + 1


def test_weights_outside_the_file_reach_the_runtime(network: Path, calibration: Path, tmp_path: Path) -> None:
    """External data of any size: onnxruntime gets the model as bytes, beside which a path means nothing."""
    path = tmp_path / "outside" / "network.onnx"
    path.parent.mkdir()
    ir.save(ir.load(network), path, external_data="network.data", size_threshold_bytes=0)
    inside = onnxq.quantize(network, calibration).numbers["sqnr_db"]
    assert onnxq.quantize(path, calibration).numbers["sqnr_db"] == pytest.approx(inside)
