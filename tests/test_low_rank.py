"""Low-rank correction: the best product of its rank, a rewrite that keeps the function, less error for any recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq.calibration.data import Preprocessing
from onnxq.comparison import compare
from onnxq.errors import OnnxqError
from onnxq.learning.channel_scales import round_matrix
from onnxq.passes.add_low_rank import AddLowRank
from onnxq.runtime import Session
from onnxq.scheme import parse_weights
from onnxq.weights.low_rank import Salience, factors_of, truncated_svd

LAYERS = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,4,48] x) => (float[N,4,40] y)
<int64[2] flat = {-1, 64}, int64[3] back = {-1, 4, 40}>
{
    [first] a = MatMul (x, w1)
    b = Relu (a)
    c = Reshape (b, flat)
    [second] d = Gemm <alpha=0.5, transB=1> (c, w2, bias)
    y = Reshape (d, back)
}
"""
SHAPES = {"w1": (48, 64), "w2": (40, 64), "bias": (40,)}
GENERATOR = np.random.default_rng(0)
MATRIX = GENERATOR.standard_normal((40, 64))
# Inputs that lie near a few directions, as those of real layers do.
ROWS = GENERATOR.standard_normal((500, 6)) @ GENERATOR.standard_normal((6, 64)) + 0.1 * GENERATOR.standard_normal(
    (500, 64)
)


def output_error(weight: np.ndarray) -> float:
    return float(np.square(ROWS @ (weight - MATRIX).T).sum())


def test_the_product_is_the_best_of_its_rank_for_the_outputs() -> None:
    """Counting errors as inputs meet them beats the plain SVD, and any small change of the product makes it worse."""
    spec = parse_weights("int4")
    rounded = round_matrix(MATRIX, spec)
    salience = Salience(ROWS)
    left, values, right = truncated_svd(salience.weigh(MATRIX - rounded), 4)
    best = (left * values) @ salience.unweigh(right)
    left, values, right = truncated_svd(MATRIX - rounded, 4)
    plain = (left * values) @ right
    assert output_error(rounded + best) < 0.7 * output_error(rounded + plain) < 0.7 * output_error(rounded)
    inward = salience.unweigh(truncated_svd(salience.weigh(MATRIX - rounded), 4)[2])
    outward = best @ np.linalg.pinv(inward)
    for _ in range(20):
        moved = (outward + 0.05 * GENERATOR.standard_normal(outward.shape)) @ inward
        assert output_error(rounded + moved) > output_error(rounded + best)


@pytest.mark.parametrize("bits", ["int3", "int4", "int4:16"])
def test_more_rank_leaves_less_error(bits: str) -> None:
    spec, salience = parse_weights(bits), Salience(ROWS)
    errors = [factors_of(MATRIX, spec, rank, salience).error for rank in (1, 4, 8)]
    assert 1 > errors[0] > errors[1] > errors[2]
    found = factors_of(MATRIX, spec, 8, salience)
    rest = round_matrix(MATRIX - found.product, spec)
    left = output_error(rest + found.product) / output_error(round_matrix(MATRIX, spec))
    assert left == pytest.approx(found.error, abs=0.05)  # the damping counts a little too
    grid = round_matrix(MATRIX, spec)
    assert np.abs(factors_of(grid, spec, 2, salience).product).max() < 1e-6  # nothing to take back


def test_large_matrices_are_decomposed_by_sampling() -> None:
    matrix = GENERATOR.standard_normal((300, 200)) * np.geomspace(1, 1e-6, 200)
    left, values, right = truncated_svd(matrix, 4)
    exact = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(values, exact[:4], rtol=1e-3)
    assert np.linalg.norm(matrix - (left * values) @ right) == pytest.approx(np.linalg.norm(exact[4:]), rel=1e-3)


def test_splitting_keeps_the_function() -> None:
    model = add_weights(LAYERS, SHAPES)
    x = np.random.default_rng(1).standard_normal((3, 4, 48)).astype(np.float32)
    expected = Session(model).run({"x": x}, ["y"])[0]
    spec = parse_weights("int4")
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    factors = {
        "first": factors_of(weights["w1"].T, spec, 4, None),
        "second": factors_of(weights["w2"], spec, 4, None),
    }
    split = AddLowRank(factors)
    assert split(model).modified
    assert not np.allclose(model.graph.initializers["w1"].const_value.numpy(), weights["w1"])
    np.testing.assert_allclose(Session(model).run({"x": x}, ["y"])[0], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize(("recipe", "formats"), [("int4-weights", ("int4:16", "float")), ("int8", ("int4", None))])
def test_any_recipe_takes_it(recipe: str, formats: tuple[str, str | None], target: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.onnx"
    ir.save(add_weights(LAYERS, SHAPES), path)
    basis = np.random.default_rng(2).standard_normal((5, 48))
    data = [{"x": row[None]} for row in (np.random.default_rng(3).standard_normal((24, 4, 5)) @ basis).astype("f4")]
    sqnr = {}
    for rank in (0, 8):
        result = onnxq.quantize(
            path, data, recipe=recipe, weights=formats[0], activations=formats[1], target=target, low_rank=rank
        )
        sqnr[rank] = result.numbers["sqnr_db"]
    assert sqnr[8] > sqnr[0] + 3
    assert result.numbers["low_rank"]["layers"] == 2 and result.numbers["low_rank"]["error_left"] < 0.5
    with pytest.raises(OnnxqError, match="at least 80 inputs and outputs"):
        onnxq.quantize(path, data, recipe=recipe, low_rank=40)


def test_a_real_decoder_gets_back_most_of_what_nearest_rounding_costs(shared_data: Path, tmp_path: Path) -> None:
    language = shared_data / "language"
    text, unseen = tmp_path / "text.txt", tmp_path / "unseen.txt"
    content = (language / "tinystories_train_head.txt").read_text()
    text.write_text(content[:12000])
    unseen.write_text(content[40000:50000])
    options = {"tokenizer": str(language / "tok512.bin"), "sequence_length": 64}
    cost = {}
    for rank in (0, 8):
        output = tmp_path / f"{rank}.onnx"
        onnxq.quantize(
            language / "stories260k.onnx", text, output=output, recipe="int4-weights", weights="int4:32", samples=12,
            low_rank=rank, preprocess=options,
        )  # fmt: skip
        found = compare(
            language / "stories260k.onnx", output, unseen, preprocessing=Preprocessing(**options), layers=False,
            latency=False,
        )  # fmt: skip
        cost[rank] = found.perplexity_quantized / found.perplexity_float - 1
    assert cost[8] < 0.5 * cost[0]
