"""A side-car of statistics in the place of BatchNormalization: what is in it, what it is good for, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS
from typer.testing import CliRunner

import onnxq
from onnxq import OnnxqError
from onnxq import model as models
from onnxq.calibration import side_car
from onnxq.calibration.data import input_specs, open_source
from onnxq.cli import app
from onnxq.passes.fold_batchnorm import FoldBatchNorm

CALIBRATION = MODELS / "fashion_calibration.npz"


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped classifier without BatchNormalization, as most exports are."""
    model = models.load(MODELS / "fashion_resnet.onnx")
    FoldBatchNorm()(model)
    assert not any(node.op_type == "BatchNormalization" for node in model.graph)
    path = tmp_path_factory.mktemp("folded") / "folded.onnx"
    ir.save(model, path)
    return path


def test_it_holds_what_channels_are_over_all_samples(network: Path) -> None:
    model = models.load(network)
    rows = np.random.default_rng(0).standard_normal((10, 3, 16, 16)).astype(np.float32)
    source = open_source([{"x": rows}], input_specs(model), None)
    arrays = side_car.record(model, source)
    assert side_car.tapped(model.graph) == ["c1", "c2"]
    weight = model.graph.initializers["w1"].const_value.numpy()  # type: ignore[union-attr]
    padded = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    values = np.einsum("nchwij,ocij->nohw", windows, weight)
    np.testing.assert_allclose(arrays["c1/mean"], values.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(arrays["c1/deviation"], values.std((0, 2, 3)), rtol=1e-4)


def test_a_folded_model_is_calibrated_by_it(folded: Path, tmp_path: Path) -> None:
    """From the command line: random inputs without the file, inputs that meet its statistics with it."""
    pytest.importorskip("torch", reason="synthesis needs torch: pip install 'onnxq[learn]'")
    file, run = tmp_path / "statistics.npz", CliRunner()
    found = run.invoke(app, ["statistics", str(folded), "--data", str(CALIBRATION), "-n", "64", "-o", str(file)])
    assert found.exit_code == 0 and "over 64 samples" in found.output
    arguments = ["quantize", str(folded), "--budget", "quick", "-n", "16"]
    blind, told = tmp_path / "blind.onnx", tmp_path / "told.onnx"
    assert "random inputs" in run.invoke(app, [*arguments, "-o", str(blind)]).output
    found = run.invoke(app, [*arguments, "-o", str(told), "--statistics", str(file)])
    assert found.exit_code == 0 and "made from the model itself (pixels)" in found.output
    sqnr = []
    for path in (blind, told):
        numbers = tmp_path / "numbers.json"
        test = ["compare", str(folded), str(path), "--data", str(MODELS / "fashion_test.npz"), "-n", "256"]
        assert run.invoke(app, [*test, "--json", str(numbers)]).exit_code == 0
        sqnr.append(json.loads(numbers.read_text())["sqnr_db"])
    assert sqnr[1] > sqnr[0] + 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"nowhere/mean": np.zeros(3), "nowhere/deviation": np.ones(3)}, "such of 'nowhere'"),
        ({"c1/mean": np.zeros(3), "c1/deviation": np.ones(3)}, "each of the 32 channels of 'c1'"),
        ({"c1/mean": np.zeros(32)}, "a mean and a deviation"),
        ({"c1/mean": np.full(32, np.nan), "c1/deviation": np.ones(32)}, "finite means"),
        ({"c1/mean": np.zeros(32), "c1/deviation": -np.ones(32)}, "at least 0"),
    ],
)
def test_what_is_no_side_car_of_the_model_is_refused(
    arrays: dict[str, np.ndarray], message: str, network: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "statistics.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(OnnxqError, match=message):
        onnxq.quantize(network, statistics=str(tmp_path / "statistics.npz"))


def test_a_file_of_another_kind_is_refused(network: Path, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    for content in (b"", b"PK\x03\x04 no archive"):
        path.write_bytes(content)
        with pytest.raises(OnnxqError, match="expected an npz of statistics"):
            onnxq.quantize(network, statistics=str(path))
    with pytest.raises(OnnxqError, match="expected an npz of statistics"):
        onnxq.quantize(network, statistics=str(tmp_path / "missing.npz"))
