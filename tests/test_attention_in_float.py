"""Attention that stays in float for TensorRT: that of a single query, and that whose result is divided by itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models
from onnxq.targets.tensorrt import DIVIDES, SINGLE_QUERY

HEADS = "<int64[4] heads = {0, 0, 2, 32}, int64[3] joined = {0, 0, 64}, float step = {0.177}"

# QUERY tokens ask all of them.
CLASS_ATTENTION = f"""
<ir_version: 10, opset_import: ["" : 21]>
pooling (float[2,64,64] x) => (float[2,QUERY,64] y)
{HEADS}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] end = {{QUERY}}>
{{
    first = Slice (x, zero, end, one)
    [query] q = MatMul (first, wq)
    [key] k = MatMul (x, wk)
    [value] v = MatMul (x, wv)
    qh = Reshape (q, heads)
    kh = Reshape (k, heads)
    vh = Reshape (v, heads)
    qt = Transpose <perm=[0,2,1,3]> (qh)
    kt = Transpose <perm=[0,2,3,1]> (kh)
    vt = Transpose <perm=[0,2,1,3]> (vh)
    qs = Mul (qt, step)
    [score] s = MatMul (qs, kt)
    p = Softmax <axis=-1> (s)
    [mix] m = MatMul (p, vt)
    mt = Transpose <perm=[0,2,1,3]> (m)
    j = Reshape (mt, joined)
    [project] y = MatMul (j, wo)
}}
"""
WEIGHTS = dict.fromkeys(("wq", "wk", "wv", "wo"), (64, 64))
ATTENTION = {"score", "mix", "query", "key", "value"}

LINEAR_ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
linear (float[2,64,64] x) => (float[2,64,64] y)
<int64[6] last = {0, 0, 0, 0, 0, 1}, float one = {1.0}, float little = {0.000001}, int64[2] parts = {64, 1}>
{
    [query] q = MatMul (x, wq)
    [key] k = MatMul (x, wk)
    [value] v = MatMul (x, wv)
    qr = Relu (q)
    kr = Relu (k)
    kt = Transpose <perm=[0,2,1]> (kr)
    padded = Pad (v, last, one)
    [gather] kv = MatMul (kt, padded)
    [ask] o = MatMul (qr, kv)
    numerator, divisor = Split <axis=-1> (o, parts)
    safe = Add (divisor, little)
    d = Div (numerator, safe)
    [project] y = MatMul (d, wo)
}
"""


def quantized(text: str, folder: Path, **settings: object) -> onnxq.Result:
    path = models.save(add_weights(text, WEIGHTS), folder / "model.onnx")
    x = np.random.default_rng(0).standard_normal((16, 64, 64)).astype(np.float32)
    return onnxq.quantize(path, [{"x": x}], output=folder / "quantized.onnx", **settings)


def test_a_single_query_stays_in_float_with_its_projections(tmp_path: Path) -> None:
    found = quantized(CLASS_ATTENTION.replace("QUERY", "1"), tmp_path).numbers
    assert found["left_float"] == dict.fromkeys(ATTENTION, SINGLE_QUERY)
    several = quantized(CLASS_ATTENTION.replace("QUERY", "8"), tmp_path).numbers
    assert not several["left_float"]
    weights = quantized(CLASS_ATTENTION.replace("QUERY", "1"), tmp_path, weights="int8", activations="float").numbers
    assert set(weights["left_float"]) == {"score", "mix"}  # codes of weights save memory all the same


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_what_has_codes_beside_a_single_query_compiles_to_int8(tmp_path: Path) -> None:
    quantized(CLASS_ATTENTION.replace("QUERY", "1"), tmp_path)
    assert not onnxq.build(tmp_path / "quantized.onnx", tmp_path / "engine", sm=["89"]).promised_but_float


def test_products_whose_result_divides_stay_in_float(tmp_path: Path) -> None:
    result = quantized(LINEAR_ATTENTION, tmp_path)
    assert result.numbers["left_float"] == {"gather": DIVIDES, "ask": DIVIDES}
    assert result.numbers["sqnr_db"] > 25
