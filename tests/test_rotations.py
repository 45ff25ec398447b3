"""Rotations of residual streams and heads: they keep the function, spread outliers, and refuse what is not closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models
from onnxq.errors import OnnxqError
from onnxq.passes.rotate_heads import RotateHeads
from onnxq.passes.rotate_streams import RotateStreams
from onnxq.rotation import rotation
from onnxq.runtime import Session

# One attention layer of two heads and one feed-forward layer, with norms that subtract the mean; `table` is read by
# the head too, transposed, as tied embeddings are. The comment marks where tests put something else.
TRANSFORMER = """
<ir_version: 10, opset_import: ["" : 21]>
network (int64[N,6] ids) => (float[N,6,20] logits)
<int64[4] heads = {0, 6, 2, 16}, int64[3] together = {0, 6, 32}>
{
    x = Gather (table, ids)
    n1 = LayerNormalization (x, scale1, shift1)
    q0 = MatMul (n1, wq)
    q1 = Reshape (q0, heads)
    q = Transpose <perm=[0,2,1,3]> (q1)
    k0 = MatMul (n1, wk)
    k1 = Reshape (k0, heads)
    k = Transpose <perm=[0,2,3,1]> (k1)
    v0 = MatMul (n1, wv)
    v1 = Add (v0, bv)
    v2 = Reshape (v1, heads)
    v = Transpose <perm=[0,2,1,3]> (v2)
    s = MatMul (q, k)
    p = Softmax (s)
    a0 = MatMul (p, v)
    a1 = Transpose <perm=[0,2,1,3]> (a0)
    a2 = Reshape (a1, together)
    a3 = MatMul (a2, wo)
    y = Add (x, a3)
    [between] y1 = Identity (y)
    n2 = LayerNormalization (y1, scale2, shift2)
    f0 = MatMul (n2, w1)
    f1 = Add (f0, b1)
    f2 = Relu (f1)
    f3 = MatMul (f2, w2)
    f4 = Add (b2, f3)
    z = Add (f4, y1)
    n3 = LayerNormalization (z, scale3, shift3)
    logits = MatMul (n3, tied)
}
"""
WEIGHTS = {
    "table": (20, 32), "tied": (32, 20), "wq": (32, 32), "wk": (32, 32), "wv": (32, 32), "wo": (32, 32), "bv": (32,),
    "w1": (32, 48), "b1": (48,), "w2": (48, 32), "b2": (32,), **{f"scale{i}": (32,) for i in (1, 2, 3)},
    **{f"shift{i}": (32,) for i in (1, 2, 3)},
}  # fmt: skip
IDS = np.random.default_rng(3).integers(0, 20, (4, 6))


def transformer(change: tuple[str, str] = ("", "")) -> ir.Model:
    model = add_weights(TRANSFORMER.replace(*change), WEIGHTS)
    models.normalise(model)
    return model


def answers(model: ir.Model) -> np.ndarray:
    return Session(model).run({"ids": IDS}, ["logits"])[0]


@pytest.mark.parametrize("size", [2, 6, 8, 64])
def test_rotations_are_orthogonal_and_may_keep_the_mean(size: int) -> None:
    for keeps_mean in (False, True):
        matrix = rotation(size, 0, keeps_mean=keeps_mean)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
        np.testing.assert_array_equal(matrix, rotation(size, 0, keeps_mean=keeps_mean))
    np.testing.assert_allclose(matrix @ np.ones(size), np.ones(size), atol=1e-12)
    if size in (8, 64):
        np.testing.assert_allclose(np.abs(rotation(size, 1)), size**-0.5)


def test_stream_and_heads_turn_and_the_function_stays() -> None:
    model = transformer()
    expected, nodes = answers(model), len(list(model.graph))
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    streams, heads = RotateStreams(), RotateHeads()
    assert streams(model).modified and heads(model).modified
    assert streams.rotated == [32] and not streams.refused and len(heads.rotated) == 1
    np.testing.assert_allclose(answers(model), expected, atol=2e-5 * np.abs(expected).max())
    after = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    assert all(not np.allclose(before[name], after[name]) for name in ("table", "wv", "wo", "w1", "w2", "tied"))
    np.testing.assert_array_equal(after["scale1"], 1)  # its factors are in the weights now
    # The shifts of norms became biases: bv and b1 were there, the other three layers got one.
    assert len(list(model.graph)) - nodes == 3


def test_an_outlier_spreads_over_all_channels() -> None:
    model = transformer()
    for name, axis in (("table", 1), ("wo", 1), ("w2", 1)):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[(slice(None),) * axis + (3,)] *= 40
        value.const_value = ir.tensor(array, name=name)
    peaks = []
    for turned in (False, True):
        if turned:
            RotateStreams()(model)
        name = "z_rotated" if turned else "z"
        z = Session(model, taps=[name]).run({"ids": IDS}, [name])[0]
        z = z - z.mean(axis=-1, keepdims=True)
        peaks.append(np.abs(z).max() / np.sqrt(np.mean(z**2)))
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.parametrize(
    ("change", "blamed"),
    [
        (("y1 = Identity (y)", "y1 = Relu (y)"), "Relu 'between'"),
        (
            ("y1 = Identity (y)", "y1 = Mul (y, scale1)"),
            "LayerNormalization",
        ),  # a factor whose product goes on in the stream
        (
            ("y1 = Identity (y)", "y1 = LayerNormalization (y, scale1, shift1)"),
            "LayerNormalization",
        ),  # norms behind sums, as in BERT
        (("z = Add (f4, y1)", "z0 = Add (f4, y1) z = Softmax (z0)"), "Softmax"),
        (("=> (float[N,6,20] logits)", "=> (float[N,6,20] logits, float[N,6,32] y)"), "an input or output"),
    ],
)
def test_a_stream_that_is_not_closed_is_refused_with_the_node(
    change: tuple[str, str], blamed: str, tmp_path: Path
) -> None:
    model = transformer(change)
    expected = answers(model)
    streams = RotateStreams()
    streams(model)
    assert not streams.rotated and blamed in streams.refused[0]
    np.testing.assert_array_equal(answers(model), expected)


def test_any_recipe_takes_the_knob(network: Path, calibration: Path, tmp_path: Path) -> None:
    """With an outlier channel, 8 bits for a whole tensor lose most of it, and a rotation gives it back."""
    model = transformer()
    for name in ("scale1", "scale2", "scale3"):  # a factor of 60, taken back by the weights behind
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[3] *= 60
        value.const_value = ir.tensor(array, name=name)
    for name in ("wq", "wk", "wv", "w1", "tied"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[3] /= 60
        value.const_value = ir.tensor(array, name=name)
    path = tmp_path / "transformer.onnx"
    ir.save(model, path)
    data = [{"ids": row[None]} for row in np.random.default_rng(0).integers(0, 20, (16, 6))]
    sqnr = {}
    for rotate in (False, True):
        numbers = onnxq.quantize(path, data, rotate=rotate, knobs={"smooth": 0}).numbers
        sqnr[rotate] = numbers["sqnr_db"]
    assert numbers["rotations"] == {"streams": [32], "heads": 1}
    assert sqnr[True] > sqnr[False] + 6
    assert onnxq.quantize(path, data, rotate=True, recipe="gptq", weights="int4:16").numbers["sqnr_db"] > 10
    with pytest.raises(OnnxqError, match="residual stream that can be turned") as caught:
        onnxq.quantize(network, calibration, rotate=True)
    assert "--rotate" in str(caught.value.hint)


def test_a_real_decoder_turns_its_stream_and_its_heads(shared_data: Path) -> None:
    """The real decoder: its stream, and the values of its five attention layers, which share keys among heads."""
    model = onnxq.load(shared_data / "language" / "stories260k.onnx")
    tokens = np.random.default_rng(0).integers(0, 512, (2, 24))
    expected = Session(model).run({"input_ids": tokens}, ["logits"])[0]
    streams, heads = RotateStreams(), RotateHeads()
    streams(model)
    heads(model)
    assert streams.rotated == [64] and len(heads.rotated) == 5
    found = Session(model).run({"input_ids": tokens}, ["logits"])[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
