"""FP4 in blocks of 16, whose scales are FP8 (NVFP4): written, run, learned with, read back and compiled."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import add_weights

import onnxq
from onnxq import block_scales, layer_nodes, retarget
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.autograd.ops.quantization import quantize_blocks
from onnxq.calibration import weight_ranges
from onnxq.engines import build
from onnxq.errors import OnnxqError
from onnxq.formats import FORMATS
from onnxq.runtime import Session

FP4 = FORMATS["fp4"]
PRODUCTS = """
<ir_version: 10, opset_import: ["" : 21]>
products (float[N,64] x) => (float[N,32] y)
{
    [first] a = Gemm <transB=1> (x, w1)
    r = Relu (a)
    [second] b = MatMul (r, w2)
    s = Relu (b)
    [narrow] c = MatMul (s, w3)
    t = Relu (c)
    [last] y = MatMul (t, w4)
}
"""
SHAPES = {"w1": (128, 64), "w2": (128, 96), "w3": (96, 24), "w4": (24, 32)}  # 24 rows are no blocks of 16


@pytest.fixture
def products(tmp_path: Path) -> tuple[Path, Path]:
    ir.save(add_weights(PRODUCTS, SHAPES), tmp_path / "products.onnx")
    inputs = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=inputs * np.linspace(0.2, 3, 64, dtype=np.float32))
    return tmp_path / "products.onnx", tmp_path / "inputs.npz"


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """The weights that a file means, worked out from its own numbers: by the name of the layer that reads each."""
    model = onnx.load(path)
    constants = {item.name: onnx.numpy_helper.to_array(item).astype(np.float64) for item in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    found = {}
    for node in model.graph.node:
        pair = makers.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if pair is None:
            continue
        axis, block = (next(item.i for item in pair.attribute if item.name == name) for name in ("axis", "block_size"))
        inner = makers[pair.input[1]]
        scale = constants[inner.input[0]] * constants[inner.input[1]]
        found[node.name] = constants[pair.input[0]] * np.repeat(scale, block, axis)
    return found


def test_two_levels_are_the_nearest_and_stay_as_they_are() -> None:
    scale = np.exp(np.random.default_rng(0).uniform(-11, -2, (64, 8))).astype(np.float32)
    rounded = block_scales.rounded(scale)
    assert np.abs(rounded / scale - 1).max() <= 1 / 16
    assert np.array_equal(block_scales.rounded(rounded), rounded)
    numbers, factor = block_scales.two_levels(scale)
    assert numbers.dtype == ml_dtypes.float8_e4m3fn and np.log2(factor) % 1 == 0


@pytest.mark.parametrize("name", ["few", "mse"])
def test_an_extreme_may_become_4(name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((4096, 16)).astype(np.float32)

    def error(low: np.ndarray, high: np.ndarray) -> float:
        scale, zero_point = scale_and_zero_point(low, high, FP4, symmetric=True)
        stored = block_scales.rounded(scale)
        return float(np.square(rows - fake_quantize(rows, stored, zero_point, FP4, axis=0)).mean())

    low, high = weight_ranges.get(name)(rows, FP4, True)
    assert error(low, high) < 0.8 * error(rows.min(axis=1), rows.max(axis=1))
    assert (high > 1.4 * np.abs(rows).max(axis=1)).any()


def test_the_file_means_what_was_measured(products: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = products
    plain = {"bias_correction": False}
    result = onnxq.quantize(model, data, recipe="fp4-weights", knobs=plain, output=tmp_path / "fp4.onnx")
    assert result.numbers["quantized_nodes"] == 3 and set(result.numbers["left_float"]) == {"last"}
    proto = onnx.load(tmp_path / "fp4.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 23
    codes = [item for item in proto.graph.initializer if item.data_type == onnx.TensorProto.FLOAT4E2M1]
    scales = [item for item in proto.graph.initializer if item.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert len(codes) == len(scales) == 3
    assert sum(len(item.raw_data) for item in (*codes, *scales)) == (64 * 128 + 128 * 96 + 96 * 24) * (4 + 0.5) / 8
    weights = dequantized(tmp_path / "fp4.onnx")
    float_model = ir.load(model)
    for name, array in zip(("w1", "w2", "w3"), weights.values(), strict=True):
        float_model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
    ir.save(float_model, tmp_path / "meant.onnx")
    compared = onnxq.compare(tmp_path / "meant.onnx", tmp_path / "fp4.onnx", data)
    assert compared.sqnr_db > 100
    with pytest.raises(
        Exception, match=r"float4e2m1|DequantizeLinear"
    ):  # so that the day onnxruntime has it is noticed
        onnxruntime.InferenceSession(tmp_path / "fp4.onnx")


def test_gptq_rounds_to_its_numbers(products: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = products
    plain, learned = (
        onnxq.quantize(model, data, recipe=recipe, weights="fp4", output=tmp_path / f"{recipe}.onnx")
        for recipe in ("fp4-weights", "gptq")
    )
    assert learned.numbers["sqnr_db"] > plain.numbers["sqnr_db"] + 1
    assert len(dequantized(tmp_path / "gptq.onnx")) == 3


def test_strip_gives_the_floats_back(products: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = products
    onnxq.quantize(model, data, recipe="fp4-weights", output=tmp_path / "fp4.onnx")
    onnxq.save(retarget.strip(tmp_path / "fp4.onnx"), tmp_path / "float.onnx")
    compared = onnxq.compare(tmp_path / "float.onnx", tmp_path / "fp4.onnx", data)
    assert compared.sqnr_db > 100
    onnxruntime.InferenceSession(tmp_path / "float.onnx")


def blocks_by_hand(values: np.ndarray, factor: float) -> np.ndarray:
    """What TRT_FP4DynamicQuantize and both DequantizeLinear behind it make of an activation."""
    blocks = values.reshape(*values.shape[:-1], -1, 16).astype(np.float32)
    unit = np.float32(factor)
    scale = np.minimum(np.abs(blocks).max(axis=-1, keepdims=True) / (unit * np.float32(6)), np.float32(448))
    steps = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit
    codes = np.clip(np.divide(blocks, steps, where=steps > 0, out=np.zeros_like(blocks)), -6, 6)
    return (codes.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * steps).reshape(values.shape)


def test_activations_mean_what_tensorrt_makes_of_them() -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32) * 5
    values[0, 0, :16], values[1, 1, 3] = 0, 200  # an empty block, and one beyond the range
    text = """
        <ir_version: 11, opset_import: ["" : 23, "trt" : 1]>
        activation (float[3,5,64] x) => (float[3,5,64] y) <float factor = {0.01}>
        {
            codes, scales = trt.TRT_FP4DynamicQuantize <axis=-1, block_size=16, scale_type=17> (x, factor)
            steps = DequantizeLinear (scales, factor)
            y = DequantizeLinear <axis=-1, block_size=16> (codes, steps)
        }
    """
    expected = blocks_by_hand(values, 0.01)
    assert np.array_equal(Session(ir.from_onnx_text(text), optimize=False).run({"x": values})[0], expected)
    scale = torch.tensor(0.01 * 448)
    learned = quantize_blocks(torch.from_numpy(values).requires_grad_(), scale) * scale
    assert torch.allclose(learned, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    learned.sum().backward()
    assert learned.grad_fn is not None


def test_both_operands_are_fp4(products: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = products
    result = onnxq.quantize(model, data, recipe="fp4", output=tmp_path / "fp4.onnx")
    assert result.numbers["quantized_nodes"] == 4 and result.numbers["sqnr_db"] > 10
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "fp4.onnx").graph.node)
    assert (ops["TRT_FP4DynamicQuantize"], ops["QuantizeLinear"]) == (3, 1)  # the last has no whole blocks: FP8
    compared = onnxq.compare(model, tmp_path / "fp4.onnx", data)
    assert compared.sqnr_db == pytest.approx(result.numbers["sqnr_db"], abs=3)
    learned = onnxq.quantize(model, data, recipe="gptq", weights="fp4", activations="fp4")
    assert learned.numbers["sqnr_db"] > result.numbers["sqnr_db"]
    onnxq.save(retarget.strip(tmp_path / "fp4.onnx"), tmp_path / "float.onnx")
    onnxruntime.InferenceSession(tmp_path / "float.onnx")
    assert (
        onnxq.compare(model, tmp_path / "float.onnx", data).sqnr_db > compared.sqnr_db + 2
    )  # weights alone are rounded


def test_a_transposed_activation_is_fp8(tmp_path: Path) -> None:
    """Its last axis, along which blocks are, is not the one that the product sums over."""
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        products (float[64,N] x) => (float[N,32] y)
        { [first] a = Gemm <transA=1, transB=1> (x, w)   r = Relu (a)   [second] y = MatMul (r, v) }
    """
    ir.save(add_weights(text, {"w": (32, 64), "v": (32, 32)}), tmp_path / "products.onnx")
    arrays = [{"x": np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)}]
    result = onnxq.quantize(tmp_path / "products.onnx", arrays, recipe="fp4")
    assert not result.numbers["left_float"]
    layers = {item.node.name: item for item in layer_nodes.weighted_nodes(result.model.graph)}
    makers = {name: item.activation.producer().inputs[0].producer().op_type for name, item in layers.items()}
    assert makers == {"first": "QuantizeLinear", "second": "TRT_FP4DynamicQuantize"}


@pytest.mark.parametrize("base", ["float16", "bfloat16"])
@pytest.mark.parametrize("recipe", ["fp4", "fp4-weights"])
def test_between_its_codes_it_may_be_half_as_wide(
    products: tuple[Path, Path], tmp_path: Path, recipe: str, base: str
) -> None:
    model, data = products
    inputs = {"x": np.load(data)["x"] * np.float32(1e-2)}  # a range whose part for the tensor float16 holds not in full
    onnxq.quantize(model, [inputs], recipe=recipe, base=base, output=tmp_path / "half.onnx")
    assert onnxq.compare(model, tmp_path / "half.onnx", [inputs]).sqnr_db > 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": "fp4:32"}, "FP4 weights in blocks of 16"),
        ({"weights": "fp4:tensor"}, "FP4 weights in blocks of 16"),
        ({"weights": "fp4", "target": "cpu"}, "that onnxruntime's CPU provider runs, found fp4"),
        ({"weights": "fp4", "activations": "int8"}, "weights and activations of one kind"),
        ({"weights": "fp8", "activations": "fp4"}, "weights and activations of one kind"),
        ({"activations": "fp4", "target": "cpu"}, "that onnxruntime's CPU provider runs, found fp4"),
    ],
)
def test_what_no_kernel_reads(products: tuple[Path, Path], options: dict[str, str], expected: str) -> None:
    with pytest.raises(OnnxqError, match=expected):
        onnxq.quantize(*products, **options)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("recipe", ["fp4", "fp4-weights"])
def test_it_compiles_for_blackwell(products: tuple[Path, Path], tmp_path: Path, recipe: str) -> None:
    model, data = products
    onnxq.quantize(model, data, recipe=recipe, output=tmp_path / "fp4.onnx")
    engine = build(
        tmp_path / "fp4.onnx", tmp_path / "fp4.engine", runtime="tensorrt-rtx", sm=("120",),
        shapes={"x": ((1, 64), (8, 64), (16, 64))},
    )  # fmt: skip
    products = ("first", "second", "narrow")
    assert not engine.promised_but_float
    if recipe == "fp4":
        assert engine.low_precision_nodes == (*products, "last")
    else:
        assert engine.weight_only_nodes == products
