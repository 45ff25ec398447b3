"""Models that read pictures as bytes, rows first, and normalise them themselves, as those for phones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS, NETWORK, SHAPES, add_weights
from PIL import Image
from typer.testing import CliRunner

import onnxq
from onnxq.calibration.data import InputSpec
from onnxq.calibration.noise import Noise
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.folding import new_initializer

FASHION = MODELS / "fashion_resnet.onnx"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """Our classifier of clothes behind bytes [batch, 28, 28, 1], which it wants between -1 and 1."""
    model = ir.load(FASHION)
    graph, tape = model.graph, ir.tape.Tape()
    floats = graph.inputs[0]
    picture = ir.Value(name="picture", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["batch", 28, 28, 1]))
    half = new_initializer(graph, "half", np.asarray(127.5, np.float32), ir.DataType.FLOAT)
    planar = tape.op("Cast", [tape.op("Transpose", [picture], {"perm": [0, 3, 1, 2]})], {"to": ir.DataType.FLOAT})
    ir.convenience.replace_all_uses_with(floats, tape.op("Div", [tape.op("Sub", [planar, half]), half]))
    graph.insert_before(graph[0], tape.nodes)
    graph.inputs[0] = picture
    ir.save(model, tmp_path / "bytes.onnx")
    return tmp_path / "bytes.onnx"


def pictures(file: str) -> dict[str, np.ndarray]:
    arrays = dict(np.load(MODELS / file))
    arrays["picture"] = np.rint((arrays.pop("x") + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return arrays


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_folder_of_images_is_read_as_bytes(tmp_path: Path, network: Path, target: str) -> None:
    """The same images in a folder and in an array give the same file."""
    (tmp_path / "images").mkdir()
    chosen = pictures("fashion_calibration.npz")["picture"][:32]
    for index, image in enumerate(chosen):
        Image.fromarray(image[..., 0]).save(tmp_path / "images" / f"{index:02}.png")
    (tmp_path / "settings.yaml").write_text("preprocess: {resize: squash}\n")
    asked = ["quantize", str(network), "--data", str(tmp_path / "images"), "--config", str(tmp_path / "settings.yaml")]
    done = CliRunner().invoke(app, [*asked, "--target", target, "-o", str(tmp_path / "folder.onnx")])
    assert done.exit_code == 0, done.output
    made = onnxq.quantize(network, [{"picture": chosen}], target=target, output=tmp_path / "array.onnx")
    assert made.numbers["sqnr_db"] > 25
    folder, array = (ir.load(tmp_path / name).graph for name in ("folder.onnx", "array.onnx"))
    assert folder.initializers.keys() == array.initializers.keys()
    for name, value in folder.initializers.items():
        other = array.initializers[name].const_value
        assert value.const_value is not None and other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())


def test_bytes_are_made_from_the_model_itself(tmp_path: Path, network: Path) -> None:
    """Without data, nearly what real pictures give; the file still reads bytes."""
    test = pictures("fashion_test.npz")
    agreement = []
    for data in (None, [{"picture": pictures("fashion_calibration.npz")["picture"]}]):
        made = onnxq.quantize(network, data, samples=32, budget="quick", target="cpu", output=tmp_path / "out.onnx")
        read = ir.load(tmp_path / "out.onnx").graph.inputs[0]
        assert read.dtype == ir.DataType.UINT8 and not made.numbers["warnings"]
        agreement.append(onnxq.compare(network, tmp_path / "out.onnx", [test], layers=False, latency=False).agreement)
    assert agreement[0] > 0.97 and agreement[0] > agreement[1] - 0.02


def test_noise_for_bytes_is_grey_and_other_integers_are_refused() -> None:
    picture = InputSpec("x", np.dtype(np.uint8), (1, 32, 32, 3))
    drawn = np.stack([sample["x"] for sample in Noise([picture], count=8, seed=0)])
    assert drawn.dtype == np.uint8 and abs(drawn.mean() - 128) < 3 and 55 < drawn.std() < 65
    for spec in (InputSpec("x", np.dtype(np.uint8), (1, 128)), InputSpec("x", np.dtype(np.int64), (1, 32, 32, 3))):
        with pytest.raises(OnnxqError, match="expected calibration data"):
            Noise([spec], count=8, seed=0)


def test_a_folder_of_images_serves_float16(tmp_path: Path) -> None:
    model = add_weights(NETWORK, SHAPES)
    graph = model.graph
    old = graph.inputs[0]
    new = ir.Value(name="half", type=ir.TensorType(ir.DataType.FLOAT16), shape=old.shape)
    tape = ir.tape.Tape()
    ir.convenience.replace_all_uses_with(old, tape.op("Cast", [new], {"to": ir.DataType.FLOAT}))
    graph.insert_before(graph[0], tape.nodes)
    graph.inputs[0] = new
    ir.save(model, tmp_path / "half.onnx")
    (tmp_path / "images").mkdir()
    for index in range(8):
        Image.new("RGB", (20, 30), (30 * index, 9, 200)).save(tmp_path / "images" / f"{index}.png")
    made = onnxq.quantize(tmp_path / "half.onnx", tmp_path / "images", output=tmp_path / "out.onnx")
    assert made.numbers["samples"] == 8
