"""Weights that onnxruntime's own ops hold as packed blocks: read exactly, and brought to either target."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import model as models
from onnxq import retarget
from onnxq.errors import OnnxqError
from onnxq.passes.raise_packed_blocks import unpack
from onnxq.report.table import plain_lines
from onnxq.runtime import Session

ROWS, WIDTH = 600, 64
READER = """
<ir_version: 10, opset_import: ["" : 21]>
reader (int64[N,8] input_ids) => (float[N,8,48] y)
{
    [lookup] e = Gather (table, input_ids)
    [first] a = MatMul (e, w1)
    r = Relu (a)
    [middle] b = MatMul (r, w2)
    s = Relu (b)
    [last] y = MatMul (s, w3)
}
"""
SHAPES = {"table": (ROWS, WIDTH), "w1": (WIDTH, 96), "w2": (96, 72), "w3": (72, 48)}  # 72 rows end within a block
TOKENS = {"input_ids": np.random.default_rng(3).integers(0, ROWS, (2, 8))}


def by_onnxruntime(folder: Path, bits: int = 4, symmetric: bool = True, block_size: int = 32) -> Path:
    """What onnxruntime's quantizer for text models makes: MatMulNBits, and GatherBlockQuantized."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    config = DefaultWeightOnlyQuantConfig(
        block_size=block_size, is_symmetric=symmetric, bits=bits,
        op_types_to_quantize=("MatMul", "Gather") if bits == 4 else ("MatMul",),
    )  # fmt: skip
    quantizer = MatMulNBitsQuantizer(ir.to_proto(add_weights(READER, SHAPES)), algo_config=config)
    quantizer.process()
    path = folder / f"blocks_{bits}_{symmetric}_{block_size}.onnx"
    quantizer.model.save_model_to_file(str(path))
    return path


def run(model: Path | ir.Model, optimize: bool = True) -> np.ndarray:
    found: np.ndarray = Session(model, optimize=optimize).run(TOKENS)[0]
    return found


@pytest.mark.parametrize(
    ("bits", "symmetric", "block_size"), [(4, True, 32), (4, False, 32), (4, False, 16), (8, True, 32), (8, False, 64)]
)
def test_the_float_model_is_what_the_blocks_mean(bits: int, symmetric: bool, block_size: int, tmp_path: Path) -> None:
    theirs = by_onnxruntime(tmp_path, bits, symmetric, block_size)
    assert any(node.op_type == "MatMulNBits" for node in models.load(theirs).graph)
    model = retarget.strip(theirs)
    assert [node.op_type for node in model.graph] == ["Gather", "MatMul", "Relu", "MatMul", "Relu", "MatMul"]
    assert sqnr_db(run(theirs), run(model)) > 100


def weights(path: Path) -> list[np.ndarray]:
    """What a file's products multiply by."""
    products = [node for node in retarget.strip(path).graph if node.op_type == "MatMul"]
    return [node.inputs[1].const_value.numpy() for node in products]  # type: ignore[union-attr]


def test_a_cpu_keeps_zero_points(tmp_path: Path) -> None:
    theirs = by_onnxruntime(tmp_path, symmetric=False)
    fixed = retarget.retarget(theirs, "cpu")
    assert fixed.quantized_nodes == ["first_Q4", "middle_Q4", "last_Q4"]
    path = models.save(fixed.model, tmp_path / "fixed.onnx")
    for expected, found in zip(weights(theirs), weights(path), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    codes = {value.dtype for name, value in fixed.model.graph.initializers.items() if name.endswith("_quantized")}
    assert codes == {ir.DataType.INT8, ir.DataType.UINT4}  # the table's and the weights'
    assert sqnr_db(run(theirs), run(fixed.model)) > 35


@pytest.mark.parametrize(("target", "layers"), [("cpu", 3), ("tensorrt", 2)])
def test_blocks_around_zero_keep_their_steps(target: str, layers: int, tmp_path: Path) -> None:
    """All but the largest number of a block whose scale is below zero, which loses one step of eight."""
    theirs = by_onnxruntime(tmp_path)
    fixed = retarget.retarget(theirs, target)
    assert fixed.quantized_nodes == ["first_Q4", "middle_Q4", "last_Q4"][:layers]
    if target == "tensorrt":
        assert "do not divide into blocks" in fixed.left_float["last_Q4"]
    path = models.save(fixed.model, tmp_path / "fixed.onnx")
    for expected, found in zip(weights(theirs), weights(path), strict=True):
        changed = ~np.isclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(found[changed], expected[changed] * 7 / 8, rtol=1e-5)
        assert changed.mean() < 1 / 32


def test_bits_are_unpacked_from_the_lowest() -> None:
    packed = np.array([[0b11100100, 0b00011011]], np.uint8)
    np.testing.assert_array_equal(unpack(packed, 2), [[0, 1, 2, 3, 3, 2, 1, 0]])
    np.testing.assert_array_equal(unpack(packed, 4), [[4, 14, 11, 1]])
    np.testing.assert_array_equal(unpack(packed, 8), packed)


def test_biases_are_added_and_groups_are_refused(tmp_path: Path) -> None:
    model = models.load(by_onnxruntime(tmp_path))
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    bias = ir.Value(name="bias", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((96,)))
    bias.const_value = ir.tensor(np.linspace(-1, 1, 96, dtype=np.float32), name="bias")
    model.graph.register_initializer(bias)
    node.resize_inputs(6)
    node.replace_input_with(5, bias)
    ir.save(model, tmp_path / "biased.onnx")
    expected = onnxruntime.InferenceSession(str(tmp_path / "biased.onnx")).run(None, TOKENS)[0]
    assert sqnr_db(expected, run(retarget.strip(tmp_path / "biased.onnx"))) > 100
    groups = ir.Value(name="groups", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape((64,)))
    groups.const_value = ir.tensor(np.arange(64, dtype=np.int32) // 32, name="groups")
    model.graph.register_initializer(groups)
    node.replace_input_with(4, groups)
    ir.save(model, tmp_path / "grouped.onnx")
    with pytest.raises(OnnxqError, match="found MatMulNBits"):
        retarget.strip(tmp_path / "grouped.onnx")


@pytest.mark.parametrize("format_name", ["int4:32", "uint4:32", "int4:64"])
def test_packed_blocks_are_what_onnxruntime_makes_of_the_others(format_name: str, tmp_path: Path) -> None:
    path = models.save(add_weights(READER, SHAPES), tmp_path / "reader.onnx")
    options = {"recipe": "int4-weights", "target": "cpu", "weights": format_name}
    plain, packed = tmp_path / "plain.onnx", tmp_path / "packed.onnx"
    onnxq.quantize(path, [TOKENS], output=plain, **options)
    numbers = onnxq.quantize(path, [TOKENS], output=packed, packed_blocks=True, **options).numbers
    assert numbers["quantized_nodes"] == numbers["weighted_nodes"] == numbers["integer_kernels"] == 3
    ops = [node.op_type for node in ir.load(packed).graph]
    assert ops.count("MatMulNBits") == 3 and "DequantizeLinear" not in ops
    np.testing.assert_array_equal(run(packed), run(plain))
    for expected, found in zip(weights(plain), weights(packed), strict=True):
        np.testing.assert_array_equal(expected, found)


def test_tables_of_four_bits(tmp_path: Path) -> None:
    path = models.save(add_weights(READER, SHAPES), tmp_path / "reader.onnx")
    four, eight = tmp_path / "four.onnx", tmp_path / "eight.onnx"
    options = {"recipe": "int4-weights", "target": "cpu", "weights": "int4:32"}
    result = onnxq.quantize(path, [TOKENS], output=four, embeddings="int4", **options)
    assert result.numbers["embeddings"] == "int4" and not result.numbers["left_float"]
    assert "embeddings int4 per block" in " ".join(plain_lines(result.numbers))
    onnxq.quantize(path, [TOKENS], output=eight, **options)
    saved = ROWS * (WIDTH / 2 + 4 - WIDTH // 32 * 4)  # half a byte for each number, two scales for each row
    assert eight.stat().st_size - four.stat().st_size == pytest.approx(saved, abs=1000)
    table = add_weights(READER, SHAPES).graph.initializers["table"].const_value.numpy()  # type: ignore[union-attr]
    stripped = retarget.strip(four)
    lookup = next(node for node in stripped.graph if node.op_type == "Gather")
    assert 18 < sqnr_db(table, lookup.inputs[0].const_value.numpy()) < 30  # type: ignore[union-attr]
    models.save(stripped, tmp_path / "float.onnx")
    assert sqnr_db(run(four), run(tmp_path / "float.onnx")) > 35  # the products round what they read to 8 bits
    again = retarget.retarget(four, "cpu").model
    assert sqnr_db(run(four), run(again)) > 35
    assert [node.op_type for node in retarget.retarget(four, "tensorrt").model.graph].count("Gather") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt"}, "MatMulNBits is onnxruntime's own"),
        ({"target": "cpu", "weights": "int4"}, "expected weights in blocks"),
        ({"target": "tensorrt", "packed_blocks": False, "embeddings": "int4"}, "found int4: an engine"),
    ],
)
def test_where_there_are_no_packed_codes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = models.save(add_weights(READER, SHAPES), tmp_path / "reader.onnx")
    with pytest.raises(OnnxqError, match=message):
        onnxq.quantize(path, [TOKENS], **{"recipe": "int4-weights", "packed_blocks": True} | options)


MLPS = {
    "behind it a Relu": (
        "float[N,3,64] x) => (float[N,3,64] y) { a = MatMul (x, w0) b = Relu (a) c = MatMul (b, w1) y = Relu (c) }",
        {"w0": (64, 96), "w1": (96, 64)},
    ),
    "behind it a Clip": (
        "float[N,3,64] x) => (float[N,3,64] y) { a = MatMul (x, w0) b = Clip (a, low) y = MatMul (b, w1) }",
        {"w0": (64, 96), "w1": (96, 64), "low": ()},
    ),
    "transposed": (
        "float[N,64] x) => (float[N,64] y) { a = Gemm <transB = 1> (x, w0, b0) b = Gelu (a) "
        "y = Gemm <transB = 1> (b, w1, b1) }",
        {"w0": (96, 64), "w1": (64, 96), "b0": (96,), "b1": (64,)},
    ),
    "read twice": (
        "float[N,3,64] x) => (float[N,3,64] y) { a = MatMul (x, w0) b = Tanh (a) c = MatMul (b, w0) y = Add (c, a) }",
        {"w0": (64, 64)},
    ),
    "with a factor": (
        "float[N,64] x) => (float[N,64] y) { a = Gemm <transB = 1, alpha = 0.5> (x, w0) b = Gelu (a) "
        "y = Gemm <alpha = 2.0> (b, w1) }",
        {"w0": (96, 64), "w1": (96, 64)},
    ),
    "no bias": (
        "float[N,64] x) => (float[N,64] y) { a = Gemm <transB = 1> (x, w0) b = Tanh (a) "
        "y = Gemm <transB = 1> (b, w1) }",
        {"w0": (72, 64), "w1": (64, 72)},  # 72 rows end within a block
    ),
}


@pytest.mark.parametrize("weights", ["int4:32", "uint4:32", "int4", "uint4", "int8", "uint8", "int6"])
@pytest.mark.parametrize("network", MLPS)
def test_products_that_onnxruntime_would_dequantize_in_every_run(network: str, weights: str, tmp_path: Path) -> None:
    text, shapes = MLPS[network]
    path = models.save(add_weights('<ir_version: 10, opset_import: ["" : 21]> g (' + text, shapes), tmp_path / "m.onnx")
    axes = (5, 3, 64) if "N,3" in text else (5, 64)
    feed = {"x": np.random.default_rng(4).normal(size=axes).astype(np.float32)}
    output = tmp_path / "codes.onnx"
    options = {"recipe": "int8", "target": "cpu", "weights": weights, "activations": "float"}
    numbers = onnxq.quantize(path, [feed], output=output, **options).numbers
    assert numbers["quantized_nodes"] == numbers["integer_kernels"] == numbers["weighted_nodes"] == 2
    meant = Session(retarget.strip(output)).run(feed)[0]
    assert sqnr_db(meant, Session(output).run(feed)[0]) > 35  # the kernel rounds what it reads to 8 bits
    assert sqnr_db(Session(path).run(feed)[0], meant) > {"4": 12, "6": 25, "8": 35}[weights.strip("uint")[0]]
