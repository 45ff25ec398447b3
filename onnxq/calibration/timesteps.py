"""What calibration keeps of a tensor of a denoiser: statistics of each step of the sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxq.calibration.data import STEP_KEY, InputSpec, Source, batches, fixed_batch, inputs_of
from onnxq.calibration.observers import Statistics
from onnxq.calibration.recording import HELD_BYTES_PER_BATCH, bytes_of_one, rows_at_once
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

Array = np.ndarray[Any, Any]

BATCH = 16
SAMPLED_VALUES = 1 << 19  # per tensor over all steps: what bounds memory; tails of a single step need many
LEAST_SAMPLED = 256  # of a tensor in each sample


class StepStatistics:
    """Statistics of one tensor, apart for each step; a monoid as they are.

    Attributes:
        by_step: Statistics by the number of the step, 0 being the noisiest.
    """

    def __init__(self) -> None:
        self.by_step: dict[int, Statistics] = {}

    def update(self, values: Array, steps: Array, sampled: int = 4096) -> None:
        """Add a batch.

        Args:
            values: [rows, …].
            steps: The step of each row [rows].
            sampled: How many values of each row go into the histogram.
        """
        for step in np.unique(steps):
            rows = values[steps == step]
            self.by_step.setdefault(int(step), Statistics()).update(rows, sampled * len(rows))

    def merge(self, other: StepStatistics) -> None:
        """Add what another part of the data gave."""
        for step, statistics in other.by_step.items():
            self.by_step.setdefault(step, Statistics()).merge(statistics)

    def together(self) -> Statistics:
        """Statistics of all steps as one."""
        whole = Statistics()
        for step in sorted(self.by_step):
            whole.merge(self.by_step[step])
        return whole


def record(
    session: Session,
    taps: Sequence[str],
    source: Source,
    specs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, StepStatistics]:
    """Stream ``source`` through a session that returns ``taps``, and keep statistics of each step.

    Args:
        session: A session with the taps among its outputs.
        taps: Names of the values, graph inputs included.
        source: Samples that carry their step.
        specs: The model's inputs.
        samples: Use at most so many.
        on_batch: Called with the number of samples so far.

    Returns:
        By name. A value that is no row for each sample (the batch folded into another axis) has none.

    Raises:
        OnnxqError: samples carry no step.
    """
    names = {spec.name for spec in specs}
    inner = [name for name in taps if name not in names]
    fixed = fixed_batch(specs)
    alone = fixed == 1 or (fixed is None and any(spec.is_whole for spec in specs))  # one sample, one step, in a run
    total = min(len(source), samples or len(source))
    sampled = max(LEAST_SAMPLED, SAMPLED_VALUES // max(total, 1))

    def run(feed: dict[str, Array]) -> dict[str, Array]:
        return feed | (dict(zip(inner, session.run(feed, inner), strict=True)) if inner else {})

    found: dict[str, StepStatistics] = {}
    done = 0
    size = rows_at_once(bytes_of_one(session, inner, source, specs), BATCH, HELD_BYTES_PER_BATCH)
    for batch in batches(source, specs, batch_size=size, samples=samples):
        if STEP_KEY not in batch:
            raise OnnxqError(
                f"expected samples that say under {STEP_KEY!r} which step of the sampler they are of, found none",
                hint="leave --data out, or record it with `onnxq trajectories`",
            )
        feed, steps = inputs_of(batch, specs), np.atleast_1d(batch[STEP_KEY])
        tapped = run(feed)
        if not done:
            fewer = _fewer(feed, specs)
            probe = tapped if alone or fewer is None else run(fewer)
            rows = len(steps) if alone or fewer is None else len(fewer[specs[0].name])
            found = {name: StepStatistics() for name in taps if alone or _has_rows(tapped[name], probe[name], rows)}
            found = {name: item for name, item in found.items() if alone or len(tapped[name]) == len(steps)}
        for name, statistics in found.items():
            statistics.update(tapped[name][None] if alone else tapped[name], steps, sampled)
        done += len(steps)
        if on_batch is not None:
            on_batch(done)
    return found


def _fewer(feed: dict[str, Array], specs: Sequence[InputSpec]) -> dict[str, Array] | None:
    """Another number of rows, to see what of the network has one for each; ``None`` where the export fixed it."""
    if any(spec.batch is not None or spec.is_whole for spec in specs):
        return None
    rows = len(feed[specs[0].name])
    return {name: np.repeat(array, 2, axis=0) if rows == 1 else array[: rows // 2] for name, array in feed.items()}


def _has_rows(tapped: Array, probe: Array, rows: int) -> bool:
    return tapped.ndim > 0 and len(probe) == rows
