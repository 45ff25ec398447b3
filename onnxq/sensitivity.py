"""What each layer costs at the output when it alone is quantized: the error's power, by sampler step, or ZeroQ's Ω.

Source of the latter: Y. Cai et al., ZeroQ, CVPR 2020 (arXiv 2001.00281), equation 5: Ω_i(k) = mean of
KL(float ‖ only layer i at k bits). Departures: activations are measured like weights, in the width of the value that
the layer reads; outputs that are no logits count with their relative squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import STEP_KEY, InputSpec, Source, Spread, batches, inputs_of, row_count
from onnxq.calibration.observers import Observer, Statistics
from onnxq.calibration.weight_ranges import Search
from onnxq.errors import OnnxqError
from onnxq.learning.outputs import Compared, difference
from onnxq.parallel import Workers
from onnxq.runtime import Session
from onnxq.scheme import Scheme
from onnxq.switchboard import Layer, SharedBoard, Switchboard

Array = np.ndarray[Any, Any]

BATCH = 16
TASKS_OF_A_WORKER = 4  # so that all finish at about the same time


@dataclass
class ErrorPower:
    """Signal and error power of the model's float outputs, by sampler step (0 where there are no steps).

    Several outputs count alike in their own sizes: boxes in pixels would hide scores below 1, states what is said.

    Attributes:
        rows: Both powers of each sample, by step.
    """

    rows: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def add(
        self, expected: Sequence[Array], found: Sequence[Array], steps: Array, weights: Sequence[float] = ()
    ) -> None:
        """Add a batch of outputs; ``steps`` holds the step of each row, ``weights`` what each output counts."""
        for wanted, output, weight in zip(expected, found, weights or [1.0] * len(expected), strict=True):
            if wanted.dtype.kind != "f":
                continue
            rows = len(steps) if wanted.ndim and wanted.shape[0] == len(steps) else 1
            reference = wanted.reshape(rows, -1).astype(np.float64)
            signal = weight * (reference**2).sum(axis=1)
            error = weight * ((reference - output.reshape(rows, -1)) ** 2).sum(axis=1)
            for step, row_signal, row_error in zip(steps.tolist(), signal, error, strict=False):
                self.rows.setdefault(step, []).append((float(row_signal), float(row_error)))

    def merge(self, other: ErrorPower) -> None:
        """Add what was added to another."""
        for step, powers in other.rows.items():
            self.rows.setdefault(step, []).extend(powers)

    @property
    def signal(self) -> dict[int, float]:
        """Signal power by step."""
        return {step: sum(signal for signal, _ in powers) for step, powers in self.rows.items()}

    @property
    def error(self) -> dict[int, float]:
        """Error power by step."""
        return {step: sum(error for _, error in powers) for step, powers in self.rows.items()}

    @property
    def by_step_db(self) -> dict[int, float]:
        """SQNR in each step, in dB."""
        signal, error = self.signal, self.error
        return {step: _db(signal[step], error[step]) for step in sorted(signal)}

    @property
    def cautious_by_step_db(self) -> dict[int, float]:
        """SQNR in each step with the error one standard error larger, in dB: what other samples too will mostly have.

        Of a ratio of sums r = Σe/Σs over n samples that is √(n/(n - 1) Σ(e - r s)²) / Σs. In the last steps signals
        differ a hundredfold between samples, so that a few of them say little.
        """
        return {step: _cautious_db(np.asarray(powers)) for step, powers in sorted(self.rows.items())}

    @property
    def db(self) -> float:
        """SQNR over all samples, in dB."""
        return _db(sum(self.signal.values()), sum(self.error.values()))

    @property
    def worst_db(self) -> float:
        """SQNR of the worst step, in dB."""
        return min(self.by_step_db.values(), default=float("inf"))


def _cautious_db(powers: Array) -> float:
    (signal, error), count = powers.sum(axis=0), len(powers)
    if signal <= 0 or count < 2:
        return _db(float(signal), float(error))
    residual = powers[:, 1] - powers[:, 0] * error / signal
    return _db(float(signal), float(error + np.sqrt(count / (count - 1) * np.sum(residual**2))))


def _db(signal: float, error: float) -> float:
    if not np.isfinite(error):  # NaN is no larger than 0, and no answer at all
        return -float("inf")
    return float(10 * np.log10(max(signal, 1e-30) / error)) if error > 0 else float("inf")


@dataclass(frozen=True)
class Judged:
    """A batch of samples with the float model's outputs.

    Attributes:
        feed: The inputs.
        steps: The sampler step of each row, 0 where there are no steps.
        expected: The float outputs.
        weights: What the error power of each output counts; all alike in their own sizes.
        labels: The right classes, where the data has them.
    """

    feed: dict[str, Array]
    steps: Array
    expected: list[Array]
    weights: Sequence[float]
    labels: Array | None = None


Judge = Callable[[Judged, list[Array]], Any]


def judged_samples(
    session: Session, source: Source, specs: Sequence[InputSpec], rows: int, steps: Iterable[int] | None = None
) -> list[Judged]:
    """Samples and what the float model makes of them: spread evenly, of the given sampler steps alone if any."""
    found: list[Judged] = []
    weights = [1.0]  # one output counts as it is
    for batch in batches(Spread(source, rows, None if steps is None else set(steps)), specs, batch_size=BATCH):
        feed = inputs_of(batch, specs)
        keys = np.atleast_1d(batch.get(STEP_KEY, np.zeros(row_count(feed, specs), np.int64)))
        expected = session.run(feed, session.own_output_names)
        if not found and len(expected) > 1:
            weights = [_inverse_power(output) for output in expected]
        found.append(Judged(feed, keys, expected, weights, batch.get("labels")))
    return found


def _inverse_power(output: Array) -> float:
    """What makes boxes in pixels, scores below 1 and states count alike; 0 for what is zero or no float."""
    power = float(np.square(output, dtype=np.float64).sum()) if output.dtype.kind == "f" else 0.0
    return 1 / power if power else 0.0


def batch_power(sample: Judged, found: list[Array]) -> ErrorPower:
    """The error of a model's outputs on one batch."""
    power = ErrorPower()
    power.add(sample.expected, found[: len(sample.expected)], sample.steps, sample.weights)
    return power


@dataclass(frozen=True)
class Distance:
    """How far the outputs for one batch are from the float model's, times its rows.

    Attributes:
        outputs: Which outputs, and in what measure.
        names: The names of all outputs, in order.
    """

    outputs: Sequence[Compared]
    names: Sequence[str]

    def __call__(self, sample: Judged, found: list[Array]) -> float:
        """Judge a batch."""
        values = dict(zip(self.names, found, strict=False))
        expected = dict(zip(self.names, sample.expected, strict=True))
        rows = len(sample.steps)
        return rows * sum(difference(item, expected[item.output], values[item.output]) for item in self.outputs)


def _judge_sets(task: tuple[SharedBoard, Judge, Judged, Sequence[Sequence[str]]]) -> list[Any]:
    """What a judge says of one batch with each of some sets of layers quantized, in a worker."""
    board, judge, sample, sets = task
    return [judge(sample, board.run(sample.feed, on)) for on in sets]


def error_power(run: Callable[[dict[str, Array]], list[Array]], samples: Sequence[Judged]) -> ErrorPower:
    """The error of a model on samples that the float model has seen."""
    power = ErrorPower()
    for sample in samples:
        power.merge(batch_power(sample, run(sample.feed)))
    return power


@dataclass(frozen=True)
class Probe:
    """All that measuring needs, once for every choice of formats.

    Attributes:
        model: The float model after the target's rewrites.
        samples: Inputs with the float model's outputs.
        statistics: Of the activations that are quantized (:func:`onnxq.switchboard.activations_of`), by name.
        specs: The model's inputs.
        observer: How a range follows from the statistics of an activation.
        search: How a range follows from weights; ``None``: their extremes.
        device: ``cpu`` or ``cuda``.
        outputs: Which outputs :meth:`distance` compares, and in what measure.
        output_names: The names of the outputs in ``samples``, in order.
        workers: Who shares the work; ``None``: nobody. What is found is the same.
    """

    model: ir.Model
    samples: Sequence[Judged]
    statistics: dict[str, Statistics]
    specs: Sequence[InputSpec]
    observer: Observer
    search: Search | None = None
    device: str = "cpu"
    outputs: Sequence[Compared] = ()
    output_names: Sequence[str] = ()
    workers: Workers | None = None

    def board(self, layers: Iterable[Layer]) -> Switchboard:
        """The model with a switch for each layer's quantization."""
        return Switchboard(
            self.model,
            list(layers),
            self.statistics,
            observer=self.observer,
            search=self.search,
            device=self.device,
        )

    def error(self, board: Switchboard, on: Collection[str]) -> ErrorPower:
        """The error at the outputs when the named layers are quantized."""
        return error_power(lambda feed: board.run(feed, on), self.samples)

    def errors_alone(
        self, layers: Sequence[Layer], on_layer: Callable[[int], None] | None = None
    ) -> dict[str, ErrorPower]:
        """The error at the outputs when one layer alone is quantized, by its name."""
        names = [layer.name for layer in layers]
        powers = self.errors(self.board(layers), [[name] for name in names], on_layer)
        return dict(zip(names, powers, strict=True))

    def errors(
        self, board: Switchboard, sets: Sequence[Sequence[str]], on_set: Callable[[int], None] | None = None
    ) -> list[ErrorPower]:
        """The error at the outputs with each of some sets of layers quantized."""
        found = []
        for powers in self._each(board, sets, on_set):
            found.append(ErrorPower())
            for power in powers:
                found[-1].merge(power)
        return found

    def distances(
        self, layers: Sequence[Layer], sets: Sequence[Sequence[str]], on_set: Callable[[int], None] | None = None
    ) -> list[float]:
        """How far the outputs are from the float model's with each of some sets of layers quantized."""
        judge = Distance(tuple(self.outputs), tuple(self.output_names))
        rows = sum(len(sample.steps) for sample in self.samples)
        return [sum(found) / max(rows, 1) for found in self._each(self.board(layers), sets, on_set, judge)]

    def _each(
        self,
        board: Switchboard,
        sets: Sequence[Sequence[str]],
        on_set: Callable[[int], None] | None,
        judge: Judge = batch_power,
    ) -> list[list[Any]]:
        """What a judge says of every batch of samples with each set of layers quantized."""
        workers = self.workers
        found: list[list[Any]] = [[] for _ in sets]
        if workers is None:
            for index, on in enumerate(sets):
                found[index] = [judge(sample, board.run(sample.feed, on)) for sample in self.samples]
                if on_set is not None:
                    on_set(index + 1)
            return found
        shared = board.share(workers)
        size = max(1, len(sets) * len(self.samples) // (TASKS_OF_A_WORKER * workers.count))
        chunks = [(start, sample) for start in range(0, len(sets), size) for sample in self.samples]
        tasks = ((shared, judge, sample, sets[start : start + size]) for start, sample in chunks)
        for (start, sample), results in zip(chunks, workers.map(_judge_sets, tasks), strict=True):
            for index, result in enumerate(results):
                found[start + index].append(result)
            if on_set is not None and sample is self.samples[-1]:
                on_set(start + len(results))
        return found


def alone(
    probe: Probe, groups: Mapping[str, Mapping[str, Scheme]], on_group: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Ω of each group of layers: the distance when these layers alone have their schemes.

    Args:
        probe: What to measure with.
        groups: The schemes of layers by node name, by the group's name; a layer that shares no weight is a group.
        on_group: Called with the number of groups done.
    """
    layers = [Layer(name, scheme) for schemes in groups.values() for name, scheme in schemes.items()]
    distances = probe.distances(layers, [list(schemes) for schemes in groups.values()], on_group)
    return dict(zip(groups, distances, strict=True))


def together(probe: Probe, schemes: Mapping[str, Scheme]) -> float:
    """The distance when all layers have their schemes: what the sum over :func:`alone` predicts."""
    return probe.distances([Layer(name, scheme) for name, scheme in schemes.items()], [list(schemes)])[0]


def points_lost(probe: Probe, schemes: Mapping[str, Scheme]) -> float:
    """Points of top-1 lost when all layers have their schemes; without labels, answers that change, in percent.

    Raises:
        OnnxqError: no output is logits.
    """
    judged = next((item for item in probe.outputs if item.kind == "kl"), None)
    if judged is None:
        raise OnnxqError(
            "expected a classifier or a language model for max_drop, found no logits among the outputs",
            hint="give a budget instead: --set budget_bits=5",
        )
    board = probe.board(Layer(name, scheme) for name, scheme in schemes.items())
    lost, rows = 0.0, 0
    for sample in probe.samples:
        found = dict(zip(probe.output_names, board.run(sample.feed, list(schemes)), strict=False))
        expected = dict(zip(probe.output_names, sample.expected, strict=True))
        before, after = (part[judged.output].argmax(axis=-1) for part in (expected, found))
        right = before if sample.labels is None or sample.labels.shape != before.shape else sample.labels
        lost += float(np.sum(before == right)) - float(np.sum(after == right))
        rows += before.size
    return 100 * lost / max(rows, 1)
