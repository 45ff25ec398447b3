"""FP4 weights in blocks of 16, whose scales are FP8 (NVFP4): written, run, read back and compiled."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import add_weights

import onnxq
from onnxq import block_scales, retarget
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration import weight_ranges
from onnxq.engines import build
from onnxq.errors import OnnxqError
from onnxq.formats import FORMATS

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
        return float(np.square(rows - fake_quantize(rows, scale, zero_point, FP4, axis=0)).mean())

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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": "fp4:32"}, "FP4 weights in blocks of 16"),
        ({"weights": "fp4:tensor"}, "FP4 weights in blocks of 16"),
        ({"weights": "fp4", "target": "cpu"}, "that onnxruntime's CPU provider runs, found fp4"),
        ({"weights": "fp4", "activations": "int8"}, "weights and activations of one kind"),
    ],
)
def test_what_no_kernel_reads(products: tuple[Path, Path], options: dict[str, str], expected: str) -> None:
    with pytest.raises(OnnxqError, match=expected):
        onnxq.quantize(*products, **options)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_it_compiles_for_blackwell(products: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = products
    onnxq.quantize(model, data, recipe="fp4-weights", output=tmp_path / "fp4.onnx")
    engine = build(
        tmp_path / "fp4.onnx", tmp_path / "fp4.engine", runtime="tensorrt-rtx", sm=("120",),
        shapes={"x": ((1, 64), (8, 64), (16, 64))},
    )  # fmt: skip
    assert engine.weight_only_nodes == ("first", "second", "narrow") and not engine.promised_but_float
