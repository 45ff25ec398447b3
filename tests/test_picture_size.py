"""Detectors that are told the size of their picture, as RT-DETR and PaddleDetection's are, need a picture alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS
from PIL import Image
from typer.testing import CliRunner

import onnxq
from onnxq.calibration.data import InputSpec
from onnxq.calibration.noise import Noise
from onnxq.calibration.picture_size import apart, told
from onnxq.cli import app
from onnxq.kinds import Kind, kind_of

PICTURE = InputSpec("image", np.dtype(np.float32), (None, 3, 64, 48))


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """Our classifier, whose answer is multiplied by the size of the target, which is its first input."""
    model = ir.load(MODELS / "fashion_resnet.onnx")
    graph, tape = model.graph, ir.tape.Tape()
    sizes = ir.Value(name="orig_target_sizes", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", 2]))
    scores = graph.outputs[0]
    largest = tape.op("ReduceMax", [tape.op("Cast", [sizes], {"to": ir.DataType.FLOAT})], {"keepdims": 0})
    boxes = tape.op("Mul", [scores, largest])
    boxes.name, boxes.type, boxes.shape = "boxes", scores.type, scores.shape
    graph.extend(tape.nodes)
    graph.outputs[0] = boxes
    graph.inputs.insert(0, sizes)
    ir.save(model, tmp_path / "detector.onnx")
    return tmp_path / "detector.onnx"


@pytest.mark.parametrize(
    ("name", "dtype", "row"),
    [
        ("orig_target_sizes", np.int64, [64, 48]),
        ("im_shape", np.float32, [64.0, 48.0]),
        ("scale_factor", np.float32, [1.0, 1.0]),
    ],
)
def test_what_follows_from_a_picture(name: str, dtype: type, row: list[float]) -> None:
    spec = InputSpec(name, np.dtype(dtype), (None, 2))
    assert apart([spec, PICTURE]) == ([PICTURE], [spec])
    found = told([spec], 64, 48)[name]
    assert found.dtype == dtype and found.tolist() == row
    sample = next(iter(Noise([spec, PICTURE], count=1, seed=0)))
    assert sample[name].tolist() == row and sample["image"].shape == (3, 64, 48)


def test_other_inputs_do_not_follow() -> None:
    tokens = InputSpec("input_ids", np.dtype(np.int64), (None, 2))
    wide = InputSpec("sizes", np.dtype(np.int64), (None, 4))
    for specs in ([tokens, PICTURE], [wide, PICTURE], [InputSpec("sizes", np.dtype(np.int64), (None, 2))]):
        assert apart(specs) == (specs, [])


def test_a_folder_of_images_is_enough(tmp_path: Path, detector: Path) -> None:
    assert kind_of(onnxq.load(detector)) is Kind.CNN
    (tmp_path / "images").mkdir()
    x = np.load(MODELS / "fashion_calibration.npz")["x"][:16]
    for index, image in enumerate(x):
        Image.fromarray(np.rint((image[0] + 1) * 127.5).astype(np.uint8)).save(tmp_path / "images" / f"{index:02}.png")
    (tmp_path / "settings.yaml").write_text("preprocess: {resize: squash, mean: [0.5], std: [0.5]}\n")
    asked = ["quantize", str(detector), "--data", str(tmp_path / "images"), "--config", str(tmp_path / "settings.yaml")]
    done = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "folder.onnx")])
    assert done.exit_code == 0, done.output
    sizes = np.full((16, 2), 28, np.int64)
    onnxq.quantize(detector, [{"x": x, "orig_target_sizes": sizes}], output=tmp_path / "array.onnx")
    graphs = [ir.load(tmp_path / name).graph for name in ("folder.onnx", "array.onnx")]
    scales = [
        {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value is not None}
        for graph in graphs
    ]
    for name, scale in scales[0].items():
        np.testing.assert_allclose(scale, scales[1][name], rtol=1e-5)


def test_pictures_are_made_and_told_of(tmp_path: Path, detector: Path) -> None:
    made = onnxq.quantize(detector, samples=16, budget="quick")
    assert "made from the model itself" in made.numbers["samples_from"] and not made.numbers["warnings"]
    assert made.numbers["sqnr_db"] > 20
    asked = ["synthesize", str(detector), "-n", "4", "--budget", "quick", "-o", str(tmp_path / "made.npz")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    arrays = np.load(tmp_path / "made.npz")
    assert arrays["x"].shape == (4, 1, 28, 28) and (arrays["orig_target_sizes"] == 28).all()
    onnxq.quantize(detector, tmp_path / "made.npz", output=tmp_path / "out.onnx")
