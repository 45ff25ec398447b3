"""A quantized model against its float original, both run in onnxruntime."""

import json
import math

import numpy as np
import onnx_ir as ir
import pytest

from onnxq import model as models
from onnxq.comparison import _warn_about_optimiser, compare
from onnxq.errors import OnnxqError
from onnxq.report.quality import Quality
from onnxq.report.table import plain_lines

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
WEIGHTS = """
  float[4, 3] w = {1.0, 0.5, -0.25, 0.1, -1.0, 0.7, 0.33, 0.2, 0.9, -0.6, 0.4, -0.8},
  float[3, 3] v = {1.0, 0.0, 0.5, 0.2, 1.0, 0.0, -0.3, 0.1, 1.0}, float s = {0.03}, int8 z = {0}, float n = {-1.0}
"""
FLOAT = f"""{HEAD} g (float[N, 4] x) => (float[N, 3] y) <{WEIGHTS}> {{
  [first] h = MatMul(x, w)
  [act] a = Relu(h)
  [last] y = MatMul(a, v)
}}"""
QUANTIZED = FLOAT.replace(
    "[first] h = MatMul(x, w)",
    "[quantize] xq = QuantizeLinear(x, s, z) [back] xd = DequantizeLinear(xq, s, z) [first] h = MatMul(xd, w)",
)


def model(text):
    return ir.from_onnx_text(text)


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    return [{"x": generator.normal(size=(5, 4)).astype(np.float32)} for _ in range(8)]


def test_identical_models_have_no_error(data):
    result = compare(model(FLOAT), model(FLOAT), data, latency=False)
    assert result.samples == 40
    assert result.sqnr_db == math.inf
    assert result.sqnr_db_literal == math.inf
    assert result.agreement == 1.0
    assert result.mean_error == 0.0
    assert [layer["name"] for layer in result.layers] == ["first", "last"]
    assert result.warnings == []
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["sqnr_db"] == "inf"


def test_sqnr_is_what_numpy_finds(data):
    result = compare(model(FLOAT), model(QUANTIZED), data, latency=False)
    x = np.concatenate([batch["x"] for batch in data]).astype(np.float64)
    w = model(FLOAT).graph.initializers["w"].const_value.numpy()
    v = model(FLOAT).graph.initializers["v"].const_value.numpy()
    rounded = np.clip(np.rint(x / np.float32(0.03)), -128, 127) * np.float32(0.03)
    hidden, hidden_rounded = x @ w, rounded @ w
    y, q = np.maximum(hidden, 0) @ v, np.maximum(hidden_rounded, 0) @ v
    assert result.sqnr_db == pytest.approx(10 * np.log10((y**2).sum() / ((y - q) ** 2).sum()), abs=1e-3)
    assert result.mean_error == pytest.approx((q - y).mean(), abs=1e-6)
    first = next(layer for layer in result.layers if layer["name"] == "first")
    signal, noise = (hidden[:16] ** 2).sum(), ((hidden - hidden_rounded)[:16] ** 2).sum()
    assert (first["op"], first["value"]) == ("MatMul", "h")
    assert first["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)


def test_layers_come_worst_first(data):
    layers = compare(model(FLOAT), model(QUANTIZED), data, latency=False).layers
    assert [layer["sqnr_db"] for layer in layers] == sorted(layer["sqnr_db"] for layer in layers)
    assert len(layers) == 2


def test_layers_can_be_left_out(data):
    result = compare(model(FLOAT), model(QUANTIZED), data, latency=False, layers=False)
    assert result.layers == []
    assert result.sqnr_db_literal is not None


def test_paths_give_sizes_latency_and_accuracy(tmp_path):
    generator = np.random.default_rng(1)
    x = generator.normal(size=(20, 4)).astype(np.float32)
    float_path = models.save(model(FLOAT), tmp_path / "float.onnx")
    quantized_path = models.save(model(QUANTIZED), tmp_path / "quantized.onnx")
    scores = compare(float_path, float_path, [{"x": x}], latency=False)
    assert scores.top1_float is None
    np.savez(tmp_path / "data.npz", x=x, labels=np.zeros(20, np.int64))
    seen = []
    result = compare(
        float_path, quantized_path, tmp_path / "data.npz", samples=10, progress=lambda *at: seen.append(at)
    )
    assert result.samples == 10
    assert result.float_bytes == float_path.stat().st_size
    assert result.quantized_bytes == quantized_path.stat().st_size
    assert result.latency_ms_float > 0
    assert result.latency_ms_quantized > 0
    assert 0 <= result.top1_quantized <= 1
    assert result.top5_float is None  # three classes only
    assert "top5_float" not in result.to_json()
    assert seen[-1] == ("layers", 10, 10)


def test_a_layer_is_matched_across_a_folded_batchnorm():
    float_text = f"""{HEAD} g (float[N, 1, 2, 2] x) => (float[N, 1, 2, 2] y)
      <float[1, 1, 1, 1] w = {{1}}, float[1] two = {{2}}, float[1] none = {{0}}, float[1] one = {{1}}> {{
      [conv] c = Conv(x, w)
      [norm] y = BatchNormalization <epsilon: float = 0.0> (c, two, none, none, one)
    }}"""
    folded = f"""{HEAD} g (float[N, 1, 2, 2] x) => (float[N, 1, 2, 2] y) <float[1, 1, 1, 1] w = {{2}}> {{
      [conv] y = Conv(x, w)
    }}"""
    x = np.random.default_rng(0).normal(size=(4, 1, 2, 2)).astype(np.float32)
    layers = compare(model(float_text), model(folded), [{"x": x}], latency=False).layers
    assert [(layer["name"], layer["value"]) for layer in layers] == [("conv", "y")]
    assert layers[0]["sqnr_db"] > 100


def test_a_relu_that_rounding_absorbed_counts_as_one():
    quantized = f"""{HEAD} g (float[N, 4] x) => (float[N, 3] y) <{WEIGHTS}, uint8 low = {{0}}> {{
      h = MatMul(x, w)  q = QuantizeLinear(h, s, low)  d = DequantizeLinear(q, s, low)  y = MatMul(d, v)
    }}"""
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    layers = compare(model(FLOAT), model(quantized), [{"x": x}], latency=False).layers
    first = next(layer for layer in layers if layer["name"] == "first")
    assert first["value"] == "a"
    assert first["sqnr_db"] > 30


def test_several_outputs_are_reported_one_by_one(data):
    both = FLOAT.replace("=> (float[N, 3] y)", "=> (float[N, 3] y, float[N, 3] a)")
    both_quantized = QUANTIZED.replace("=> (float[N, 3] y)", "=> (float[N, 3] a, float[N, 3] y)")
    result = compare(model(both), model(both_quantized), data, latency=False)
    assert set(result.outputs) == {"y", "a"}
    assert all(20 < ratio < 60 for ratio in result.outputs.values())
    assert min(result.outputs.values()) <= result.sqnr_db <= max(result.outputs.values())


def test_an_output_counts_in_its_own_size():
    """Boxes in pixels do not hide what scores below 1 have lost."""
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    quality = Quality(["big", "y"])
    quality.update({"x": x}, [1000 * x, x], [1000 * x, x + 0.1 * np.abs(x)])
    found = quality.summary()
    assert found["outputs"] == {"big": np.inf, "y": pytest.approx(20)}
    assert found["sqnr_db"] == pytest.approx(20 + 10 * np.log10(2))
    assert "worst output: 20.0 dB (y, of 2)" in plain_lines(found)


def test_an_output_that_is_zero_counts_where_all_are():
    x, zero = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    quality = Quality(["y", "idle"])
    quality.update({"x": x}, [x, zero], [0.9 * x, zero + 1e-9])
    assert quality.summary()["sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert quality.summary()["outputs"]["idle"] == -np.inf
    alone = Quality(["idle"])
    alone.update({"x": x}, [zero], [zero])
    assert alone.summary()["sqnr_db"] == np.inf and alone.summary()["outputs"] == {}


def test_whole_number_outputs_agree_or_not(data):
    text = f"{HEAD} g (float[N, 4] x) => (int64[N] y) {{ y = ArgMax <axis: int = 1, keepdims: int = 0> (x) }}"
    other = text.replace("ArgMax", "ArgMin")
    assert compare(model(text), model(text), data, latency=False).agreement == 1.0
    result = compare(model(text), model(other), data, latency=False)
    assert result.agreement == 0.0
    assert result.sqnr_db is None


def test_tokens_give_perplexity():
    text = f"""{HEAD} g (int64[N, T] tokens) => (float[N, T, 3] y)
      <float[3, 3] e = {{0, 9, 0, 0, 0, 9, 9, 0, 0}}> {{ y = Gather(e, tokens) }}"""
    poor = text.replace("9", "0")
    tokens = np.array([[0, 1, 2, 0], [1, 2, 0, 1]])
    result = compare(model(text), model(poor), [{"tokens": tokens}], latency=False)
    assert result.perplexity_float == pytest.approx(1.0, abs=1e-3)
    assert result.perplexity_quantized == pytest.approx(3.0)


def test_the_next_token_has_no_perplexity_where_it_was_seen():
    text = f"""{HEAD} g (int64[N, T] tokens) => (float[N, T, 3] y)
      <float[3, 3] e = {{0, 9, 0, 0, 0, 9, 9, 0, 0}}, int64[1] along = {{1}}> {{
      r = Gather(e, tokens)  m = ReduceMean(r, along)  y = Add(r, m)
    }}"""
    result = compare(model(text), model(text), [{"tokens": np.array([[0, 1, 2, 0]])}], latency=False)
    assert result.perplexity_float is None and result.agreement == 1.0


def test_nan_is_reported_and_not_averaged_away(data):
    broken = FLOAT.replace("y = MatMul(a, v)", "u = MatMul(a, v)  r = Sqrt(n)  y = Mul(u, r)")
    result = compare(model(FLOAT), model(broken), data, latency=False)
    assert result.sqnr_db == -math.inf
    assert result.agreement == 0.0
    assert any("NaN" in warning for warning in result.warnings)
    assert result.to_json()["sqnr_db"] == "-inf"


def test_labels_outside_the_classes_are_said_not_counted(data):
    labelled = [{**batch, "labels": np.full(5, 7)} for batch in data]
    result = compare(model(FLOAT), model(QUANTIZED), labelled, latency=False)
    assert result.top1_float is None
    assert any("3 classes" in warning for warning in result.warnings)


def test_a_fixed_batch_is_respected():
    fixed = FLOAT.replace("float[N, 4] x", "float[2, 4] x").replace("float[N, 3] y", "float[2, 3] y")
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    assert compare(model(FLOAT), model(fixed), [{"x": x}], latency=False).samples == 6


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (" x)", " image)", "image"),
        ("x, w", "x, w", ""),
        ("float[N, 4] x", "float[N, 4, 1] x", "'any', 4, 1"),
        ("float[N, 4] x", "double[N, 4] x", "float64"),
        ("float[N, 3] y", "float[N, 5] y", "'any', 5"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(data, old, new, found):
    if not found:
        other = f"{HEAD} g (float[N, 4] x) => (float[N, 4] z) {{ z = Relu(x) }}"
        found = "found y in the float one and z"
    else:
        other = QUANTIZED.replace(old, new)
        if new == " image)":
            other = other.replace("QuantizeLinear(x,", "QuantizeLinear(image,")
    with pytest.raises(OnnxqError, match="expected") as raised:
        compare(model(FLOAT), model(other), data)
    assert found in raised.value.message
    assert raised.value.hint


def test_the_model_that_does_not_run_is_named(data):
    wrong = FLOAT.replace("y = MatMul(a, v)", "y = MatMul(a, x)")
    with pytest.raises(OnnxqError, match="quantized model"):
        compare(model(FLOAT), model(wrong.replace("MatMul(a, x)", "NoSuchOp(a, x)")), data)


def test_data_is_checked_against_the_model():
    with pytest.raises(OnnxqError, match="float32 for input 'x'"):
        compare(model(FLOAT), model(QUANTIZED), [{"x": np.array([["a"] * 4])}])


@pytest.mark.parametrize(
    ("optimised_db", "literal_db", "count"),
    [(24.7, 38.2, 1), (28.0, 30.0, 0), (math.inf, math.inf, 0), (-math.inf, 30.0, 1), (None, None, 0)],
)
def test_an_optimiser_that_changes_the_result_is_reported(optimised_db, literal_db, count):
    warnings = []
    _warn_about_optimiser(optimised_db, literal_db, warnings)
    assert len(warnings) == count
