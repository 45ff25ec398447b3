"""Whatever network comes: rewrites keep its function, and what is written passes checker, lint and onnxruntime."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import networks

import onnxq
from onnxq import model as models
from onnxq import targets
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

EXAMPLES = int(os.environ.get("ONNXQ_RANDOM_GRAPHS", "25"))
often = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def inputs_for(model: ir.Model) -> dict[str, np.ndarray]:
    sizes = [size if isinstance(size, int) else 2 for size in model.graph.inputs[0].shape or ()]
    return {"x": np.random.default_rng(0).standard_normal(sizes).astype(np.float32)}


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@often
@given(model=networks())
def test_rewrites_keep_the_function(target: str, model: ir.Model) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        ir.save(model, path)
        feed = inputs_for(model)
        expected = Session(str(path), optimize=False).run(feed)
        loaded = models.load(path)
        targets.get(target).prepare(loaded)
        found = Session(loaded, optimize=False).run(feed)
    for wanted, value in zip(expected, found, strict=True):
        scale = max(float(np.abs(wanted).max()), 1e-6)
        np.testing.assert_allclose(value / scale, wanted / scale, atol=2e-4)


@often
@given(
    model=networks(),
    target=st.sampled_from(["cpu", "tensorrt"]),
    recipe=st.sampled_from(
        ["int8", "int8-minmax", "int8-dynamic", "fp8", "int4-weights", "rex", "powerquant", "smoothquant"]
    ),
)
def test_quantized_networks_are_legal_and_repeatable(model: ir.Model, target: str, recipe: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        ir.save(model, path)
        feed = inputs_for(model)
        feeds = [{"x": feed["x"] * scale} for scale in (1, 2)]
        try:
            result = onnxq.quantize(path, feeds, output=Path(folder) / "a.onnx", target=target, recipe=recipe)
        except OnnxqError as error:
            assert "defect" not in str(error) + (error.hint or ""), error
            assert "that it refuses" not in str(error), error  # onnxruntime runs the float model, see the test above
            assert [file.name for file in Path(folder).iterdir()] == ["float.onnx"], "something was left behind"
            return
        written = onnx.load(result.numbers["output"])
        onnx.checker.check_model(written, full_check=True)
        findings = targets.get(target).lint(models.read(Path(folder) / "a.onnx"))
        assert not [item for item in findings if item.severity == "error"]
        optimize = recipe != "fp8"  # onnxruntime's optimiser makes kernels of FP8 pairs that it then refuses
        for value in Session(str(Path(folder) / "a.onnx"), optimize=optimize).run(feed):
            assert np.isfinite(value).all()
        onnxq.quantize(path, feeds, output=Path(folder) / "b.onnx", target=target, recipe=recipe)
        assert (Path(folder) / "a.onnx").read_bytes() == (Path(folder) / "b.onnx").read_bytes()
        with pytest.raises(OnnxqError, match="float"):
            onnxq.quantize(Path(folder) / "a.onnx", feeds, target=target, recipe=recipe)
