"""Does the result run, and how far is it from the float model? A few calibration samples tell."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import graph as graphs
from onnxq.calibration.data import row_count
from onnxq.calibration.text import without_padding
from onnxq.condensed import thinned
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.report.metrics import OutputsSqnr, Sqnr, padded_alike
from onnxq.report.quality import is_float, nothing_compared, size_warning
from onnxq.runtime import Feed, Session, integer_kernels, optimized_session
from onnxq.value_sizes import TAPPED_VALUES

Array = np.ndarray[Any, Any]
LATENCY_RUNS, PATIENCE_SECONDS = 5, 5.0  # whichever comes first
SILENCE = 64  # times less than its range, and an activation has two or three of 255 codes


@dataclass
class Check:
    """How the quantized model does in onnxruntime on a few calibration samples.

    Attributes:
        sqnr_db: All float outputs, each in its own size, against the float model.
        outputs: SQNR of each in dB, where there are several.
        optimized_nodes: Nodes that the CPU provider runs after its optimisations, by op.
        integer_kernels: How many of them compute on codes; ``None`` where no optimised session was made.
        layers: Error of each weighted op's input on the first sample, worst first.
        session: The optimised session, where the CPU is the target.
    """

    sqnr_db: float
    outputs: dict[str, float]
    optimized_nodes: dict[str, int]
    integer_kernels: int | None
    layers: list[dict[str, Any]] = field(default_factory=list)
    session: Session | None = None


def check(job: Job) -> Check:
    """Run the result beside the float model's kept outputs.

    INT8 for the CPU is judged optimised, as it is deployed. What is made for TensorRT, and FP8 everywhere, is
    judged literally: onnxruntime's optimiser is known to change FP8 graphs.

    Raises:
        OnnxqError: the result does not run, or gives NaN or infinity.
    """
    if job.recording is None:
        raise RuntimeError("record() comes before check()")
    float8 = graphs.holds_narrow_floats(job.model.graph)
    literal = job.target.name != "cpu" or float8
    with job.progress.stage("check", "Checking"):
        # Optimised, a large model is in memory whole: worth it only where that is how it is deployed.
        unseen = float8 or (job.is_large and job.target.name != "cpu")
        optimized, nodes = (None, Counter[str]()) if unseen else optimized_session(job.model)
        tapped = [name for name in job.recording.first_taps if name in graphs.values(job.model.graph)]
        inputs = {spec.name for spec in job.specs}
        inner = [name for name in tapped if name not in inputs]
        large = inner if sum(job.recording.first_sizes[name] for name in inner) > TAPPED_VALUES else ()
        reference = Session(
            job.model, taps=inner, condense=large, optimize=False, device=job.settings.device, arena=False
        )
        judged = reference if literal or optimized is None else optimized
        ratio, differing = OutputsSqnr(), dict[str, str]()
        for feed, expected in job.recording.kept:
            names = judged.output_names[: len(expected)]
            for name, wanted, found in zip(names, expected, judged.run(feed, names), strict=True):
                if not is_float(wanted):
                    continue
                if wanted.shape != found.shape:
                    differing[name] = size_warning(name)
                    wanted, found = padded_alike(wanted, found)
                ratio.update(name, without_padding(feed, wanted), without_padding(feed, found))
        job.warnings.extend(differing.values())
        if ratio.value is None:
            job.warnings.append(nothing_compared([value for _, outputs in job.recording.kept for value in outputs]))
        layers = _layer_errors(job, reference, inner)
    if ratio.not_finite:
        raise OnnxqError(
            "expected finite outputs of the quantized model, found NaN or infinity",
            hint="check that the float model itself stays finite, or --exclude the layers that overflow",
        )
    # The latency of a graph made for TensorRT says nothing when onnxruntime runs it on a CPU.
    deployed = optimized if job.target.name == "cpu" else None
    return Check(
        _decibels(ratio.value),
        {name: _decibels(value) for name, value in ratio.by_name.items()},
        dict(nodes),
        None if optimized is None else integer_kernels(nodes),
        layers,
        deployed,
    )


def _decibels(ratio: float | None) -> float:
    """A ratio of which nothing was compared (outputs that are no floats) has no noise."""
    return math.inf if ratio is None else ratio


def _layer_errors(job: Job, session: Session, names: list[str]) -> list[dict[str, Any]]:
    """How far the quantized model's inner values are from the float model's, on the first sample."""
    assert job.recording is not None
    if not names or not job.recording.kept:
        return []
    values = graphs.values(job.model.graph)
    expected = job.recording.first_taps
    layers = []
    for name, values_found in zip(names, session.run(job.recording.first_feed, names), strict=True):
        if _is_silent(job, name, expected[name]):
            continue
        ratio, found = Sqnr(), thinned(values_found)
        if is_float(found):
            ratio.update(*padded_alike(expected[name], found))
        producer = values[name].producer()
        layers.append(
            {
                "name": (producer.name if producer is not None else name) or name,
                "op": producer.op_type if producer is not None else "input",
                "value": name,
                "sqnr_db": _decibels(ratio.value),
            }
        )
    return sorted(layers, key=lambda layer: (layer["sqnr_db"], layer["name"]))


def _is_silent(job: Job, name: str, values: Array) -> bool:
    """Whether a sample leaves an activation nearly where its zero is: integers for its range say nothing of it then.

    A second of silence among speech, for instance, whose layers would seem the worst of all.
    """
    assert job.recording is not None
    seen, activations = job.recording.statistics.get(name), job.scheme.activations
    if seen is None or not activations.is_calibrated or activations.format.is_float or not values.size:
        return False
    return float(np.abs(values).max()) * SILENCE < max(abs(seen.low), abs(seen.high))


def bare_float_run(job: Job, path: Path, checked: Check) -> dict[str, float]:
    """What the float model costs alone: per sample on the kept feeds, scaled to all samples; and both latencies.

    Nothing for a large model, which runs in parts here and in no deployment, nor for one in bfloat16.
    """
    assert job.recording is not None
    if job.is_large:
        return {}
    session = Session(path, device=job.settings.device, spin=True)
    if session.emulates_bfloat16:
        return {}
    feeds = [feed for feed, _ in job.recording.kept]
    rows = sum(row_count(feed, job.specs) for feed in feeds)
    session.run(feeds[0])
    start = time.perf_counter()
    for feed in feeds:
        session.run(feed)
    seconds = (time.perf_counter() - start) * job.recording.samples / rows
    numbers = {"float_inference_seconds": seconds}
    if checked.session is not None:
        one = job.recording.first_feed
        numbers["latency_ms_float"] = _fastest_ms(session, one)
        numbers["latency_ms_quantized"] = _fastest_ms(checked.session, one)
    return numbers


def _fastest_ms(session: Session, feed: Feed) -> float:
    session.run(feed)
    times: list[float] = []
    while len(times) < LATENCY_RUNS and (sum(times) < PATIENCE_SECONDS or not times):
        start = time.perf_counter()
        session.run(feed)
        times.append(time.perf_counter() - start)
    return min(times) * 1000  # other work on the machine only ever adds to it
