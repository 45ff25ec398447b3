"""Products with several constant matrices, as of experts that all run: one product for each on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import model as models
from onnxq.passes.split_matrices import SplitMatrices
from onnxq.runtime import Session

SHAPES = {"w": (3, 32, 64), "v": (3, 64, 32)}
OWN_ROWS = ("float[3,M,32] x", "[up] u = MatMul (x, w)", (3, 5, 32))
SHARED_ROWS = ("float[1,M,32] x", "[up] u = MatMul (x, w)", (1, 5, 32))
PLAIN_ROWS = ("float[M,32] x", "[up] u = MatMul (x, w)", (5, 32))
BATCHES = ("float[B,3,M,32] x", "[up] u = MatMul (x, w)", (2, 3, 5, 32))
COPIES = (
    "float[5,32] x",
    """first = Constant <value_ints = [0]> ()
    alone = Unsqueeze (x, first)
    sizes = Constant <value_ints = [3, 5, 32]> ()
    copies = Expand (alone, sizes)
    [up] u = MatMul (copies, w)""",
    (5, 32),
)


def network(form: tuple[str, str, tuple[int, ...]], folder: Path) -> Path:
    """Two products with three matrices each, the second with rows of its own, and their sum."""
    given, product, _ = form
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    experts ({given}) => (float[A,C,D] y)
    {{
        {product}
        r = Relu (u)
        [down] y = MatMul (r, v)
    }}
    """
    if form is BATCHES:
        text = text.replace("float[A,C,D] y", "float[A,C,D,E] y")
    model = add_weights(text, SHAPES)
    scales = np.array([0.1, 1.0, 5.0], np.float32)  # experts differ
    weight = model.graph.initializers["w"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * scales[:, None, None], name="w")
    return models.save(model, folder / "experts.onnx")


def products(model: ir.Model) -> list[str]:
    return [node.name or "" for node in model.graph if node.op_type == "MatMul"]


def rows(form: tuple[str, str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal(form[2]).astype(np.float32)}


@pytest.mark.parametrize("form", [OWN_ROWS, SHARED_ROWS, PLAIN_ROWS, BATCHES, COPIES])
def test_the_function_stays(form: Any, tmp_path: Path) -> None:
    model = models.load(network(form, tmp_path))
    expected = Session(model).run(rows(form))[0]
    assert SplitMatrices()(model).modified
    found = Session(model).run(rows(form))[0]
    assert len(products(model)) == 6 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert all(len(value.shape or ()) == 2 for value in model.graph.initializers.values() if "matrix" in value.name)
    assert "Expand" not in {node.op_type for node in model.graph}  # rows that all share are not copied


def test_what_cannot_be_split_stays(tmp_path: Path) -> None:
    unknown = ("float[A,M,32] x", "[up] u = MatMul (x, w)", (3, 5, 32))
    model = models.load(network(unknown, tmp_path))
    SplitMatrices()(model)
    assert products(model)[0] == "up"  # how many matrices of rows there are is not known before it runs
    model = models.load(network(OWN_ROWS, tmp_path))
    assert not SplitMatrices({"up", "down"})(model).modified
    vector = (
        "float[32] x",
        "[up] v1 = MatMul (x, w) axis = Constant <value_ints = [1]> () u = Unsqueeze (v1, axis)",
        (),
    )
    model = models.load(network(vector, tmp_path))
    SplitMatrices()(model)
    assert products(model)[0] == "up"
    twice = ("float[3,M,32] x", "[up] t = MatMul (x, w) [again] a = MatMul (x, w) u = Add (t, a)", (3, 5, 32))
    model = models.load(network(twice, tmp_path))
    SplitMatrices()(model)
    assert products(model)[:2] == ["up", "again"]  # their weights would be stored twice


@pytest.mark.parametrize(
    ("options", "least_db"),
    [
        ({}, 30),
        ({"recipe": "int8-dynamic"}, 30),
        ({"weights": "int8", "activations": "float"}, 36),
        ({"recipe": "int4-weights", "weights": "int4:32"}, 15),
    ],
)
def test_each_has_scales_of_its_own_on_a_cpu(options: dict[str, Any], least_db: float, tmp_path: Path) -> None:
    path = network(OWN_ROWS, tmp_path)
    data = rows(("", "", (3, 64, 32)))
    result = onnxq.quantize(path, [data], target="cpu", output=tmp_path / "codes.onnx", **options)
    assert (result.numbers["quantized_nodes"], result.numbers["weighted_nodes"]) == (6, 6)
    expected, found = (Session(file).run(data)[0] for file in (path, tmp_path / "codes.onnx"))
    worst = min(sqnr_db(*pair) for pair in zip(expected, found, strict=True))  # the smallest expert too
    assert worst > least_db


def test_a_product_that_is_excluded_by_its_name_is_not_split(tmp_path: Path) -> None:
    data = [rows(OWN_ROWS)]
    result = onnxq.quantize(network(OWN_ROWS, tmp_path), data, target="cpu", exclude=("up",))
    assert "up" in products(result.model) and "down" not in products(result.model)
    alone = onnxq.quantize(network(OWN_ROWS, tmp_path), data, target="cpu", only=("up",))
    assert "down" in products(alone.model) and "up" not in products(alone.model)
    assert alone.numbers["quantized_nodes"] == 3 and alone.numbers["left_float"] == {"down": "excluded"}
    whole = onnxq.quantize(network(OWN_ROWS, tmp_path), data, target="tensorrt")
    assert products(whole.model) == ["up", "down"]  # TensorRT multiplies all at once
