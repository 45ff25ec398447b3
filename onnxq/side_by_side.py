"""The float model beside a quantized graph, on the samples that this graph serves: outputs, layers, latency."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import kinds, shapes
from onnxq import model as models
from onnxq.calibration import data as inputs
from onnxq.calibration.causality import sees_what_follows
from onnxq.calibration.data import STEP_KEY, Source, Spread
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.router import Router, Served
from onnxq.errors import OnnxqError
from onnxq.report.layers import common_layers, measure
from onnxq.report.metrics import OutputsSqnr
from onnxq.report.quality import Quality
from onnxq.runtime import Array, Session, latency_ms
from onnxq.serialized import IN_MEMORY_LIMIT_BYTES

Model = ir.Model | str | os.PathLike[str]
Progress = Callable[[str, int], None]  # stage, samples done by this step

TIMED_SECONDS = 2.0
BATCH_SIZE = 4  # small: both models' activations are in memory at once


@dataclass(frozen=True)
class Part:
    """A quantized graph with the samples that it serves: all of them, unless there is one for each group of steps.

    Attributes:
        model: The graph, by path or in memory.
        source: Its samples.
        limit: How many of them to use; all if ``None``.
        steps: How many sampler steps it serves.
        read: The graph, where it has been read already.
    """

    model: Model
    source: Source
    limit: int | None = None
    steps: int = 1
    read: ir.Model | None = None

    @functools.cached_property
    def samples(self) -> int:
        """How many samples there are to use."""
        count = len(self.source)
        return count if self.limit is None else min(count, self.limit)

    @functools.cached_property
    def graph(self) -> ir.Model:
        """The graph, read once."""
        return opened(self.model) if self.read is None else self.read


def parts_of(router: Router, first: ir.Model, source: Source, samples: int | None) -> list[Part]:
    """The graphs that serve any of the samples.

    Args:
        router: The index.
        first: Its first graph, read.
        source: The samples.
        samples: How many of them to use; all if ``None``.

    Raises:
        OnnxqError: the router is one of engines.
    """
    if router.engines:
        raise OnnxqError(
            "expected an index of graphs, found one of engines",
            hint="compare the index that they were built of; onnxq.diffusion.router.Router runs the engines",
        )
    chosen = source if samples is None else Spread(source, samples)
    parts = [
        Part(
            file,
            Served(chosen, router, number),
            steps=int(np.sum(router.groups == number)),
            read=None if number else first,
        )
        for number, file in enumerate(router.files)
    ]
    parts = [part for part in parts if part.samples]
    if not parts:
        raise OnnxqError("expected at least one sample, found none", hint="check --data and --samples")
    return parts


class Bench:
    """The float model and what both are given.

    Args:
        model: The float model, by path or in memory.
        original: The same, read.
        specs: The inputs.
        device: ``cpu`` or ``cuda``.
        progress: Called with the stage and the number of samples done.
    """

    def __init__(
        self, model: Model, original: ir.Model, specs: list[inputs.InputSpec], device: str, progress: Progress | None
    ) -> None:
        self.model, self.original, self.specs, self.device, self.progress = model, original, specs, device, progress
        self.large = models.initializer_bytes(original) > IN_MEMORY_LIMIT_BYTES
        self.timestep = _timestep(original)

    def outputs(self, parts: Sequence[Part], seen_samples: int) -> tuple[list[Quality], Quality]:
        """What the optimised sessions answer.

        Args:
            parts: The quantized graphs.
            seen_samples: Samples of each that :meth:`layers` will be given.

        Returns:
            How alike the answers are for each part, and for those first samples alone.
        """
        if self.large:  # both run in parts, and the quantized one literally: optimised, all of it would be in memory
            for model in (self.original, *(part.graph for part in parts)):
                shapes.infer(model)
        # What draws at random is the same for both where it is read here, and not where onnxruntime reads the file.
        is_read = self.large or graphs.draws_at_random(self.original)
        with _blaming("float"):
            float_session = Session(self.original if is_read else self.model, device=self.device)
        names = float_session.output_names
        # The next token has no perplexity where it was seen.
        writes = sees_what_follows(self.original, self.specs, float_session) is not True
        found, seen = [], Quality(names)
        for part in parts:
            literal = self.large or graphs.holds_narrow_floats(part.graph.graph)
            with _blaming("quantized"):
                session = Session(part.graph if is_read else part.model, device=self.device, optimize=not literal)
            quality, count = Quality(names, writes=writes), 0
            for batch, feed in self._feeds(part, part.limit, "compare"):
                expected, answers = float_session.run(feed), session.run(feed, names)
                labels = None if "labels" in feed else batch.get("labels")
                quality.update(feed, expected, answers, labels, self._keys(batch, feed))
                if count < seen_samples:
                    seen.update(feed, expected, answers)
                count += rows_of(feed)
            found.append(quality)
        return found, seen

    def latency_ms(self, parts: Sequence[Part], threads: int) -> dict[str, float]:
        """Median milliseconds of both models on one sample; the mean over sampler steps where these have own graphs."""
        steps, total = sum(part.steps for part in parts), dict.fromkeys(("float", "quantized"), 0.0)
        for part in parts:
            batch = next(inputs.batches(part.source, self.specs, batch_size=1, samples=1))
            sessions = {
                "float": Session(self.model, device=self.device, threads=threads, spin=True),
                "quantized": Session(part.model, device=self.device, threads=threads, spin=True),
            }
            for key, milliseconds in latency_ms(
                sessions, inputs.inputs_of(batch, self.specs), seconds=TIMED_SECONDS / len(parts)
            ).items():
                total[key] += milliseconds * part.steps / steps
        return total

    def layers(self, parts: Sequence[Part], samples: int, *, inner: bool) -> tuple[OutputsSqnr, list[dict[str, Any]]]:
        """The literal sessions' error: of the outputs, and of each layer if ``inner``, worst first.

        A layer that several graphs have counts as in the graph where it is worst.
        """
        named = _named(self.model, self.original)
        total, layers = OutputsSqnr(), []
        for part in parts:
            limit = samples if part.limit is None else min(part.limit, samples)
            feeds = (feed for _, feed in self._feeds(part, limit, "layers"))
            common = common_layers(named, part.graph) if inner else []
            literal, found = measure(named, part.graph, feeds, common, device=self.device)
            total.merge(literal)
            layers += found
        worst: dict[str, dict[str, Any]] = {}
        for layer in sorted(layers, key=lambda layer: float(layer["sqnr_db"])):
            worst.setdefault(layer["name"], layer)
        return total, list(worst.values())

    def _feeds(self, part: Part, limit: int | None, stage: str) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
        for batch in inputs.batches(part.source, self.specs, batch_size=BATCH_SIZE, samples=limit):
            feed = inputs.inputs_of(batch, self.specs)
            yield batch, feed
            if self.progress is not None:
                self.progress(stage, rows_of(feed))

    def _keys(self, batch: Mapping[str, Array], feed: Mapping[str, Array]) -> dict[str, Array]:
        """What tells a denoiser's rows apart: the sampler's step, where the data has it, and the timestep."""
        keys = {STEP_KEY: batch[STEP_KEY]} if STEP_KEY in batch and STEP_KEY not in feed else {}
        if self.timestep is not None:
            keys["timestep"] = np.broadcast_to(feed[self.timestep], rows_of(feed))
        return keys


def _timestep(model: ir.Model) -> str | None:
    """The name of a denoiser's timestep."""
    try:
        return denoisers.find(model).timestep.name if kinds.kind_of(model) == kinds.Kind.DENOISER else None
    except OnnxqError:
        return None


def rows_of(feed: Mapping[str, Array]) -> int:
    """How many samples a batch holds."""
    first = next(iter(feed.values()))
    return len(first) if first.ndim else 1


def opened(model: Model) -> ir.Model:
    """The graph of a model that may be given by path.

    Raises:
        OnnxqError: it cannot be read, or its sizes are absurd.
    """
    if isinstance(model, ir.Model):
        return model
    found = models.read(model)
    shapes.infer(found)
    shapes.check_sizes(found, os.path.basename(model))
    return found


def _named(model: Model, opened: ir.Model) -> ir.Model:
    """The float model as the quantizer sees it: normalised, so that nodes and values have the same names."""
    if isinstance(model, ir.Model):
        return model
    try:
        return models.load(model)
    except OnnxqError:
        return opened  # made by another tool from a model that onnxq itself would refuse


class _blaming:  # noqa: N801  reads as a phrase: with _blaming("float")
    """Say which of the two models onnxruntime refuses."""

    def __init__(self, which: str) -> None:
        self.which = which

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OnnxqError):
            raise OnnxqError(f"{self.which} model: {error.message}", hint=error.hint) from error
