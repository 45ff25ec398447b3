"""What quantization would cost where: each layer alone, the most sensitive ones left out, and ranges."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import custom_ops, layer_nodes, targets
from onnxq import model as models
from onnxq.calibration import observers, sizes, weight_ranges
from onnxq.calibration.recording import record
from onnxq.calibration.weight_ranges import Search
from onnxq.config import Settings
from onnxq.errors import OnnxqError
from onnxq.inputs import calibration_inputs
from onnxq.job import Job
from onnxq.parallel import Workers, open_workers
from onnxq.progress import Progress
from onnxq.report.metrics import json_safe
from onnxq.runtime import Session
from onnxq.sensitivity import ErrorPower, Probe, judged_samples
from onnxq.serialized import serialize
from onnxq.switchboard import Layer, activations_of, layers_of

Array = np.ndarray[Any, Any]

JUDGED_ROWS = 32
ENOUGH_DB = 3.0  # what leaving layers out has to gain before it is suggested
LONGEST_SUGGESTION = 8


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer.

    Attributes:
        name: The node.
        op: Its op.
        weight_shape: Its weight's sizes, empty where both factors are activations.
        sqnr_db: SQNR of the output with this layer alone quantized.
        worst_step: The sampler step in which it costs most, ``None`` without steps.
        worst_step_db: SQNR there.
        low: Smallest value of its input.
        high: Largest value of its input.
        narrow_db: SQNR of the output with its weight alone in fewer bits, by format.
    """

    name: str
    op: str
    weight_shape: list[int]
    sqnr_db: float
    worst_step: int | None
    worst_step_db: float | None
    low: float
    high: float
    narrow_db: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """What was measured, and what follows from it.

    Attributes:
        model: The file.
        target: The target.
        samples: Calibration samples.
        layers: The most sensitive first.
        cumulative: SQNR (of the worst step, where there are steps) with the first 0, 1, 2, … of them in float.
        left_float: Layers that each target leaves in float anyway, with the reason, by target.
        suggestions: What to try, ready to paste.
        warnings: What the user should know of the data.
    """

    model: str
    target: str
    samples: int
    layers: list[LayerAnalysis]
    cumulative: list[float]
    left_float: dict[str, dict[str, str]]
    suggestions: list[str]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """A dict ready for strict JSON."""
        found: dict[str, Any] = json_safe(asdict(self))
        return found


def analyze(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Mapping[str, Array]] | None = None,
    *,
    settings: Settings | None = None,
    narrow: Sequence[str] = ("int4",),
    progress: Progress | None = None,
) -> Analysis:
    """Measure what each layer costs when it is quantized, and suggest what to leave in float.

    Every layer gets a switch, so that one session of the float model answers all questions; nothing is written.

    Args:
        model: Path of the float model.
        data: Calibration inputs, as for :func:`onnxq.quantize`.
        settings: Target, formats, samples and the rest.
        narrow: Formats to try each weight in alone, beside the formats of the settings.
        progress: Where to say what is being done; by default nowhere.

    Raises:
        OnnxqError: the model, the data or a setting is not what was expected.
    """
    settings, progress, path = settings or Settings(), progress or Progress(), Path(model)
    with open_workers(settings.workers, settings.ray) as workers:
        return _analyze(path, data, settings, narrow, progress, workers)


def _analyze(
    path: Path,
    data: str | os.PathLike[str] | Iterable[Mapping[str, Array]] | None,
    settings: Settings,
    narrow: Sequence[str],
    progress: Progress,
    workers: Workers | None,
) -> Analysis:
    custom_ops.use(settings.custom_ops)
    target = targets.get(settings.target)
    scheme = target.scheme(settings.weights, settings.activations)
    for text in narrow:
        target.scheme(text, "float")  # a format that is none is said before the work
    with progress.stage("load", "Loading"):
        loaded = models.load(path)
        models.check_float(loaded)
        sizes.choose(loaded, settings.shapes)
        others = {name: _left_float(path, name) for name in targets.names() if name != target.name}
    source, warnings = calibration_inputs(loaded, path, data, settings, progress, workers=workers)
    job = Job(loaded, target, scheme, settings, source, progress, warnings=warnings, workers=workers)
    job.prepare()
    placement = job.place(loaded.graph)
    layers = layers_of(loaded.graph, lambda node: scheme, placement.left_float)
    if not layers:
        raise OnnxqError(
            f"expected layers that {target.name} can quantize in {path.name}, found none",
            hint="`onnxq lint` and another --target may tell more",
        )
    study = _Study(job, layers)
    alone = study.alone(layers, None, "Switching layers on")
    ranking = sorted(alone, key=lambda name: (alone[name].worst_db, name))
    cumulative = study.without(layers, ranking[: min(LONGEST_SUGGESTION, len(ranking) // 2)])
    narrowed = {text: study.weights_alone(layers, text) for text in narrow}
    found = [
        study.layer(name, alone[name], {text: powers[name].db for text, powers in narrowed.items() if name in powers})
        for name in ranking
    ]
    left_float = {target.name: placement.left_float, **others}
    suggestions = _suggestions(ranking, cumulative)
    return Analysis(str(path), target.name, study.samples, found, cumulative, left_float, suggestions, warnings)


class _Study:
    """The float model with its statistics, and what is asked of it."""

    def __init__(self, job: Job, layers: list[Layer]) -> None:
        self.job = job
        self.nodes = {item.node.name or "": item for item in layer_nodes.weighted_nodes(job.model.graph)}
        self.samples = min(len(job.source), job.settings.samples or len(job.source))
        taps = activations_of(job.model.graph, layers)
        inputs = {spec.name for spec in job.specs}
        serialized = serialize(job.model, [name for name in taps if name not in inputs], by_path=job.workers is None)
        session = Session(serialized, device=job.settings.device)
        with job.progress.stage("calibrate", "Calibrating", self.samples) as advance:
            recording = record(
                session,
                taps,
                job.source,
                job.specs,
                samples=self.samples,
                on_batch=advance,
                workers=job.workers,
                shared=None if job.workers is None else job.workers.share(serialized, job.settings.device),
            )
        judged = judged_samples(session, job.source, job.specs, JUDGED_ROWS)
        self.probe = Probe(
            job.model,
            judged,
            recording.statistics,
            job.specs,
            observers.get("robust"),
            device=job.settings.device,
            workers=job.workers,
        )

    def alone(self, layers: Sequence[Layer], search: Search | None, message: str) -> dict[str, ErrorPower]:
        """The error of each layer alone."""
        with self.job.progress.stage("analyze", message, len(layers), unit="layers") as advance:
            return replace(self.probe, search=search).errors_alone(layers, advance)

    def without(self, layers: Sequence[Layer], left_out: Sequence[str]) -> list[float]:
        """SQNR of the worst step with the first 0, 1, 2, … of some layers in float."""
        with self.job.progress.stage("analyze", "Leaving layers out"):
            board = self.probe.board(layers)
            counts = range(len(left_out) + 1)
            return [self.probe.error(board, set(board.layers) - set(left_out[:count])).worst_db for count in counts]

    def weights_alone(self, layers: Sequence[Layer], text: str) -> dict[str, ErrorPower]:
        """The error of each weight alone in another format."""
        scheme = self.job.target.scheme(text, "float")
        having = [Layer(layer.name, scheme) for layer in layers if self.nodes[layer.name].weight_index is not None]
        return self.alone(having, weight_ranges.get("mse"), f"Weights in {text}")

    def layer(self, name: str, power: ErrorPower, narrow_db: dict[str, float]) -> LayerAnalysis:
        """What was found of a layer."""
        item, steps = self.nodes[name], power.by_step_db
        worst = min(steps, key=lambda step: steps[step]) if len(steps) > 1 else None
        sizes = () if item.weight is None else item.weight.shape or ()
        seen = self.probe.statistics[item.activation.name or ""]
        return LayerAnalysis(
            name=name,
            op=item.node.op_type,
            weight_shape=[size for size in sizes if isinstance(size, int)],
            sqnr_db=power.db,
            worst_step=worst,
            worst_step_db=None if worst is None else steps[worst],
            low=float(seen.low),
            high=float(seen.high),
            narrow_db=narrow_db,
        )


def _left_float(path: Path, name: str) -> dict[str, str]:
    """What another target leaves in float."""
    other, model = targets.get(name), models.load(path)
    other.prepare(model)
    return other.place(model.graph, other.scheme(None, None)).left_float


def _suggestions(ranking: Sequence[str], cumulative: Sequence[float]) -> list[str]:
    """The fewest layers in float that gain a fair part of what all of them would.

    Raises:
        OnnxqError: an output is NaN or infinite.
    """
    if np.isnan(cumulative).any():
        raise OnnxqError(
            "expected finite outputs with layers quantized, found NaN or infinity",
            hint="check that the float model itself stays finite on this data",
        )
    if np.isinf(cumulative[0]):
        return ["nothing to leave out: no output changes when all layers are quantized"]
    gains = [value - cumulative[0] for value in cumulative]
    best = max(gains)
    if best < ENOUGH_DB:
        return [
            "no few layers stand out: try wider formats, another range rule (--set observer=…), or a recipe that learns"
        ]
    count = next(index for index, gain in enumerate(gains) if gain >= best * 2 / 3)
    options = " ".join(f"--exclude {shlex.quote(name)}" for name in ranking[:count])
    return [f"{options}   # {cumulative[0]:.1f} dB becomes {cumulative[count]:.1f} dB"]
