"""Weights that onnxruntime's own ops hold as packed blocks: read exactly, and brought to either target."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import add_weights, sqnr_db

from onnxq import model as models
from onnxq import retarget
from onnxq.errors import OnnxqError
from onnxq.passes.raise_packed_blocks import unpack
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
