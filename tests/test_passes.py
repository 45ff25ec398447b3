"""Every rewrite keeps the function, is idempotent and says honestly whether it changed anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import NETWORK, SHAPES, add_weights, sqnr_db

import onnxq
from onnxq import OnnxqError, targets
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.calibration import calibrate
from onnxq.calibration.recording import record
from onnxq.passes.fold_affine import FoldAffine
from onnxq.passes.fold_batchnorm import FoldBatchNorm
from onnxq.passes.fuse_activations import FuseActivations
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.passes.keep_biases_apart import KeepBiasesApart
from onnxq.passes.lower_group_norm import LowerGroupNorm
from onnxq.passes.lower_prelu import LowerPRelu, ShareSlopes
from onnxq.passes.lower_softplus import LowerSoftplus
from onnxq.passes.lower_weights import LowerWeights
from onnxq.passes.pad_codes import PadCodes
from onnxq.passes.pool_means import PoolMeans
from onnxq.passes.split_gemm_bias import SplitGemmBias
from onnxq.runtime import Session

X = np.random.default_rng(3).standard_normal((2, 3, 16, 16)).astype(np.float32)

PADDED = """
<ir_version: 10, opset_import: ["" : 21]>
padded (float[N,3,16,16] x) => (float[N,8,16,16] y)
<int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
{
    [pad] p = Pad (x, pads)
    [conv] c = Conv (p, w1)
    [norm] y = BatchNormalization (c, g1, b1, m1, v1)
}
"""
PADDED_SHAPES = {"w1": (8, 3, 3, 3), "g1": (8,), "b1": (8,), "m1": (8,), "v1": (8,)}

AFFINE = """
<ir_version: 10, opset_import: ["" : 21]>
affine (float[N,3,16,16] x) => (float[N,8,16,16] y, float[N,8,16,16] z)
<float half = {0.5}, float[1] two = {2.0}>
{
    [conv] c = Conv <pads=[1,1,1,1]> (x, w1)
    [add] a = Add (b1, c)
    [sub] s = Sub (a, b2)
    [div] d = Div (s, two)
    [mul] m = Mul (d, b3)
    [relu] r = Relu (m)
    [conv2] e = Conv <pads=[1,1,1,1]> (r, w2, b4)
    [from] f = Sub (half, e)
    [both] g = Conv <pads=[1,1,1,1]> (r, w3)
    [more] y = Add (g, half)
    [sum] z = Add (g, f)
}
"""
AFFINE_SHAPES = {
    "w1": (8, 3, 3, 3), "b1": (1, 8, 1, 1), "b2": (8, 1, 1), "b3": (1, 8, 1, 1), "w2": (8, 8, 3, 3), "b4": (8,),
    "w3": (8, 8, 3, 3),
}  # fmt: skip

ACTIVATIONS = """
<ir_version: 10, opset_import: ["" : 21]>
activations (float[N,3,16,16] x) => (float[N,3,16,16] y)
<float root = {1.41421356}, float half = {0.5}, float one = {1.0}, float inverse = {0.70710678}, float three = {3.0},
 float cubic = {0.044715}, float slope = {0.79788456}>
{
    [d] d = Div (x, root)
    [e] e = Erf (d)
    [a] a = Add (e, one)
    [m] m = Mul (x, a)
    [first] first = Mul (m, half)
    [p] p = Mul (first, inverse)
    [q] q = Erf (p)
    [r] r = Add (one, q)
    [s] s = Mul (half, r)
    [second] second = Mul (s, first)
    [t] t = Pow (second, three)
    [u] u = Mul (cubic, t)
    [v] v = Add (second, u)
    [w] w = Mul (slope, v)
    [z] z = Tanh (w)
    [b] b = Add (z, one)
    [c] c = Mul (half, second)
    [third] third = Mul (c, b)
    [h] h = HardSigmoid <alpha=0.16666667, beta=0.5> (third)
    [fourth] y = Mul (third, h)
}
"""

GEMM = """
<ir_version: 10, opset_import: ["" : 21]>
gemm (float[N,3,16,16] x) => (float[N,10] y, float[N,10] z)
{
    [flat] f = Flatten (x)
    [fc] y = Gemm <transB=1, alpha=0.5> (f, w, b)
    [fc2] z = Gemm <transB=1> (f, w, b)
}
"""


TOKENS = """
<ir_version: 10, opset_import: ["" : 21]>
tokens (float[2,3,16,16] x) => (float[2,3,16,8] y, float[2,3,16,8] z)
<float scale = {0.05}, uint8 zero = {128}, float step = {0.01}, int8 none = {0}>
{
    [q] q = QuantizeLinear (x, scale, zero)
    [d] d = DequantizeLinear (q, scale, zero)
    [wq] wq = QuantizeLinear (w, step, none)
    [wd] wd = DequantizeLinear (wq, step, none)
    [first] f = MatMul (d, wd)
    [bias] y = Add (b, f)
    [second] s = MatMul (d, w)
    [float_bias] z = Add (s, b)
}
"""


PRELUS = """
<ir_version: 10, opset_import: ["" : 21]>
slopes (float[N,3,16,16] x) => (float[N,3,16,16] y, float[N,3,16,16] z)
<float[3,1,1] flat = {0.25, -0.5, 1.0}, float[3,1,1] steep = {0.25, -0.5, 1.5}, float[1] one = {0.2}>
{
    [shared] s = PRelu (x, one)
    [flat] y = PRelu (s, flat)
    [steep] z = PRelu (s, steep)
}
"""


SOFTPLUS = """
<ir_version: 10, opset_import: ["" : 21]>
softplus (float[N,3,16,16] x) => (float[N,3,16,16] y, float[N,3,16,16] z, float[N,3,16,16] u)
<float many = {60.0}>
{
    [wide] w = Mul (x, many)
    [mish] y = Mish (w)
    [softplus] z = Softplus (w)
    [gate] t = Tanh (z)
    [opened] o = Mul (w, t)
    [inner] i = Softplus (x)
    [saturated] s = Tanh (i)
    [product] u = Mul (s, o)
}
"""


GROUPS = """
<ir_version: 10, opset_import: ["" : 21]>
groups (float[N,3,16,16] x) => (float[N,8,16,16] y, float[N,8,256] z)
<int64[3] flat = {0, 8, -1}>
{
    [conv] c = Conv <pads=[1,1,1,1]> (x, w1)
    [map] y = GroupNormalization <num_groups=4, epsilon=0.1> (c, g1, b1)
    f = Reshape (y, flat)
    [line] z = GroupNormalization <num_groups=2> (f, g1, b1)
}
"""


MEANS = """
<ir_version: 10, opset_import: ["" : 21]>
means (float[N,3,16,16] x) => (float[N,3,1,1] y, float[N,3] z)
<int64[2] sides = {2, 3}, int64[2] last = {-1, -2}>
{
    [kept] y = ReduceMean (x, sides)
    [dropped] z = ReduceMean <keepdims = 0> (x, last)
}
"""


def network() -> ir.Model:
    model = add_weights(NETWORK, SHAPES)
    models.normalise(model)
    return model


def outputs(model: ir.Model, *, optimize: bool = True) -> list[np.ndarray]:
    return Session(model, optimize=optimize).run({"x": X})


@pytest.mark.parametrize(
    ("rewrite", "text", "shapes", "removed"),
    [
        (FoldAffine, AFFINE, AFFINE_SHAPES, "Div"),
        (FuseActivations, ACTIVATIONS, {}, "Mul"),
        (FoldBatchNorm, NETWORK, SHAPES, "BatchNormalization"),
        (FoldBatchNorm, PADDED, PADDED_SHAPES, "Pad"),
        (SplitGemmBias, GEMM, {"w": (10, 768), "b": (10,)}, None),
        (PoolMeans, MEANS, {}, "ReduceMean"),
        (LowerGroupNorm, GROUPS, {"w1": (8, 3, 3, 3), "g1": (8,), "b1": (8,)}, "GroupNormalization"),
        (ShareSlopes, PRELUS, {}, None),
        (LowerPRelu, PRELUS, {}, "PRelu"),
        (LowerSoftplus, SOFTPLUS, {}, "Softplus"),
        (LowerSoftplus, SOFTPLUS, {}, "Mish"),
        (KeepBiasesApart, TOKENS, {"w": (16, 8), "b": (8,)}, None),
    ],
)
def test_rewrites_keep_the_function(rewrite: type, text: str, shapes: dict, removed: str | None) -> None:
    model = add_weights(text, shapes)
    models.normalise(model)
    names = {node.name for node in model.graph if node.op_type in ("Conv", "Gemm")}
    expected = outputs(model)
    assert rewrite()(model).modified
    for found, wanted in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert removed not in {node.op_type for node in model.graph}
    assert names <= {node.name for node in model.graph}
    assert not rewrite()(model).modified


def quantized(target_name: str, activations: str | None = None) -> ir.Model:
    """The network with Q/DQ and scales, its weights still float."""
    model = network()
    target = targets.get(target_name)
    target.prepare(model)
    placement = target.place(model.graph, target.scheme(None, activations))
    taps = sorted({(site.like or site.value).name for site in placement.sites if not site.value.is_initializer()})
    session = Session(model, taps=[name for name in taps if name != "x"])
    InsertQDQ(placement.sites)(model)
    source = calibrate_source()
    found = record(session, taps, source, calibrate_specs(model))
    from onnxq.calibration.observers import minmax

    calibrate.set_activation_scales(model, found.statistics, minmax)
    calibrate.set_weight_scales(model)
    return model


def calibrate_source():
    from onnxq.calibration.data import open_source

    return open_source([{"x": X}], [])


def calibrate_specs(model: ir.Model):
    from onnxq.calibration.data import input_specs

    return input_specs(model)


@pytest.mark.parametrize("target", targets.names())
def test_lowering_weights_changes_no_bit(target: str) -> None:
    model = quantized(target)
    expected = outputs(model, optimize=False)[0]
    assert LowerWeights()(model).modified
    np.testing.assert_array_equal(outputs(model, optimize=False)[0], expected)
    assert not LowerWeights()(model).modified


def test_odd_widths_are_a_clip_before_8_bits() -> None:
    model = quantized("tensorrt", "int6")
    clips = [node for node in model.graph if node.op_type == "Clip" and node.name and node.name.endswith("_clip")]
    assert clips
    sides = set()
    for clip in clips:
        quantize = clip.outputs[0].uses()[0].node
        scale = quantize.inputs[1].const_value.numpy()
        # What is never negative has all 64 codes on its side, still with zero point 0.
        low, high = {"int6": (-32, 31), "uint6": (0, 63)}[quantize.metadata_props["onnxq.format"]]
        assert quantize.inputs[2].const_value.numpy() == 0
        assert clip.inputs[2].const_value.numpy() == pytest.approx(high * scale, rel=1e-6)
        assert clip.inputs[1].const_value.numpy() == pytest.approx(low * scale, rel=1e-6)
        sides.add(low)
    assert 0 in sides


def test_outputs_keep_their_names_and_shared_values_one_pair() -> None:
    model = quantized("cpu")
    assert [value.name for value in model.graph.outputs] == ["logits"]
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names))
    sources = [node.inputs[0].name for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(sources) == len(set(sources))


def test_values_that_are_called_like_ours_keep_their_names(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[N,16,8,8] x) => (float[N,16,8,8] y) {
        x_quantized = Relu (x)
        x_dequantized = Conv <pads=[1,1,1,1]> (x, w)
        w_quantized = Add (x_quantized, x_dequantized)
        x_scale = Sigmoid (w_quantized)
        x_clip_low = Tanh (x_scale)
        y_float = Conv <pads=[1,1,1,1]> (x_clip_low, w2)
        y = Conv <pads=[1,1,1,1]> (y_float, w3)
    }
    """
    path = tmp_path / "f.onnx"
    ir.save(add_weights(text, {name: (16, 16, 3, 3) for name in ("w", "w2", "w3")}), path)
    x = np.random.default_rng(0).standard_normal((8, 16, 8, 8)).astype(np.float32)
    expected = Session(str(path)).run({"x": x})[0]
    for target in ("tensorrt", "cpu"):
        for width, decibel in (("int8", 25), ("int4", 5)):
            result = onnxq.quantize(path, [{"x": x}], target=target, activations=width)
            assert {"x_quantized", "w_quantized", "x_scale"} <= set(graphs.values(result.model.graph))
            found = Session(result.model, optimize=False).run({"x": x})[0]
            assert sqnr_db(expected, found) > decibel


def test_pads_move_to_the_codes(shared_data: Path) -> None:
    result = onnxq.quantize(shared_data / "models" / "resnet20_cifar10.onnx", target="cpu", samples=4)
    pads = [node for node in result.model.graph if node.op_type == "Pad"]
    assert len(pads) == 2 and all(pad.inputs[0].dtype == ir.DataType.UINT8 for pad in pads)
    assert not PadCodes()(result.model).modified


def test_signed_attention_loads_in_onnxruntime_as_it_comes(shared_data: Path, tmp_path: Path) -> None:
    """At opset 21 onnxruntime refuses it (see LowerOpset); a plain session, without our options, is what users make."""
    import onnxruntime

    output = tmp_path / "o.onnx"
    onnxq.quantize(shared_data / "models" / "r20vit_hybrid_cifar10.onnx", samples=4, output=output)
    onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    assert models.read(output).graph.opset_imports[""] == 20


@pytest.mark.parametrize("name", ["g1", "v2"])
def test_a_batchnorm_of_another_size_is_named(name: str) -> None:
    model = add_weights(NETWORK, {**SHAPES, name: (4,)})
    with pytest.raises(OnnxqError, match="found 4, 32"):
        FoldBatchNorm()(model)


def test_a_bias_that_comes_back_is_split_off_under_another_name() -> None:
    model = add_weights(GEMM, {"w": (10, 768), "b": (10,)})
    SplitGemmBias()(model)
    product = next(node for node in model.graph if node.name == "fc2")
    product.resize_inputs(3)
    product.replace_input_with(2, model.graph.initializers["b"])  # as correction does
    expected = outputs(model)
    assert SplitGemmBias()(model).modified
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    for found, wanted in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
