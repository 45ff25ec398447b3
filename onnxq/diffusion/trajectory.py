"""Run a denoiser along its sampler, and keep what the network sees: sample, timestep and condition of chosen steps.

Inputs are recorded before the sampler's step, in one pass, straight into files: memory holds one batch. With
guidance the network runs with and without its condition, and both inputs are recorded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.archives import Npz
from onnxq.calibration.data import STEP_KEY, Array, Sample
from onnxq.diffusion.denoiser import UNCONDITIONAL, Denoiser, Runnable
from onnxq.diffusion.schedule import Schedule
from onnxq.diffusion.selection import by_influence, select
from onnxq.errors import OnnxqError
from onnxq.parallel import SharedModel, Workers
from onnxq.progress import Advance
from onnxq.runtime import Session
from onnxq.writing import atomic_folder

BATCH_BYTES = 1 << 20  # of samples that run together
LARGEST_BATCH = 8  # few enough that several workers have something to do
LABELS = 1  # behind a seed: of random numbers that are not noise


_Kept = tuple[Array, dict[str, Array]]  # rows of the file, and what they hold by input name


@dataclass
class Visit:
    """One step of a batch of trajectories, before the sampler moves on.

    Attributes:
        step: Which step of the sampler; 0 is the noisiest.
        feed: What the network is given: with guidance the conditional rows, then the unconditional ones.
        raw: What it predicts for each row.
        prediction: The prediction that the sampler uses (guided, where guidance acts), as it stands here when the next
            step is asked for: what is changed in place is what the sampler goes on with.
    """

    step: int
    feed: dict[str, Array]
    raw: Array
    prediction: Array


@dataclass(frozen=True)
class Sampler:
    """A denoiser with its schedule, guidance and conditions.

    Attributes:
        denoiser: The roles of its inputs.
        schedule: The sampler.
        guidance: Weight w of ``e(no condition) + w (e(condition) - e(no condition))``; 1 means none.
        conditions: Rows for conditions that are not class labels, by input name.
        seed: Sample i starts from noise that depends on (seed, i) alone.
    """

    denoiser: Denoiser
    schedule: Schedule
    guidance: float = 1.0
    conditions: Mapping[str, Array] | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse guidance where there is nothing to guide.

        Raises:
            OnnxqError: there is no condition, or nothing known that stands for none.
        """
        if self.guidance == 1:
            return
        known = {name.removesuffix(UNCONDITIONAL) for name in self.conditions or {} if name.endswith(UNCONDITIONAL)}
        missing = [
            item.spec.name
            for item in self.denoiser.conditions
            if item.null_class is None and not item.spec.is_whole and item.spec.name not in known
        ]
        if missing or not (self.denoiser.conditions or known.intersection(self.denoiser.beside_names)):
            found = f"none for {', '.join(missing)}" if missing else "a model without conditions"
            raise OnnxqError(
                f"expected an unconditional input for guidance {self.guidance:g}, found {found}",
                hint="leave --guidance out, or add NAME.unconditional (one row) to --conditions FILE.npz",
            )

    @property
    def batch(self) -> int:
        """Samples that run together."""
        size = 4 * int(np.prod([size or 1 for size in self.denoiser.sample.shape[1:]]))
        return int(np.clip(BATCH_BYTES // size, 1, LARGEST_BATCH))

    def is_guided(self, step: int) -> bool:
        """Whether guidance acts at this step."""
        low, high = self.schedule.guidance_interval
        return self.guidance != 1 and low <= self.schedule.timesteps[step] <= high

    def rows(self, step: int) -> int:
        """Inputs of the network for each sample at this step."""
        return 2 if self.is_guided(step) else 1

    def run(self, session: Runnable, indices: Sequence[int]) -> Run:
        """A run of some samples, by number."""
        return Run(self, session, indices)


class Run:
    """Trajectories of a batch; iterating gives a :class:`Visit` for each step.

    Attributes:
        sample: Where the samples are now; after the last step, the result.
    """

    def __init__(self, sampler: Sampler, session: Runnable, indices: Sequence[int]) -> None:
        self.sampler, self.session = sampler, session
        denoiser = sampler.denoiser
        shape = denoiser.noise_shape
        generators = [np.random.default_rng([sampler.seed, index]) for index in indices]
        noise = np.stack([generator.standard_normal(shape, np.float32) for generator in generators])
        scale = sampler.schedule.begin([int(generator.integers(1 << 62)) for generator in generators])
        self.sample: Array = noise * np.float32(scale)
        self.conditional: dict[str, Array] = {}
        self.unconditional: dict[str, Array] = {}
        self.shared: dict[str, Array] = {}  # for all samples
        given = sampler.conditions or {}
        for item in denoiser.conditions:
            name = item.spec.name
            if item.classes is not None:
                classes = item.classes - (sampler.guidance != 1)  # "no class" is a class of its own without guidance
                labels = [_label(sampler.seed, index, max(classes, 1)) for index in indices]
                self.conditional[name] = np.asarray(labels, item.spec.dtype)
                self.unconditional[name] = np.full(len(labels), item.null_class, item.spec.dtype)
            elif item.spec.is_whole:
                self.shared[name] = given[name].astype(item.spec.dtype)
            else:
                self._take_rows(name, item.spec.dtype, indices)
        for name in denoiser.beside_names:
            if name in given:
                self._take_rows(name, denoiser.sample.dtype, indices)
                self.unconditional.setdefault(name, self.conditional[name])  # the same mask with and without a prompt

    def _take_rows(self, name: str, dtype: np.dtype[Any], indices: Sequence[int]) -> None:
        """The rows of some samples under a name of the conditions, and that for guidance if it is there."""
        given = self.sampler.conditions or {}
        rows = given[name]
        self.conditional[name] = rows[np.asarray(indices) % len(rows)].astype(dtype)
        if name + UNCONDITIONAL in given:
            row = given[name + UNCONDITIONAL].reshape(1, *rows.shape[1:]).astype(dtype)
            self.unconditional[name] = np.repeat(row, len(indices), axis=0)

    def __iter__(self) -> Iterator[Visit]:
        sampler, denoiser, schedule = self.sampler, self.sampler.denoiser, self.sampler.schedule
        count = len(self.sample)
        for step, time in enumerate(schedule.timesteps):
            noisy = schedule.scaled(self.sample, step).astype(denoiser.sample.dtype, copy=False)
            rows, conditions = count, dict(self.conditional)
            if sampler.is_guided(step):
                rows, noisy = 2 * count, np.concatenate([noisy, noisy])
                conditions = {name: np.concatenate([conditions[name], self.unconditional[name]]) for name in conditions}
            before, behind = ([conditions.pop(name)] if name in conditions else [] for name in denoiser.beside_names)
            seen = np.concatenate([*before, noisy, *behind], denoiser.channel_axis)
            feed = {denoiser.sample.name: seen, denoiser.timestep.name: denoiser.timesteps(time, rows), **conditions}
            feed |= self.shared
            raw = denoiser.predict(self.session, feed).astype(np.float32, copy=False)
            if raw.shape != noisy.shape:
                raise OnnxqError(
                    f"expected a prediction of the sample's shape {list(noisy.shape)}, found {list(raw.shape)}",
                    hint="this is not a denoiser; quantize it with --data",
                )
            prediction = self.guided(raw, step)
            yield Visit(step, feed, raw, prediction)
            self.sample = schedule.advance(prediction, step, self.sample)

    def guided(self, raw: Array, step: int) -> Array:
        """The prediction that the sampler uses, from those for the network's rows."""
        if not self.sampler.is_guided(step):
            return raw
        with_condition, without = np.split(raw, 2)
        result: Array = without + np.float32(self.sampler.guidance) * (with_condition - without)
        return result


def _label(seed: int, index: int, classes: int) -> int:
    """The class of a sample. So many samples as there are classes have one each: few that are drawn would miss some."""
    turn, place = divmod(index, classes)
    return int(np.random.default_rng([seed, turn, LABELS]).permutation(classes)[place])


def record(
    sampler: Sampler,
    session: Session,
    chosen: Array,
    path: Path,
    advance: Advance | None = None,
    workers: Workers | None = None,
    shared: SharedModel | None = None,
) -> int:
    """Record the chosen steps of each trajectory into an ``.npz`` file, and return how many inputs it holds.

    Its rows go round all steps again and again, in an order drawn for each round, so that any first part of the file
    is spread over the steps.

    Args:
        sampler: What to run.
        session: The float denoiser.
        chosen: A boolean array [samples, steps] (see :func:`onnxq.diffusion.selection.select`).
        path: The file.
        advance: Called with the number of steps that are done.
        workers: Who runs the batches; ``None``: this process. The file is the same.
        shared: The model of ``session``, where there are workers.
    """
    samples, steps = chosen.shape
    positions = _positions(sampler, chosen)
    total = int(max(positions.max() + 1, 0))
    # Trajectories that stop early run together, so that a batch ends with the last step that it needs.
    last = steps - 1 - chosen[:, ::-1].argmax(axis=1)
    order = np.argsort(last, kind="stable")
    batches = [order[start : start + sampler.batch] for start in range(0, samples, sampler.batch)]
    tasks = ((sampler, indices, positions[indices], int(last[indices].max())) for indices in batches)
    done = 0
    with atomic_folder(path) as folder:
        files: dict[str, Array] = {}
        if workers is None or shared is None:
            recorded: Iterable[Iterable[_Kept]] = (_visited(session, *task) for task in tasks)
        else:
            recorded = workers.map(_record_task, ((shared, *task) for task in tasks))
        for indices, visits in zip(batches, recorded, strict=True):
            for rows, arrays in visits:
                _write(files, folder, total, rows, arrays)
                done += len(indices)
                if advance is not None:
                    advance(done)
        for array in files.values():
            array.flush()  # type: ignore[attr-defined]
        archive_path = folder / "archive.npz"
        with zipfile.ZipFile(archive_path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in sorted(files.items()):
                entry = zipfile.ZipInfo(f"{name}.npy")  # without a date, so that one seed gives the same bytes
                with archive.open(entry, "w", force_zip64=True) as target, open(array.filename, "rb") as file:  # type: ignore[attr-defined]
                    shutil.copyfileobj(file, target)
        os.replace(archive_path, path)
    return total


def _positions(sampler: Sampler, chosen: Array) -> Array:
    """The row of the file for each sample, step and branch; -1 where nothing is kept."""
    samples, steps = chosen.shape
    generator = np.random.default_rng([sampler.seed, 5])
    rounds: list[tuple[int, float, int, int, int]] = []
    for step in range(steps):
        kept = generator.permutation(np.flatnonzero(chosen[:, step]))
        rounds += [
            (index * sampler.rows(step) + branch, float(generator.random()), int(sample), step, branch)
            for index, sample in enumerate(kept)
            for branch in range(sampler.rows(step))
        ]
    positions = np.full((samples, steps, 2), -1, np.int64)
    for row, (_, _, sample, step, branch) in enumerate(sorted(rounds)):
        positions[sample, step, branch] = row
    return positions


def _visited(session: Session, sampler: Sampler, indices: Array, positions: Array, last: int) -> Iterator[_Kept]:
    """What is kept of each step of a batch; ``positions`` is [samples, steps, branches]."""
    for visit in sampler.run(session, [int(index) for index in indices]):
        yield _kept(visit, positions[:, visit.step], sampler.denoiser.whole)
        if visit.step >= last:
            break


def _record_task(task: tuple[SharedModel, Sampler, Array, Array, int]) -> list[_Kept]:
    """One batch in a worker."""
    shared, sampler, indices, positions, last = task
    return list(_visited(shared.session(), sampler, indices, positions, last))


def _kept(visit: Visit, positions: Array, whole: set[str]) -> _Kept:
    """The rows of the file that hold inputs of one visit, and the inputs; ``positions`` is [samples, branches]."""
    count = len(positions)
    rows = np.concatenate([positions[:, 0], positions[:, 1]])
    kept = np.flatnonzero(rows >= 0)
    if not kept.size:
        return rows[kept], {}
    total = len(visit.raw)
    assert kept.max() < total and total in (count, 2 * count)
    arrays = {
        name: np.broadcast_to(array, (total, *array.shape)) if name in whole else array
        for name, array in visit.feed.items()
    }
    arrays[STEP_KEY] = np.full(total, visit.step, np.int64)
    return rows[kept], {name: array[kept] for name, array in arrays.items()}


def _write(files: dict[str, Array], folder: Path, total: int, rows: Array, arrays: dict[str, Array]) -> None:
    """Put inputs where they belong."""
    for name, array in arrays.items():
        if name not in files:
            file = folder / f"{len(files)}.npy"  # a name may hold what a path may not
            files[name] = np.lib.format.open_memmap(file, "w+", array.dtype, (total, *array.shape[1:]))
        files[name][rows] = array


class Trajectories:
    """Calibration inputs that a denoiser makes itself; recorded once, into a file that goes with this object.

    Args:
        sampler: What to run.
        session: The float denoiser.
        count: How many inputs, at most.
        trajectories: From how many samples.
        policy: Which steps (see :func:`onnxq.diffusion.selection.select`).
        influence: Of each step on the images [steps]; with it, inputs are spread by :func:`selection.by_influence`.
        advance: Called with the number of steps that are done.
        workers: Who runs the batches; ``None``: this process.
        shared: The model of ``session``, where there are workers.
    """

    def __init__(
        self,
        sampler: Sampler,
        session: Session,
        *,
        count: int,
        trajectories: int,
        policy: str = "uniform",
        influence: Array | None = None,
        advance: Advance | None = None,
        workers: Workers | None = None,
        shared: SharedModel | None = None,
    ) -> None:
        sampler.check()
        self.sampler, self.influence = sampler, influence
        steps = len(sampler.schedule.timesteps)
        branches = np.mean([sampler.rows(step) for step in range(steps)])
        kept = int(np.clip(round(count / branches / trajectories), 1, steps))
        if influence is None:
            chosen = select(policy, trajectories, sampler.schedule.timesteps, kept, sampler.seed)
        else:
            chosen = by_influence(influence, trajectories, kept, sampler.seed)
        if influence is not None or policy == "uniform":
            chosen[:trajectories, -1] = True  # the quietest step, where samples differ most: it takes many to judge it
        self._folder = tempfile.TemporaryDirectory(prefix="onnxq-trajectories-")
        path = Path(self._folder.name) / "trajectories.npz"
        record(sampler, session, chosen, path, advance, workers, shared)
        self.description = f"from {trajectories} trajectories of {steps} steps"
        self._archive = Npz(path, list(sampler.denoiser.specs))

    def __len__(self) -> int:
        return len(self._archive)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._archive)
