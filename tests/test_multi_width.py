"""Training all widths at once: narrow ones gain, and what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxq
from onnxq.calibration import calibrate, observers
from onnxq.calibration.data import input_specs, open_source
from onnxq.config import Settings
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.progress import Progress
from onnxq.runtime import Session
from onnxq.targets import get
from onnxq.weights.masters import WIDTHS, attach_tables, export_width

pytest.importorskip("torch", reason="training needs torch: pip install 'onnxq[learn]'")

import torch

from onnxq.autograd.interpreter import TorchGraph
from onnxq.learning.multi_width import WidthsStudent
from onnxq.learning.quantizers import find, read, store


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_what_is_exported_is_what_was_trained(network: Path, calibration: Path, target: str) -> None:
    """A student whose steps have moved gives at every width what onnxruntime gives on the model of that width."""
    model = onnxq.load(network)
    chosen = get(target)
    source = open_source(calibration, input_specs(model))
    job = Job(model, chosen, chosen.scheme("int8", None), Settings(target=target), source, Progress())
    job.prepare()
    job.insert()
    calibrate.set_activation_scales(model, job.record(), observers.get("minmax"))
    calibrate.set_weight_scales(model)
    student = WidthsStudent(TorchGraph(model), find(model.graph), learn_weights=True, learn_steps=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*student.steps(), *student.masters.values()]:
            tensor.mul_(1 + 0.03 * torch.randn(tensor.shape, generator=generator))
        for by_width in student.narrow.values():
            for weight in by_width.values():
                weight.log_step.add_(0.1 * torch.randn(weight.log_step.shape, generator=generator))
    x = np.load(calibration)["x"]
    given = {"x": torch.from_numpy(x)}
    with torch.no_grad():
        expected = {
            bits: student.run_at(dict.fromkeys(student.narrow, bits), given, ["logits"])["logits"].numpy()
            for bits in WIDTHS
        }
    tables = student.tables()
    store(student.graph, student.learned())
    job.lower()
    attach_tables(model, tables)
    for bits in (2, 4, 8):
        exported = model.clone()
        export_width(exported, bits)
        found = Session(exported, optimize=False).run({"x": x}, ["logits"])[0]
        # An activation on a rounding boundary may fall either way; nearly all agree to the last digits.
        close = np.isclose(found, expected[bits], atol=1e-4 * np.abs(expected[bits]).max())
        assert close.mean() > 0.8, bits


@pytest.mark.parametrize("distil", ["blocks", "network"])
def test_narrow_widths_gain_from_training(network: Path, calibration: Path, distil: str) -> None:
    sqnr = {}
    for train in (False, True):
        knobs = {"train": train, "distil": distil, "steps": 60, "weight_rate": 1e-3, "step_rate": 1e-2}
        result = onnxq.quantize(network, calibration, recipe="multiquant", knobs=knobs)
        for bits in (2, 3, 8):
            exported = result.model.clone()
            export_width(exported, bits)
            found = onnxq.compare(network, exported, calibration, layers=False, latency=False)
            sqnr[train, bits] = found.sqnr_db
    assert sqnr[True, 2] > sqnr[False, 2] + 0.5
    assert sqnr[True, 3] > sqnr[False, 3]


def test_the_same_seed_trains_the_same_model(network: Path, calibration: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.onnx" for number in range(2)]
    for path in paths:
        knobs = {"train": True, "steps": 5}
        onnxq.quantize(network, calibration, recipe="multiquant", knobs=knobs, output=path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(("knob", "value"), [("own_labels", 1.5), ("distil", "layers")])
def test_what_is_wrong_is_said(network: Path, calibration: Path, knob: str, value: object) -> None:
    with pytest.raises(OnnxqError, match=knob):
        onnxq.quantize(network, calibration, recipe="multiquant", knobs={"train": True, knob: value})


@pytest.mark.parametrize("distil", ["blocks", "network"])
def test_the_teacher_keeps_the_float_networks_biases(
    network: Path, calibration: Path, distil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's start where they take back the mean shift of its weights, which were the teacher's too."""
    from onnxq.learning import multi_width

    learn, given = multi_width.finetune, np.load(calibration)["x"]
    taught: list[np.ndarray] = []
    moved: list[float] = []

    def noting(student: WidthsStudent, *arguments: Any, **options: Any) -> Any:
        for name, start in student.masters.items():
            moved.extend([float((start - read(student.graph, name)).abs().max())] if start.ndim == 1 else [])
        if not taught:
            with torch.no_grad():
                taught.append(student.teach({"x": torch.from_numpy(given)}, ["logits"])["logits"].numpy())
        return learn(student, *arguments, **options)

    monkeypatch.setattr(multi_width, "finetune", noting)
    onnxq.quantize(network, calibration, recipe="multiquant", knobs={"steps": 1, "distil": distil})
    np.testing.assert_allclose(taught[0], Session(network).run({"x": given}, ["logits"])[0], rtol=1e-4, atol=1e-4)
    assert moved and max(moved) > 1e-5
