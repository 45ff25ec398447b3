"""The models that come with the project are what models/README.md says, and the exporter keeps BatchNorm."""

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxq.errors import OnnxqError

MODELS = Path(__file__).parent.parent / "models"
MODEL = MODELS / "fashion_resnet.onnx"
README = (MODELS / "README.md").read_text(encoding="utf-8")
LARGEST_FILE_BYTES = 6_000_000


@pytest.fixture(scope="module")
def graph() -> onnx.GraphProto:
    return onnx.load(MODEL).graph


@pytest.fixture(scope="module")
def export():
    pytest.importorskip("torch", reason="the exporter needs torch: pip install 'onnxq[learn]'")
    specification = importlib.util.spec_from_file_location("models_export", MODELS / "export.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def described_files() -> list[Path]:
    """What the first table of the README lists; the folder may also hold what a user made in it."""
    return [MODELS / name for name in re.findall(r"^\| `([\w.]+)` \|", README.partition("## ")[0], re.MULTILINE)]


def test_readme_describes_the_shipped_files():
    names = {file.name for file in described_files()}
    assert names >= {file.name for file in MODELS.glob("*.py")}
    assert names >= {"fashion_resnet.onnx", "fashion_calibration.npz", "fashion_test.npz"}


@pytest.mark.parametrize("file", described_files(), ids=lambda file: file.name)
def test_every_file_is_small(file):
    assert 0 < file.stat().st_size < LARGEST_FILE_BYTES


def test_classifier_is_valid_onnx_at_opset_21():
    model = onnx.load(MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21}


def test_classifier_has_the_operators_of_its_blocks(graph):
    counts = Counter(node.op_type for node in graph.node)
    assert counts["BatchNormalization"] == counts["Conv"] == 15
    assert {"Add", "Clip", "Concat", "MaxPool", "AveragePool", "Gemm"} <= counts.keys()


def test_classifier_has_a_dynamic_batch(graph):
    shapes = [
        [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (graph.input[0], graph.output[0])
    ]
    assert shapes == [["batch", 1, 28, 28], ["batch", 10]]


@pytest.mark.parametrize("file", sorted(MODELS.glob("fashion_*.*")), ids=lambda file: file.name)
def test_no_file_names_a_place_on_the_machine_it_was_made_on(file):
    content = file.read_bytes()
    assert [
        place for place in (b"/root", b"/home", b"/work", b"/usr", b"/tmp/", b"site-packages") if place in content
    ] == []


def test_classifier_is_as_accurate_as_the_readme_says():
    with np.load(MODELS / "fashion_test.npz") as test:
        images, labels = test["x"], test["labels"]
    claim = re.search(r"(\d+) of 1,000", README)
    logits = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"]).run(None, {"x": images})[0]
    assert len(images) == 1000
    assert int((logits.argmax(1) == labels).sum()) == int(claim.group(1))


def test_images_are_what_the_model_was_trained_on():
    with np.load(MODELS / "fashion_calibration.npz") as calibration, np.load(MODELS / "fashion_test.npz") as test:
        assert calibration.files == ["x"]
        assert calibration["x"].shape == (128, 1, 28, 28)
        assert test["labels"].dtype == np.int64
        for images in (calibration["x"], test["x"]):
            assert images.dtype == np.float32
            assert (images.min(), images.max()) == (-1, 1)
        shown = {image.tobytes() for image in calibration["x"]}
        assert not any(image.tobytes() in shown for image in test["x"])


def tiny_network():
    import torch

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )
    network(torch.randn(16, 3, 8, 8))  # running statistics other than 0 and 1
    return network


def test_export_keeps_batchnorm_and_agrees_with_torch(export, tmp_path):
    import torch

    network, path = tiny_network(), tmp_path / "tiny.onnx"
    export.export_keeping_batchnorm(network, (torch.randn(1, 3, 8, 8),), path, input_names=["x"], output_names=["y"])
    assert network.training  # left as it was
    model = onnx.load(path, load_external_data=False)
    assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.onnx"]
    kept = {entry.key for node in model.graph.node for entry in node.metadata_props}
    assert kept == set(export.KEPT_METADATA)
    images = torch.randn(7, 3, 8, 8)
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["y"], {"x": images.numpy()})[0]
    with torch.no_grad():
        expected = network.eval()(images).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_export_refuses_inputs_of_different_batch_sizes(export, tmp_path):
    import torch

    with pytest.raises(OnnxqError, match="one batch size"):
        export.export_keeping_batchnorm(tiny_network(), (torch.zeros(2, 3), torch.zeros(4)), tmp_path / "tiny.onnx")
    assert list(tmp_path.iterdir()) == []


def test_export_reads_shapes(export):
    import torch

    generator = torch.Generator().manual_seed(0)
    assert export.example_input("2x3", generator).shape == (2, 3)
    assert export.example_input("4:int64", generator).dtype == torch.int64
    for wrong in ("", "1x", "0x3", "1,3", "1x3:text"):
        with pytest.raises(OnnxqError, match="expected a shape"):
            export.example_input(wrong, generator)


def test_export_script_tells_a_user_what_is_wrong_in_one_line(tmp_path):
    pytest.importorskip("torch", reason="the exporter needs torch: pip install 'onnxq[learn]'")
    command = [sys.executable, MODELS / "export.py", "no_such_module:make", "--shape", "1x3", "-o", tmp_path / "a.onnx"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].startswith("error: expected a module no_such_module")
    assert "Traceback" not in result.stderr
