"""Which activations lie on one side of zero, so that symmetric codes waste half of what they have."""

from __future__ import annotations

from onnxq.calibration import calibrate
from onnxq.calibration.observers import Observer
from onnxq.job import Job
from onnxq.passes.shift_to_symmetric import ShiftToSymmetric, shiftable_layers
from onnxq.runtime import Session
from onnxq.targets.placement import schemes_of

SAMPLES = 64
LEAST_GAIN = 1.3  # of the step: 2.3 dB; a value in [-1, 2] is below it


def shift_one_sided(job: Job, observe: Observer) -> dict[str, float]:
    """Shift the activations that symmetric codes would waste codes on; the float function stays.

    Args:
        job: Its graph is prepared and has no Q/DQ yet.
        observe: How a range follows from statistics.

    Returns:
        What was added to each value, by name; empty where the target's codes need not be symmetric.
    """
    scheme_of = schemes_of(job.scheme, job.exceptions)
    left_float = job.place(job.model.graph).left_float
    specs = {}
    for item in shiftable_layers(job.model.graph):
        spec = scheme_of(item.node).activations
        if item.node.name not in left_float and spec.enabled and spec.symmetric and not spec.format.is_float:
            specs[item.activation.name or ""] = spec
    if not specs:
        return {}
    inputs = {item.name for item in job.specs}
    session = Session(job.model, taps=[name for name in specs if name not in inputs], device=job.settings.device)
    total = min(SAMPLES, len(job.source), job.settings.samples or SAMPLES)
    with job.progress.stage("shift", "Looking for one-sided activations", total) as advance:
        seen = calibrate.record(session, list(specs), job.source, job.specs, samples=total, on_batch=advance)
    shifts = {}
    for name, spec in specs.items():
        statistics = seen.statistics[name]
        around = observe(statistics, spec.format, True)
        beside = observe(statistics, spec.format, False)
        if max(-around.low, around.high) > LEAST_GAIN * (beside.high - beside.low) / 2 > 0:
            shifts[name] = -(beside.low + beside.high) / 2
    ShiftToSymmetric(shifts)(job.model)
    job.measurements["shifted_activations"] = len(shifts)
    return shifts
