"""Scales of blocks below zero: less error, and errors of a column that cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import model as models
from onnxq import retarget, targets
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration.signed_scales import signed
from onnxq.calibration.weight_ranges import best_of_few
from onnxq.formats import FORMATS
from onnxq.runtime import Session

INT4 = FORMATS["int4"]
ROWS, WIDTH, SIZE = 1024, 512, 32
# Without biases that could take a mean error back, and a Relu before the second product.
MODEL = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,4,128] x) => (float[N,4,128] y) { a = MatMul (x, w0) b = Relu (a) y = MatMul (b, w1) }"""


def rounded(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    found: np.ndarray = fake_quantize(blocks, scale, np.zeros(len(scale), np.int8), INT4, axis=0)
    return found


@pytest.mark.parametrize("draw", ["standard_normal", "random"])
def test_errors_are_smaller_and_cancel(draw: str) -> None:
    generator = np.random.default_rng(0)
    values = getattr(generator, draw)((ROWS * WIDTH // SIZE, SIZE)).astype(np.float32)
    blocks = values if draw == "standard_normal" else 2 * values - 1
    before, _ = scale_and_zero_point(*best_of_few(blocks, INT4, True), INT4, symmetric=True)
    after = signed(blocks, before, INT4)
    assert 0.2 < np.mean(after < 0) < 0.55
    errors = [blocks - rounded(blocks, scale) for scale in (before, after)]
    assert np.all((errors[1] ** 2).sum(axis=1) <= (errors[0] ** 2).sum(axis=1) * (1 + 1e-5))
    assert sqnr_db(blocks, rounded(blocks, after)) > sqnr_db(blocks, rounded(blocks, before)) + 0.15
    sums = [error.reshape(ROWS, WIDTH).sum(axis=1) for error in errors]
    skewed, even = (abs(item.mean()) / item.std() for item in sums)
    assert skewed > 0.25 and even < 0.1


def test_empty_blocks_keep_a_scale_that_divides() -> None:
    blocks = np.zeros((3, SIZE), np.float32)
    blocks[1, 4], blocks[2, 7] = 1e-42, 2.0
    scale = signed(blocks, np.full(3, 0.3, np.float32), INT4)
    assert scale[0] == scale[1] == np.float32(0.3) and scale[2] == -0.25  # 2 is the lowest code, exactly


def quantized(path: Path, output: Path, target: str, **options: Any) -> np.ndarray:
    data = [{"x": np.random.default_rng(1).normal(size=(8, 4, 128)).astype(np.float32)}]
    options = {"recipe": "int4-weights", "weights": "int4:32"} | options
    onnxq.quantize(path, data, output=output, target=target, **options)
    model = ir.load(output)
    found = [value.const_value.numpy() for name, value in model.graph.initializers.items() if "_s" in name]  # type: ignore[union-attr]
    return np.concatenate([array.reshape(-1) for array in found])


@pytest.mark.parametrize("recipe", ["int4-weights", "gptq", "awq"])
def test_a_cpu_has_them_and_tensorrt_has_not(recipe: str, tmp_path: Path) -> None:
    path = models.save(add_weights(MODEL, {"w0": (128, 256), "w1": (256, 128)}), tmp_path / "float.onnx")
    feed = {"x": np.random.default_rng(2).normal(size=(8, 4, 128)).astype(np.float32)}
    exact = Session(path).run(feed)[0]
    kept = {}
    for target in ("cpu", "tensorrt"):
        output = tmp_path / f"{target}.onnx"
        scales = quantized(path, output, target, recipe=recipe)
        assert np.any(scales < 0) == (target == "cpu") and np.all(scales != 0)
        kept[target] = sqnr_db(exact, Session(retarget.strip(output)).run(feed)[0])
        assert not [item for item in targets.get(target).lint(models.read(output)) if item.severity == "error"]
    assert kept["cpu"] > kept["tensorrt"] + 0.3
    again = models.save(retarget.retarget(tmp_path / "cpu.onnx", "cpu").model, tmp_path / "again.onnx")
    np.testing.assert_array_equal(Session(again).run(feed)[0], Session(tmp_path / "cpu.onnx").run(feed)[0])
    moved = models.save(retarget.retarget(tmp_path / "cpu.onnx", "tensorrt").model, tmp_path / "moved.onnx")
    assert sqnr_db(exact, Session(moved).run(feed)[0]) > kept["tensorrt"] - 3  # the lowest code of some becomes 7
    assert not [item for item in targets.get("tensorrt").lint(models.read(moved)) if item.severity == "error"]


def test_zero_points_need_no_sign(tmp_path: Path) -> None:
    path = models.save(add_weights(MODEL, {"w0": (128, 256), "w1": (256, 128)}), tmp_path / "float.onnx")
    assert np.all(quantized(path, tmp_path / "out.onnx", "cpu", weights="uint4:32") > 0)
