"""Which layers get codes and which stay float, so that the whole is as much faster as wanted and loses least.

What each layer takes in float and on codes is read from onnxruntime's profiles on this machine. Sums of such times
leave out what a float layer between two on codes costs, so every allocation that might be taken is built and timed
as a whole beside the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.calibration import calibrate
from onnxq.calibration.data import batches, inputs_of
from onnxq.calibration.observers import Observer, Statistics
from onnxq.calibration.recording import record
from onnxq.calibration.weight_ranges import Search
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.layer_times import layer_times_ms, owners_of
from onnxq.learning.mixed_precision import Choice, Point, allocate
from onnxq.learning.widths import Group
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.runtime import Session, latency_ms
from onnxq.scheme import Scheme

FLOAT = "float"
THREADS = 1  # as `onnxq compare` times models
SCALE_SAMPLES = 16  # kernels take as long whatever the codes are; scales only decide what can be fused
HALVINGS = 5  # of the interval of predicted times
SECONDS = 1.0  # for timing one allocation beside the float model


@dataclass(frozen=True)
class Timed:
    """An allocation that was built and run beside the float model.

    Attributes:
        point: The labels; its cost is what its layers were predicted to take, in milliseconds.
        float_ms: Median latency of the float model.
        quantized_ms: Median latency of the allocation.
    """

    point: Point
    float_ms: float
    quantized_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster than float."""
        return self.float_ms / self.quantized_ms


@dataclass
class Race:
    """Allocations of float and codes to the layers of a job, timed on this machine.

    Attributes:
        job: After ``prepare``.
        groups: What is allocated together.
        schemes: The formats by label; :data:`FLOAT` is among them.
        observer: How a range follows from the statistics of an activation.
        search: How a range follows from weights.
    """

    job: Job
    groups: Sequence[Group]
    schemes: Mapping[str, Scheme]
    observer: Observer
    search: Search | None
    tried: dict[tuple[str, ...], Timed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch = next(batches(self.job.source, self.job.specs, batch_size=1, samples=1))
        self.feed = inputs_of(batch, self.job.specs)
        self.original = Session(self.job.path or self.job.model, threads=THREADS, spin=True)

    def times_ms(self, label: str) -> dict[str, float]:
        """What each group takes where all have one label; under ``""`` what belongs to none."""
        owners = owners_of(self.job.model.graph)
        found = layer_times_ms(self.built([label] * len(self.groups)), self.feed, owners, threads=THREADS)
        groups = {name: group.name for group in self.groups for name in group.nodes}
        summed: dict[str, float] = {}
        for layer, milliseconds in found.items():
            summed[groups.get(layer, "")] = summed.get(groups.get(layer, ""), 0.0) + milliseconds
        return summed

    def built(self, labels: Sequence[str]) -> ir.Model:
        """The model with these labels, as the target runs it."""
        copy, exceptions = self.job.model.clone(), self.exceptions(labels)
        placement = self.job.place(copy.graph, exceptions)
        InsertQDQ(placement.sites)(copy)
        calibrate.set_activation_scales(copy, self._statistics, self.observer)
        calibrate.set_weight_scales(copy, self.search)
        self.job.target.lower(copy)
        return copy

    def exceptions(self, labels: Sequence[str]) -> dict[str, Scheme]:
        """The formats of the layers, by their names."""
        pairs = zip(self.groups, labels, strict=True)
        return {name: self.schemes[label] for group, label in pairs for name in group.nodes}

    def run(self, point: Point) -> Timed:
        """Time an allocation as a whole, once."""
        if point.labels not in self.tried:
            self.tried[point.labels] = self.time(self.built(point.labels), point)
        return self.tried[point.labels]

    def time(self, model: ir.Model, point: Point) -> Timed:
        """Time a model beside the float one."""
        found = latency_ms(
            {"float": self.original, "quantized": Session(model, threads=THREADS, spin=True)},
            self.feed,
            seconds=SECONDS,
        )
        return Timed(point, found["float"], found["quantized"])

    @cached_property
    def _statistics(self) -> dict[str, Statistics]:
        """Statistics of everything that any allocation may quantize."""
        sites = self.job.place(self.job.model.graph).sites
        values = {value for site in sites for value in (site.value, site.like) if value is not None}
        names = sorted(value.name or "" for value in values if not graphs.is_constant(value))
        inputs = {spec.name for spec in self.job.specs}
        session = Session(self.job.model, taps=[name for name in names if name not in inputs])
        recording = record(session, names, self.job.source, self.job.specs, samples=SCALE_SAMPLES)
        return recording.statistics


def fastest_within(
    race: Race, choices: Sequence[Sequence[Choice]], speedup: float, on_try: Callable[[int], None]
) -> Timed:
    """The allocation that loses least among those timed that are as fast as wanted.

    All on codes and the one of the least predicted time come first; then the time that layers may take is halved
    between what the fastest needs and what float takes.

    Args:
        race: What times allocations.
        choices: Of each group; each costs ``ms``.
        speedup: How many times faster than float the whole must be.
        on_try: Called with the number of allocations timed.

    Raises:
        OnnxqError: none of them is; the fastest is named.
    """
    least, most = (sum(pick(choice.costs["ms"] for choice in group) for group in choices) for pick in (min, max))
    codes = [next(choice for choice in group if choice.label != FLOAT) for group in choices]
    all_codes = Point(
        sum(choice.costs["ms"] for choice in codes),
        sum(choice.loss for choice in codes),
        tuple(choice.label for choice in codes),
    )
    for number, point in enumerate((all_codes, allocate(choices, {"ms": least * (1 + 1e-6)}))):
        race.run(point)
        on_try(number + 1)
    best = max(race.tried.values(), key=lambda timed: timed.speedup)
    if best.speedup < speedup:
        count = sum(label != FLOAT for label in best.point.labels)
        raise OnnxqError(
            f"expected a speedup of {speedup:g} to be within reach, found at most {best.speedup:.2f} here, with "
            f"{count} of {len(choices)} layers on codes ({best.float_ms:.3f} ms become {best.quantized_ms:.3f} ms)",
            hint=f"ask for --budget-speedup {0.95 * best.speedup:.2f} or less, or build for another machine there",
        )
    low, high = least, most
    for number in range(HALVINGS):
        middle = (low + high) / 2
        timed = race.run(allocate(choices, {"ms": middle}))
        on_try(number + 3)
        if timed.speedup < speedup:
            high = middle
        else:
            low = middle
    return _confirmed(race, speedup)


def _confirmed(race: Race, speedup: float) -> Timed:
    """Of the allocations that were fast enough, the first by loss that is so again; else the fastest of them.

    The best of several times is partly luck, so that it is taken a second time.
    """
    fast = [timed for timed in race.tried.values() if timed.speedup >= speedup and set(timed.point.labels) != {FLOAT}]
    for timed in sorted(fast, key=lambda timed: (timed.point.loss, -timed.speedup)):
        if race.time(race.built(timed.point.labels), timed.point).speedup >= speedup:
            return timed
    return max(fast, key=lambda timed: timed.speedup)
