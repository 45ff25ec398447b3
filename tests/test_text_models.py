"""What models that read text get by default: smoothed outliers, scales for tokens, attention in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models
from onnxq.calibration.causality import is_causal, writes_text
from onnxq.calibration.data import input_specs
from onnxq.calibration.text import without_padding
from onnxq.decoders import attention_in_float
from onnxq.errors import OnnxqError

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
MASKED = """
    size = Shape <start=1, end=2> (ids)
    square = Concat <axis=0> (size, size)
    full = ConstantOfShape <value=float[1] {-10000.0}> (square)
    mask = Trilu <upper=1> (full, one)
    weights = Add (scores, mask)
"""
OPEN = "weights = Identity (scores)"
SEPARATE = """
    [query] q = MatMul (a, wq)
    [key] k = MatMul (a, wk)
    [value] v = MatMul (a, wv)
"""
JOINT = """
    [joint] qkv = MatMul (a, wqkv)
    q, k, v = Split <axis=-1, num_outputs=3> (qkv)
"""
SHAPES = {
    "table": (40, 32), "g1": (32,), "g2": (32,), "wo": (32, 32), "w1": (32, 64), "w2": (64, 32), "head": (32, 40)
}  # fmt: skip
OWN = {SEPARATE: {"wq": (32, 32), "wk": (32, 32), "wv": (32, 32)}, JOINT: {"wqkv": (32, 96)}}


def transformer(mask: str = MASKED, projections: str = SEPARATE, outputs: str = "logits") -> ir.Model:
    """One layer with norms before attention and the gated product behind it; logits, or what it says of the tokens."""
    text = f"""{HEAD}
    transformer (int64[batch,sequence] ids) => (float[batch,sequence,width] {outputs})
    <int64 one = {{1}}>
    {{
        x = Gather (table, ids)
        a = LayerNormalization <axis=-1> (x, g1)
        {projections}
        t = Transpose <perm=[0,2,1]> (k)
        [scores] scores = MatMul (q, t)
        {mask}
        shares = Softmax <axis=-1> (weights)
        [mix] mixed = MatMul (shares, v)
        [out] o = MatMul (mixed, wo)
        y = Add (x, o)
        b = LayerNormalization <axis=-1> (y, g2)
        [up] u = MatMul (b, w1)
        r = Relu (u)
        product = Mul (r, u)
        [down] d = MatMul (product, w2)
        states = Add (y, d)
        [last] logits = MatMul (states, head)
    }}
    """
    return add_weights(text, SHAPES | OWN[projections])


def planted(model: ir.Model, scales: dict[str, tuple[int, float]]) -> None:
    """Multiply one channel (along the last axis) of some initializers."""
    for name, (channel, factor) in scales.items():
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[..., channel] *= factor
        value.const_value = ir.tensor(array, name=name)


def saved(model: ir.Model, folder: Path) -> Path:
    path = folder / "transformer.onnx"
    ir.save(model, path)
    return path


def sentences(count: int = 16) -> list[dict[str, np.ndarray]]:
    """Of half of the vocabulary."""
    return [{"ids": row[None]} for row in np.random.default_rng(0).integers(0, 20, (count, 12))]


@pytest.mark.parametrize(("mask", "causal"), [(MASKED, True), (OPEN, False)])
def test_a_decoder_is_told_from_an_encoder_by_trying(mask: str, causal: bool, tmp_path: Path) -> None:
    model = models.load(saved(transformer(mask), tmp_path))
    assert is_causal(model, input_specs(model)) is causal


def test_a_model_writes_text_if_it_scores_its_vocabulary_and_looks_back(tmp_path: Path) -> None:
    found = {}
    for name, mask, outputs in (
        ("decoder", MASKED, "logits"),
        ("masked", OPEN, "logits"),
        ("states", MASKED, "states"),
    ):
        model = models.load(saved(transformer(mask, outputs=outputs), tmp_path))
        found[name] = writes_text(model, input_specs(model))
    assert found == {"decoder": True, "masked": False, "states": False}


def test_attention_of_a_decoder_stays_float_unless_one_layer_makes_all_of_it(tmp_path: Path) -> None:
    left = {}
    for name, mask, projections in (
        ("decoder", MASKED, SEPARATE),
        ("encoder", OPEN, SEPARATE),
        ("joint", MASKED, JOINT),
    ):
        path = saved(transformer(mask, projections), tmp_path)
        left[name] = onnxq.quantize(path, sentences()).numbers["left_float"]
        model = models.load(path)
        assert attention_in_float(model, input_specs(model)) == list(left[name])
    assert left == {
        "decoder": {"scores": "attention of a decoder", "mix": "attention of a decoder"},
        "encoder": {},
        "joint": {},
    }


def test_outliers_of_channels_go_into_weights_without_a_node(tmp_path: Path) -> None:
    model = transformer()
    planted(model, {"g1": (3, 60.0), "g2": (5, 60.0)})
    path = saved(model, tmp_path)
    plain = onnxq.quantize(path, sentences(), knobs={"smooth": 0})
    smooth = onnxq.quantize(path, sentences())
    assert smooth.numbers["sqnr_db"] > plain.numbers["sqnr_db"] + 6
    assert {node.op_type for node in smooth.model.graph} - {node.op_type for node in plain.model.graph} <= {
        "Abs", "ReduceMax", "Max", "Div",
    }  # fmt: skip


def test_a_value_that_a_shortcut_reads_gets_nodes_of_its_own_where_they_pay(tmp_path: Path) -> None:
    given = {}
    for factor in (1.0, 60.0):
        model = transformer(OPEN)
        planted(model, {"g2": (5, factor)})
        node = next(node for node in model.graph if node.name == "down")
        shortcut = next(value for value in node.successors()[0].inputs if value is not node.outputs[0])
        normed = next(node for node in model.graph if node.name == "up").inputs[0]
        node.successors()[0].replace_input_with(list(node.successors()[0].inputs).index(shortcut), normed)
        result = onnxq.quantize(saved(model, tmp_path), sentences())
        names = [node.name or "" for node in result.model.graph]
        given[factor] = any(name.startswith(("b_smooth", "b_token")) for name in names)
    assert given == {1.0: False, 60.0: True}


def test_a_token_of_its_own_size_gets_a_scale_of_its_own(tmp_path: Path) -> None:
    model = transformer()
    table = model.graph.initializers["w1"]
    array = table.const_value.numpy().copy()
    first = model.graph.initializers["table"].const_value.numpy()[0]
    array += np.outer(first - first.mean(), np.full(64, 40.0)).astype(np.float32) / 32  # what token 0 alone makes
    table.const_value = ir.tensor(array, name="w1")
    result = onnxq.quantize(saved(model, tmp_path), sentences())
    assert any((node.name or "").startswith("product_token") for node in result.model.graph)
    plain = onnxq.quantize(tmp_path / "transformer.onnx", sentences(), knobs={"smooth": 0})
    assert result.numbers["sqnr_db"] > plain.numbers["sqnr_db"] + 3


def test_a_token_that_is_not_a_number_counts_where_texts_have_it(tmp_path: Path) -> None:
    """As of a token for padding, whose row is zeros, in a norm that was exported without its epsilon."""
    model = transformer()
    array = model.graph.initializers["table"].const_value.numpy().copy()
    array[30] = np.nan
    model.graph.initializers["table"].const_value = ir.tensor(array, name="table")
    path = saved(model, tmp_path)
    assert onnxq.quantize(path, sentences()).numbers["sqnr_db"] > 25
    with pytest.raises(OnnxqError, match="NaN"):
        onnxq.quantize(path, [*sentences(), {"ids": np.full((1, 12), 30)}])


def test_tokens_that_a_model_does_not_run_on_are_not_asked_of_it(tmp_path: Path) -> None:
    """Half of the vocabulary has no row in a second table, as where only some tokens may be written."""
    model = transformer()
    ids, lookup = model.graph.inputs[0], next(iter(model.graph))
    small = ir.Value(name="small", const_value=ir.tensor(np.ones((20, 32), np.float32), name="small"))
    model.graph.register_initializer(small)
    further = ir.node("Gather", [small, ids], outputs=[ir.Value(name="further")])
    product = ir.node("Mul", [lookup.outputs[0], further.outputs[0]], outputs=[ir.Value(name="product_of_both")])
    lookup.outputs[0].replace_all_uses_with(product.outputs[0])
    product.replace_input_with(0, lookup.outputs[0])
    model.graph.insert_after(lookup, [further, product])
    assert onnxq.quantize(saved(model, tmp_path), sentences()).numbers["sqnr_db"] > 25


def test_networks_that_read_no_text_stay_as_they_were(network: Path, calibration: Path) -> None:
    results = [onnxq.quantize(network, calibration, knobs={"smooth": smooth}).model for smooth in (0.0, 0.75)]
    first, second = ({name: v.const_value.tobytes() for name, v in m.graph.initializers.items()} for m in results)
    assert first == second


def test_positions_that_fill_up_a_short_text_do_not_count() -> None:
    output = np.arange(12.0).reshape(2, 2, 3)
    feed = {"input_ids": np.ones((2, 2), np.int64), "attention_mask": np.asarray([[1, 1], [1, 0]])}
    np.testing.assert_array_equal(without_padding(feed, output), output.reshape(4, 3)[:3])
    assert without_padding({"input_ids": feed["input_ids"]}, output) is output
    assert without_padding(feed, output[:, :1]).shape == (2, 1, 3)
