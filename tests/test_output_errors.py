"""Errors of weights counted at the outputs of their layers: exact, and never worse than the weights' own search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import add_weights

import onnxq
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

pytest.importorskip("torch", reason="Hessians need torch: pip install 'onnxq[learn]'")

from onnxq.calibration.data import Iterables, input_specs
from onnxq.config import Settings
from onnxq.job import Job
from onnxq.learning.output_errors import output_errors
from onnxq.progress import Progress
from onnxq.targets import get
from onnxq.weights.float_weights import float_weights
from onnxq.weights.tables import fit, power_table

LAYERS = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,8,9,9] x) => (float[N,3,5] y)
<int64[3] rows = {0, 3, -1}>
{
    [grouped] a = Conv <group=2, pads=[1,1,1,1], strides=[2,2]> (x, w1)
    b = Relu (a)
    c = Reshape (b, rows)
    [product] y = MatMul (c, w2)
}
"""
SHAPES = {"w1": (12, 4, 3, 3), "w2": (100, 5)}


def job_of(weights: str) -> Job:
    model = add_weights(LAYERS, SHAPES)
    basis = np.random.default_rng(1).standard_normal((4, 8, 9, 9))
    rows = np.tensordot(np.random.default_rng(2).standard_normal((24, 4)), basis, 1).astype(np.float32)
    target = get("tensorrt")
    specs = input_specs(model)
    return Job(
        model, target, target.scheme(weights, "float"), Settings(), Iterables([{"x": rows}]), Progress(), specs
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["int4", "int4:tensor"])
def test_the_form_is_the_error_of_the_outputs(weights: str) -> None:
    """Changing a weight changes the layer's outputs by as much as the quadratic form says, for every row."""
    job = job_of(weights)
    found = float_weights(job)
    errors = output_errors(job, found, 24)
    assert sorted(errors) == ["w1", "w2"]
    x = np.concatenate([sample["x"][None] for sample in job.source])
    for weight, layer, axis in ((found[0], "a", 1), (found[1], "y", -1)):
        change = 0.1 * np.random.default_rng(3).standard_normal(weight.rows().shape).astype(np.float32)
        before = Session(job.model, taps=[layer]).run({"x": x}, [layer])[0]
        original = weight.value.const_value
        moved = (weight.rows() + change).reshape(-1)
        array = original.numpy()
        if weight.axis is not None:
            shape = np.moveaxis(array, weight.axis, 0).shape
            moved = np.moveaxis(moved.reshape(shape), 0, weight.axis)
        weight.value.const_value = type(original)(moved.reshape(array.shape).astype(np.float32), name=weight.name)
        difference = Session(job.model, taps=[layer]).run({"x": x}, [layer])[0] - before
        weight.value.const_value = original
        squared = np.square(np.moveaxis(difference, axis, 0).reshape(difference.shape[axis], -1), dtype=np.float64)
        expected = squared.mean(axis=1) if weight.axis is not None else squared.mean(axis=1).sum(keepdims=True)
        np.testing.assert_allclose(errors[weight.name](change, slice(0, len(change))), expected, rtol=2e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_never_leaves_more_error_than_without_data(bits: int) -> None:
    job = job_of("int4")
    curves, clips = (1.0, 1.25, 1.5, 2.0), (1.0, 0.8, 0.6)
    weights = float_weights(job)
    errors = output_errors(job, weights, 24)
    for weight in weights:
        rows, measure = weight.rows(), errors[weight.name]
        free, informed = (fit(rows, bits, curves, clips, 4.0, taken) for taken in (None, measure))
        difference = free.table.rounded(rows, free.scale) - rows
        assert informed.error <= measure(difference, slice(0, len(rows))).sum() * (1 + 1e-6)
    uniform = fit(rows, bits, (1.0,), (1.0,), 4.0, measure)
    np.testing.assert_array_equal(uniform.table.levels, power_table(bits, 1.0).levels)


def test_pnmq_with_samples_is_closer_than_without(network: Path, calibration: Path) -> None:
    sqnr = {}
    for samples in (0, 16):
        result = onnxq.quantize(
            network, calibration, recipe="pnmq", weights="int3", knobs={"output_samples": samples, "equalize": False}
        )
        sqnr[samples] = result.numbers["sqnr_db"]
    assert sqnr[16] > sqnr[0] + 0.5
    with pytest.raises(OnnxqError, match="output_samples"):
        onnxq.quantize(network, calibration, recipe="pnmq", knobs={"output_samples": -1})
