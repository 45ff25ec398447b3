"""Run the float graph once over the calibration inputs, and keep statistics of what its values are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxq.calibration.data import STEP_KEY, InputSpec, Source, batches, inputs_of, row_count
from onnxq.calibration.observers import Statistics
from onnxq.condensed import Condensed, thinned
from onnxq.errors import OnnxqError
from onnxq.parallel import SharedModel, Workers
from onnxq.runtime import Session

Array = np.ndarray[Any, Any]

TAPPED_BYTES_PER_BATCH = 16 << 20  # bounds memory, and keeps a batch's activations near the caches
HELD_BYTES_PER_BATCH = 256 << 20  # where more is computed of a batch than what runs it
LARGEST_BATCH = 16
MEAN_SAMPLES = 16  # channel means settle soon, and cost as much as the extremes of all values
SAMPLED_VALUES = 1 << 18  # per tensor over the whole run
SHARD_SAMPLES = 64  # have statistics of their own, which then merge
SHARD_BYTES = 64 << 20
THREADS = 2  # numpy lets go of the interpreter lock while it reduces
KEPT_SAMPLES = 8  # float outputs kept to check the result against


@dataclass
class Recording:
    """What one pass over the data gave.

    Attributes:
        statistics: By the name of the tapped value.
        kept: The first feeds and the float model's outputs for them.
        first_feed: The first sample alone.
        first_taps: Part of each tapped value for it (see :func:`thinned`).
        first_sizes: How many numbers each has.
        channel_means: E[x] per channel, by the name of the tapped value.
        mean_samples: How many samples those are the means of.
        samples: How many samples were run.
    """

    statistics: dict[str, Statistics]
    kept: list[tuple[dict[str, Array], list[Array]]] = field(default_factory=list)
    first_feed: dict[str, Array] = field(default_factory=dict)
    first_taps: dict[str, Array] = field(default_factory=dict)
    first_sizes: dict[str, int] = field(default_factory=dict)
    channel_means: dict[str, Array] = field(default_factory=dict)
    mean_samples: int = 0
    samples: int = 0

    def add(self, other: Recording) -> None:
        """Add what another pass over the same data gave of other values."""
        self.statistics |= other.statistics
        self.first_taps |= other.first_taps
        self.first_sizes |= other.first_sizes
        self.channel_means |= other.channel_means
        self.kept, self.first_feed = other.kept, other.first_feed
        self.mean_samples, self.samples = other.mean_samples, other.samples

    def of(self, taps: Sequence[str], outputs: Sequence[str]) -> Recording:
        """What was seen of some values, and of the model's outputs."""
        known = {*taps, *outputs}
        return replace(
            self,
            statistics={name: self.statistics[name] for name in taps},
            first_taps={name: values for name, values in self.first_taps.items() if name in known},
        )


@dataclass(frozen=True)
class _Plan:
    """What is wanted of every part of the data.

    Attributes:
        taps: Names of the values to observe.
        wanted: Names of the session's outputs: the model's own, then the taps that are no inputs.
        own: How many of them are the model's own.
        specs: The model's inputs.
        per_sample: Values of each tap that go into its histogram, for each sample.
        channel_axes: Values whose mean per channel is wanted too, and their channel axes.
        spread: Numbers of the samples to keep, where samples carry steps.
    """

    taps: list[str]
    wanted: list[str]
    own: int
    specs: list[InputSpec]
    per_sample: int
    channel_axes: dict[str, int]
    spread: set[int]


def record(
    session: Session,
    taps: Sequence[str],
    source: Source,
    specs: Sequence[InputSpec],
    *,
    channel_axes: Mapping[str, int] | None = None,
    samples: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    workers: Workers | None = None,
    shared: SharedModel | None = None,
) -> Recording:
    """Stream ``source`` through a session that returns ``taps``, and keep statistics of them.

    The data is cut into shards whose size follows from the model and the data alone; each has statistics of its own,
    which merge in order. So the result is the same, byte for byte, however many workers there are.

    Args:
        session: The float session; its last outputs are the taps.
        taps: Names of the values to observe, graph inputs included.
        source: Calibration samples.
        specs: The model's inputs.
        channel_axes: Values whose mean per channel is wanted too, and their channel axes.
        samples: Use at most so many.
        on_batch: Called with the number of samples after each batch.
        workers: What runs the shards; ``None``: this process.
        shared: The model of ``session``, where there are workers.
    """
    total = min(len(source), samples or len(source))
    names = {spec.name for spec in specs}
    own_outputs = session.own_output_names
    plan = _Plan(
        list(taps),
        own_outputs + [name for name in taps if name not in names and name not in own_outputs],
        len(own_outputs),
        list(specs),
        max(256, SAMPLED_VALUES // max(total, 1)),
        dict(channel_axes or {}),
        set(np.linspace(0, total - 1, KEPT_SAMPLES).round().astype(int).tolist()),
    )
    recording = Recording({name: Statistics() for name in taps})
    first = inputs_of(next(batches(source, specs, batch_size=1, samples=1)), specs)
    recording.first_feed = first
    outputs = session.run(first, plan.wanted)
    tapped_bytes = sum(value.nbytes for value in outputs)
    recording.first_taps = {name: thinned(value) for name, value in zip(plan.wanted, outputs, strict=True)}
    recording.first_sizes = {name: value.size for name, value in zip(plan.wanted, outputs, strict=True)}
    del outputs
    size = rows_at_once(tapped_bytes)
    batch_bytes = size * sum(value.nbytes for value in first.values())
    in_shard = max(1, min(SHARD_SAMPLES // size, SHARD_BYTES // max(batch_bytes, 1)))
    drawn = batches(source, specs, batch_size=size, samples=samples)
    if workers is None or shared is None:
        with ThreadPoolExecutor(THREADS) as pool:
            for shard in _shards(drawn, in_shard):
                _merge(recording, _observe_shard(session, plan, recording.samples, shard, pool, on_batch))
    else:
        tasks = (
            (shared, plan, index * in_shard * size, list(shard)) for index, shard in enumerate(_shards(drawn, in_shard))
        )
        for part in workers.map(_observe_task, tasks):
            _merge(recording, part)
            if on_batch is not None:
                on_batch(recording.samples)
    return recording


def rows_at_once(tapped_bytes: int, most: int = LARGEST_BATCH, limit: int = TAPPED_BYTES_PER_BATCH) -> int:
    """How many samples run together, so that the values that a run returns stay within a limit."""
    return max(1, min(most, limit // max(tapped_bytes, 1)))


def bytes_of_one(session: Session, names: Sequence[str], source: Source, specs: Sequence[InputSpec]) -> int:
    """What the named values of the first sample take."""
    first = inputs_of(next(batches(source, specs, batch_size=1, samples=1)), specs)
    return sum(value.nbytes for value in session.run(first, names)) if names else 0


def _shards(drawn: Iterator[dict[str, Array]], size: int) -> Iterator[Iterator[dict[str, Array]]]:
    """Runs of ``size`` batches, none of them read before it is wanted."""
    for first in drawn:
        shard = itertools.chain([first], itertools.islice(drawn, size - 1))
        yield shard
        for _ in shard:
            pass


def _observe_task(task: tuple[SharedModel, _Plan, int, list[dict[str, Array]]]) -> Recording:
    """One shard in a worker."""
    shared, plan, start, shard = task
    with ThreadPoolExecutor(min(THREADS, shared.threads)) as pool:
        return _observe_shard(shared.session(), plan, start, shard, pool, None)


def _observe_shard(
    session: Session,
    plan: _Plan,
    start: int,
    shard: Iterable[dict[str, Array]],
    pool: ThreadPoolExecutor,
    on_batch: Callable[[int], None] | None,
) -> Recording:
    """Statistics of the samples from number ``start`` on."""
    part = Recording({name: Statistics() for name in plan.taps})
    for batch, outputs in session.run_each(shard, plan.wanted):
        feed = inputs_of(batch, plan.specs)
        rows = row_count(feed, plan.specs)
        tapped = dict(zip(plan.wanted, outputs, strict=True)) | feed
        observed = [(part.statistics[name], tapped[name], plan.per_sample * rows) for name in plan.taps]
        list(pool.map(_observe, [observed[index::THREADS] for index in range(THREADS)]))
        for name in plan.taps:
            _check_finite(name, part.statistics[name])
        position = start + part.samples
        if position < MEAN_SAMPLES:
            for name, axis in plan.channel_axes.items():
                total = part.channel_means.get(name, 0) * part.mean_samples + _channel_mean(tapped[name], axis) * rows
                part.channel_means[name] = total / (part.mean_samples + rows)
            part.mean_samples += rows
        if STEP_KEY in batch:  # in the order of steps, so that the first samples would all be of the first one
            chosen = [row for row in range(rows) if position + row in plan.spread]
        else:
            chosen = list(range(rows)) if position < KEPT_SAMPLES else []
        if chosen:
            together = any(spec.is_whole or spec.batch is not None for spec in plan.specs)  # rows that run as they are
            part.kept.append(_rows_of(feed, outputs[: plan.own], range(rows) if together else chosen, rows))
        part.samples += rows
        del outputs, tapped, observed  # before another run allocates its own
        if on_batch is not None:
            on_batch(start + part.samples)
    return part


def _merge(recording: Recording, part: Recording) -> None:
    """Add the next shard."""
    for name, statistics in part.statistics.items():
        recording.statistics[name].merge(statistics)
    recording.kept += part.kept
    for name, mean in part.channel_means.items():
        total = recording.channel_means.get(name, 0) * recording.mean_samples + mean * part.mean_samples
        recording.channel_means[name] = total / (recording.mean_samples + part.mean_samples)
    recording.mean_samples += part.mean_samples
    recording.samples += part.samples


def _rows_of(
    feed: dict[str, Array], outputs: Sequence[Array], chosen: Sequence[int], rows: int
) -> tuple[dict[str, Array], list[Array]]:
    """Some rows of a batch; the whole batch where something in it has no rows."""
    values = [*feed.values(), *outputs]
    if len(chosen) == rows or any(not value.ndim or len(value) != rows for value in values):
        return feed, [output.copy() for output in outputs]
    return {name: value[chosen] for name, value in feed.items()}, [output[chosen] for output in outputs]


def _channel_mean(values: Array | Condensed, axis: int) -> Array:
    if isinstance(values, Condensed):
        return np.asarray(values.means[axis], np.float64)
    axis %= values.ndim
    if axis == values.ndim - 1:
        return np.asarray(values.reshape(-1, values.shape[-1]).mean(axis=0, dtype=np.float64))
    rows = values.reshape(*values.shape[: axis + 1], -1).mean(axis=-1, dtype=np.float32)  # fast: contiguous
    return np.asarray(rows.reshape(-1, values.shape[axis]).mean(axis=0, dtype=np.float64))


def _observe(work: Sequence[tuple[Statistics, Array | Condensed, int]]) -> None:
    for statistics, values, sampled in work:
        statistics.update(values, sampled)


def _check_finite(name: str, statistics: Statistics) -> None:
    if not (np.isfinite(statistics.low) and np.isfinite(statistics.high)):
        raise OnnxqError(
            f"expected finite activations, found NaN or infinity in {name!r} of the float model",
            hint="the float model itself overflows on this data; check its inputs",
        )
