"""Fused ops of onnxruntime are taken apart, and compute what they computed."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from fused_ops import FUSED, Fused

from onnxq import layer_nodes, shapes
from onnxq.passes.expand_attention import ExpandAttention
from onnxq.passes.expand_fusions import ExpandFusions, claim_simplified_norms

READ = {"SkipLayerNormalization_sum": (0, 3), "SkipSimplifiedLayerNormalization": (0, 3)}


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("fused", FUSED, ids=lambda fused: fused.name)
def test_expanded_ops_compute_the_same(fused: Fused) -> None:
    model = fused.model(READ.get(fused.name))
    before = run(model, fused.feeds())
    claim_simplified_norms(model)
    ExpandFusions()(model)
    ExpandAttention()(model)
    assert all(node.domain == "" for node in model.graph), [node.op_type for node in model.graph]
    after = run(model, fused.feeds())
    assert list(after) == list(before)
    for name, expected in before.items():
        np.testing.assert_allclose(after[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)


def test_weights_inside_attention_become_a_layer() -> None:
    fused = next(fused for fused in FUSED if fused.name == "Attention_mask")
    model = fused.model()
    ExpandFusions()(model)
    layers = list(layer_nodes.weighted_nodes(model.graph))
    assert [(layer.node.op_type, layer.weight.name) for layer in layers if layer.weight] == [("MatMul", "w_qkv")]
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Split", "MultiHeadAttention"]


@pytest.mark.parametrize("name", ["GroupQueryAttention_rotary", "MultiHeadAttention_cache", "RotaryEmbedding_partly"])
def test_shapes_are_inferred_through_attention_that_stays(name: str) -> None:
    fused = next(fused for fused in FUSED if fused.name == name)
    model = fused.model()
    before = run(model, fused.feeds())
    shapes.infer(model)
    assert [node.op_type for node in model.graph] == [fused.op_type]
    for value in model.graph.outputs:
        assert value.dtype == ir.DataType.FLOAT
        assert value.shape is not None
        assert tuple(value.shape) == before[value.name or ""].shape


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("FusedConv", {"activation": "Elu"}),
        ("FusedMatMul", {"transBatchA": 1}),
        ("SimplifiedLayerNormalization", {"axis": 1}),
        ("Attention", {"do_rotary": 1}),
        ("GroupQueryAttention", {"smooth_softmax": 1}),
        ("RotaryEmbedding", {"is_packed_batching": 1}),
    ],
)
def test_a_form_that_is_not_known_stays(name: str, change: dict[str, int | str]) -> None:
    fused = next(fused for fused in FUSED if fused.name == name)
    model = dataclasses.replace(fused, attributes={**fused.attributes, **change}).model()
    claim_simplified_norms(model)
    for expand in (ExpandFusions(), ExpandAttention()):
        assert not expand(model).modified
    assert [(node.op_type, node.domain) for node in model.graph] == [(fused.op_type, fused.domain)]
    assert not {value.name for value in model.graph.initializers.values()} - set(fused.inputs)


def test_a_norm_whose_mean_is_read_stays() -> None:
    fused = next(fused for fused in FUSED if fused.name == "SkipLayerNormalization_sum")
    model = fused.model(read=(0, 1))
    assert not ExpandFusions()(model).modified


def test_half_precision_is_kept_where_types_are_not_known() -> None:
    fused = next(fused for fused in FUSED if fused.name == "SkipSimplifiedLayerNormalization")
    halves = {name: None if array is None else array.astype(np.float16) for name, array in fused.inputs.items()}
    model = dataclasses.replace(fused, inputs=halves).model(read=(0, 3))
    for value in model.graph.inputs:
        value.type = None  # as behind an op that inference does not know
    ExpandFusions()(model)
    for value in model.graph.inputs:
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    after = run(model, {name: a for name, a in halves.items() if a is not None and not name.startswith("w_")})
    expected = run(fused.model(read=(0, 3)), fused.feeds())
    for name, value in after.items():
        assert value.dtype == np.float16
        np.testing.assert_allclose(value.astype(np.float32), expected[name], rtol=0.02, atol=0.02)
