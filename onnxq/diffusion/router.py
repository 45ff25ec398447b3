"""Run a denoiser that has one graph for each group of sampler steps as if it were one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from onnxq import model as models
from onnxq.calibration.data import Array, Sample, Source
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.denoiser import Runnable
from onnxq.errors import OnnxqError
from onnxq.runtime import Feed, Session


class Router:
    """Send every call to the graph that serves its timestep.

    A sampler goes through the groups one after the other, so that one open session is enough.

    Args:
        index: The ``.groups.json`` that ``onnxq quantize --set lowering=subgraphs`` wrote, that of the engines that
            ``onnxq build`` made of it (they run on the GPU, with torch's CUDA build), or the ``.onnx`` of a denoiser
            that is one graph.
        device: ``cpu`` or ``cuda``.
        most_open: How many sessions stay open; each holds the weights once more.
        optimize: Whether onnxruntime may change the graphs, as in :class:`onnxq.runtime.Session`.

    Raises:
        OnnxqError: the index is damaged, a file that it names is missing or another denoiser's, or there is no GPU for
            its engines.
    """

    def __init__(
        self, index: str | os.PathLike[str], device: str = "cpu", most_open: int = 1, *, optimize: bool = True
    ) -> None:
        path = Path(index)
        one: list[dict[str, Any]] = [{"file": path.name, "timesteps": [0.0]}]
        entries = read_index(path) if path.suffix == ".json" else one
        self.files = files_of(path) if path.suffix == ".json" else [path]
        self.engines = [path.parent / entry["engine"] for entry in entries if "engine" in entry]
        self.runtimes = [str(entry.get("runtime", "")) for entry in entries]
        if self.engines:
            from onnxq.engines.execute import torch_with_gpu

            torch_with_gpu()
        _check_there(self.engines)
        pairs = [(float(time), number) for number, entry in enumerate(entries) for time in entry["timesteps"]]
        self.timesteps = np.asarray([time for time, _ in pairs])
        self.groups = np.asarray([number for _, number in pairs])
        self.denoiser = denoisers.find(models.read(self.files[0]))
        for file in self.files[1:]:
            _check_alike(self.denoiser, self.files[0], file)
        self.device, self.most_open, self.optimize = device, max(1, most_open), optimize
        self._sessions: dict[int, Runnable] = {}

    def group(self, timestep: float) -> int:
        """Which graph serves a timestep; one that the sampler does not visit gets that of the nearest."""
        return int(self.groups[np.abs(self.timesteps - timestep).argmin()])

    def predict(self, sample: Array, timestep: float | Array, **conditions: Array) -> Array:
        """What the denoiser predicts for a batch.

        Args:
            sample: The noisy samples [batch, channels, …].
            timestep: One number for all of them, as samplers call a network.
            **conditions: The other inputs by name.

        Returns:
            The prediction [batch, channels, …].

        Raises:
            OnnxqError: the batch mixes timesteps of different groups, or an input is missing or another.
        """
        self._serving(timestep)
        names = {item.spec.name for item in self.denoiser.conditions}
        if names != conditions.keys():
            raise OnnxqError(
                f"expected the conditions {', '.join(sorted(names)) or 'none'}, "
                f"found {', '.join(sorted(conditions)) or 'none'}",
                hint="pass them by the names of the model's inputs",
            )
        spec = self.denoiser.timestep
        given = np.asarray(timestep, spec.dtype).reshape(-1)
        given = given[:1].reshape(()) if not spec.shape else np.broadcast_to(given, (len(sample),))
        feed: dict[str, Array] = {
            self.denoiser.sample.name: np.asarray(sample, self.denoiser.sample.dtype),
            spec.name: given,
            **{
                item.spec.name: np.asarray(conditions[item.spec.name], item.spec.dtype)
                for item in self.denoiser.conditions
            },
        }
        return self.denoiser.predict(self, feed)

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        """Run one batch in the graph of its timestep, as :meth:`onnxq.runtime.Session.run` does in its own.

        Raises:
            OnnxqError: the batch mixes timesteps of different groups, or does not fit the graph.
        """
        return self._session(self._serving(feed[self.denoiser.timestep.name])).run(feed, outputs)

    def _serving(self, timestep: float | Array) -> int:
        """The group that serves all timesteps of a batch."""
        times = np.unique(np.asarray(timestep, np.float64))
        numbers = {self.group(float(time)) for time in times}
        if len(numbers) != 1:
            raise OnnxqError(
                f"expected timesteps of one group in a batch, found {len(numbers)}: {times[0]:g} … {times[-1]:g}",
                hint="call the denoiser for each timestep, as samplers do",
            )
        return numbers.pop()

    def _session(self, number: int) -> Runnable:
        session = self._sessions.pop(number, None)
        if session is None:
            session = self._opened(number)
        self._sessions[number] = session  # the last one used stands last
        while len(self._sessions) > self.most_open:
            self._sessions.pop(next(iter(self._sessions)))
        return session

    def _opened(self, number: int) -> Runnable:
        if not self.engines:
            return Session(self.files[number], device=self.device, optimize=self.optimize, spin=True)
        from onnxq.engines.execute import EngineSession

        return EngineSession(self.engines[number], self.runtimes[number])


class Served:
    """The samples of a source that one graph of a router serves.

    Args:
        source: All samples; each holds its timestep.
        router: Which graph serves which timestep.
        number: The graph.
    """

    def __init__(self, source: Source, router: Router, number: int) -> None:
        self.source, self.router, self.number = source, router, number

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Sample]:
        name = self.router.denoiser.timestep.name
        return (sample for sample in self.source if self.router.group(float(sample[name])) == self.number)


def files_of(index: Path) -> list[Path]:
    """The graphs that an index names.

    Raises:
        OnnxqError: the index is damaged, or a graph is missing.
    """
    files = [index.parent / entry["file"] for entry in read_index(index)]
    _check_there(files)
    return files


def _check_there(files: Sequence[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise OnnxqError(
                f"expected {file}, which the index names, found none", hint="move all files of the index together"
            )


def _check_alike(first: denoisers.Denoiser, first_file: Path, file: Path) -> None:
    """Every graph of an index has to take and give what the first one does."""
    hint = "the graphs of an index belong to one denoiser; write them all again"
    try:
        other = denoisers.find(models.read(file))
    except OnnxqError as error:
        raise OnnxqError(f"{error.message}, in {file.name}", hint=hint) from error
    wanted, found = (
        {"output": item.output, **{spec.name: (spec.dtype.name, list(spec.shape)) for spec in item.specs}}
        for item in (first, other)
    )
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise OnnxqError(
                f"expected {name!r} in {file.name} as in {first_file.name}, {wanted.get(name, 'absent')}, "
                f"found {found.get(name, 'absent')}",
                hint=hint,
            )


class Group(BaseModel):
    """One entry of an index."""

    model_config = ConfigDict(extra="allow", strict=True)

    file: str = Field(pattern=r"^[^\x00]+$")
    timesteps: list[FiniteFloat] = Field(min_length=1)
    steps: list[int] = []
    engine: str | None = Field(default=None, pattern=r"^[^\x00]+$")
    runtime: Literal["tensorrt", "tensorrt-rtx"] | None = None


class Index(BaseModel):
    """A ``.groups.json``."""

    groups: list[Group] = Field(min_length=1)

    @model_validator(mode="after")
    def _all_or_none(self) -> Index:
        if len({(group.engine is None, group.runtime) for group in self.groups}) > 1:
            raise ValueError("engines of one runtime for all groups or for none")
        return self


def read_index(path: Path) -> list[dict[str, Any]]:
    """The entries of an index: ``file``, ``steps`` and ``timesteps`` of each group.

    Raises:
        OnnxqError: the file is no such index.
    """
    try:
        index = Index.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # what pydantic raises is a ValueError
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        where = "" if first is None else ".".join(str(part) for part in first["loc"]) + ": "
        reason = str(error) if first is None else first["msg"]
        raise OnnxqError(
            f"expected an index of subgraphs at {path}, found {where}{' '.join(reason.split())[:120]}",
            hint="write it with `onnxq quantize … --set lowering=subgraphs`",
        ) from error
    return [group.model_dump(exclude_none=True) for group in index.groups]
