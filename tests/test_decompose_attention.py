"""Attention of opset 23, taken apart for TensorRT, keeps its function; in a decoder it stays whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
from conftest import add_weights

import onnxq
from onnxq.passes.decompose_attention import DecomposeAttention
from onnxq.runtime import Session

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
FORMS = {
    "plain": ("q, k, v", "", 4, 4),
    "scaled": ("q, k, v", "scale=0.7", 4, 4),
    "causal": ("q, k, v", "is_causal=1", 4, 4),
    "shared heads": ("q, k, v", "is_causal=1", 4, 2),
    "mask of numbers": ("q, k, v, bias", "", 4, 4),
    "mask of truths": ("q, k, v, seen", "", 4, 4),
    "mask and causal": ("q, k, v, seen", "is_causal=1", 4, 2),
    "soft cap": ("q, k, v, bias", "softcap=1.5", 4, 4),
    "cache": ("q, k, v, , past_k, past_v", "is_causal=1", 4, 2),
}


def attention(form: str, three: bool) -> ir.Model:
    names, attributes, queries, keys = FORMS[form]
    if three:
        attributes = ", ".join(filter(None, [attributes, f"q_num_heads={queries}", f"kv_num_heads={keys}"]))
    shape = {heads: f"float[N,5,{8 * heads}]" if three else f"float[N,{heads},5,8]" for heads in (2, 4)}
    inputs = f"{shape[queries]} q, {shape[keys]} k, {shape[keys]} v, float[5,5] bias, bool[5,5] seen"
    past, present = f"float[N,{keys},3,8]", "float[E,F,G,H]"
    inputs += f", {past} past_k, {past} past_v"
    outputs = f"float[A,B,C{'' if three else ',D'}] y"
    names_of_outputs = "y"
    if "past" in names:
        outputs, names_of_outputs = f"{outputs}, {present} present_k, {present} present_v", "y, present_k, present_v"
    marks = f"<{attributes}>" if attributes else ""
    model = ir.from_onnx_text(
        f"{HEAD} attention ({inputs}) => ({outputs}) {{ {names_of_outputs} = Attention {marks} ({names}) }}"
    )
    common_passes.ShapeInferencePass()(model)
    return model


def feed(model: ir.Model) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    values = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else 2 for size in value.shape]
        numbers = generator.standard_normal(shape).astype(np.float32)
        values[value.name] = (numbers > -0.5) | np.eye(5, dtype=bool) if value.name == "seen" else numbers
    return values


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_function_stays(form: str, three: bool) -> None:
    model = attention(form, three)
    wanted = Session(model).run(feed(model))
    assert DecomposeAttention()(model).modified
    assert not any(node.op_type == "Attention" for node in model.graph)
    assert not DecomposeAttention()(model).modified
    common_passes.CheckerPass()(model)
    for found, expected in zip(Session(model).run(feed(model)), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attributes", ["left_window_size=2", "qk_matmul_output_mode=1"])
def test_other_forms_stay_whole(attributes: str) -> None:
    outputs = "y, a, b, scores" if "output" in attributes else "y"
    declared = "float[N,4,5,8] y" + (", float[N,4,5,5] scores" if "output" in attributes else "")
    text = f"{HEAD} attention (float[N,4,5,8] q) => ({declared}) {{ {outputs} = Attention <{attributes}> (q, q, q) }}"
    assert not DecomposeAttention()(ir.from_onnx_text(text)).modified


def test_a_row_that_sees_nothing_is_a_mean_and_no_nan() -> None:
    model = attention("mask of truths", False)
    DecomposeAttention()(model)
    given = feed(model)
    given["seen"][2] = False
    found = Session(model).run(given)[0][:, :, 2]
    np.testing.assert_allclose(found, given["v"].mean(axis=2), rtol=1e-5, atol=1e-6)


TRANSFORMER = f"""{HEAD}
transformer (float[N,6,32] x) => (float[N,6,32] y)
{{
    a = LayerNormalization <axis=-1> (x, g)
    [query] q = MatMul (a, wq)
    [key] k = MatMul (a, wk)
    [value] v = MatMul (a, wv)
    [attend] m = Attention <q_num_heads=4, kv_num_heads=4> (q, k, v)
    [out] o = MatMul (m, wo)
    y = Add (x, o)
}}
"""


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_its_products_get_codes_where_the_target_has_kernels(target: str, tmp_path: Path) -> None:
    path = tmp_path / "transformer.onnx"
    ir.save(add_weights(TRANSFORMER, {"g": (32,), **{name: (32, 32) for name in ("wq", "wk", "wv", "wo")}}), path)
    x = np.random.default_rng(0).standard_normal((8, 6, 32)).astype(np.float32)
    numbers = onnxq.quantize(path, [{"x": x}], target=target).numbers
    assert numbers["kind"] == "transformer"
    assert numbers["quantized_nodes"] == numbers["weighted_nodes"] == (6 if target == "tensorrt" else 4)
    assert numbers["sqnr_db"] > 25


def test_in_a_decoder_it_stays_whole(tmp_path: Path) -> None:
    text = TRANSFORMER.replace("float[N,6,32] x", "int64[batch,sequence] ids").replace(
        "float[N,6,32] y", "float[A,B,C] z"
    )
    text = text.replace("    a = Layer", "    x = Gather (table, ids)\n    a = Layer").replace(
        "kv_num_heads=4", "kv_num_heads=4, is_causal=1"
    )
    text = text.replace("y = Add (x, o)", "y = Add (x, o)\n    [last] z = MatMul (y, head)")
    shapes = {"g": (32,), "table": (40, 32), "head": (32, 40), **{name: (32, 32) for name in ("wq", "wk", "wv", "wo")}}
    path = tmp_path / "decoder.onnx"
    ir.save(add_weights(text, shapes), path)
    data = [{"ids": np.random.default_rng(0).integers(0, 40, (8, 6))}]
    result = onnxq.quantize(path, data)
    assert [node.name for node in result.model.graph if node.op_type == "Attention"] == ["attend"]
    assert result.numbers["quantized_nodes"] == result.numbers["weighted_nodes"] == 5
