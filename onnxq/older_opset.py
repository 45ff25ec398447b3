"""The result at an older opset: proven to answer as it did."""

from __future__ import annotations

import onnx_ir as ir

from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.passes.lower_opset import LowerOpset
from onnxq.report.metrics import OutputsSqnr, padded_alike
from onnxq.report.quality import is_float
from onnxq.runtime import Session

LEAST_SQNR_DB = 10.0  # a norm written as its sums may round a few codes to the other side


def write_at(job: Job, opset: int) -> None:
    """Lower the job's model and its subgraphs, after they have been checked, and run each beside what it was.

    Raises:
        OnnxqError: one cannot be written there, or gives something else.
    """
    for model in (job.model, *(subgraph.model for subgraph in job.subgraphs)):
        _lower(model, opset, job)


def _lower(model: ir.Model, opset: int, job: Job) -> None:
    assert job.recording is not None
    feed, device = job.recording.first_feed, job.settings.device
    before = Session(model, optimize=False, device=device).run(feed)
    LowerOpset(opset, required=True)(model)
    ratio, after = OutputsSqnr(), Session(model, optimize=False, device=device)
    for name, wanted, found in zip(after.output_names, before, after.run(feed), strict=True):
        if is_float(wanted):
            ratio.update(name, *padded_alike(wanted, found))
    if ratio.value is not None and not ratio.value > LEAST_SQNR_DB:
        raise OnnxqError(
            f"expected the same answers at opset {opset}, found some that differ (SQNR {ratio.value:.1f} dB)",
            hint="this is a defect of onnxq; take the result without --opset for now, and report it",
        )
