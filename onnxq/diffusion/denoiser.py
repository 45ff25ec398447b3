"""What of an ONNX graph is the sample, the timestep and the condition of a denoiser, told from the graph alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.calibration.archives import read_arrays
from onnxq.calibration.data import Array, InputSpec, fixed_batch, input_specs
from onnxq.errors import OnnxqError
from onnxq.runtime import Feed

USUAL_LATENT_SIDE = 64  # of a sample whose size neither the model nor the user says
TIMESTEP_NAMES = ("t", "timestep", "timesteps", "time", "time_step", "sigma", "step")
BETWEEN_INPUT_AND_EMBEDDING = (
    "Cast", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Mul", "Div", "Add", "Sub", "Identity", "Flatten", "Neg",
    "Log", "Clip",
)  # fmt: skip
DEEPEST_EMBEDDING = 10


class Runnable(Protocol):
    """What runs a batch: a session, or a router with one for each group of steps."""

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        """The named outputs for a batch."""


@dataclass(frozen=True)
class Condition:
    """An input beside sample and timestep.

    Attributes:
        spec: The input.
        classes: How many rows the table has that a class label picks from; ``None`` for anything but labels.
    """

    spec: InputSpec
    classes: int | None

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class": by custom the last row of the table."""
        return None if self.classes is None else self.classes - 1


@dataclass(frozen=True)
class Denoiser:
    """The roles of a denoiser's inputs and output.

    Attributes:
        specs: All inputs.
        sample: The noisy sample [batch, channels, …].
        timestep: A number for each sample, or one for the batch (rank 0).
        conditions: The other inputs.
        output: The output that has the sample's shape.
        channels: The sample's channels; an output with twice as many predicts a variance too, which is dropped.
        timestep_rows: Rows of the table that the timestep picks from, where there is one.
    """

    specs: tuple[InputSpec, ...]
    sample: InputSpec
    timestep: InputSpec
    conditions: tuple[Condition, ...]
    output: str
    channels: int
    timestep_rows: int | None = None

    @property
    def whole(self) -> set[str]:
        """Names of the inputs without a batch axis."""
        return {spec.name for spec in self.specs if spec.is_whole}

    def timesteps(self, value: float, count: int) -> Array:
        """The timestep input for ``count`` samples; an integer input gets the nearest integer."""
        number = round(value) if self.timestep.dtype.kind in "iu" else value
        return np.full(() if self.timestep.is_whole else (count,), number, self.timestep.dtype)

    def predict(self, session: Runnable, feed: Mapping[str, Array]) -> Array:
        """The network's prediction for a batch of any size, whatever batch the export is fixed to.

        Raises:
            OnnxqError: its output is none of the sample's shape.
        """
        fixed = fixed_batch(self.specs)
        whole, total = self.whole, len(feed[self.sample.name])
        parts = []
        for start in range(0, total, fixed or total):
            part = {
                name: array if name in whole else _rows(array, start, fixed or total) for name, array in feed.items()
            }
            parts.append(session.run(part, [self.output])[0])
        predicted, wanted = np.concatenate([np.atleast_1d(part) for part in parts]), feed[self.sample.name].shape
        if predicted.ndim < 2 or len(predicted) < total or predicted.shape[2:] != wanted[2:]:
            raise OnnxqError(
                f"expected a prediction of the sample's shape {list(wanted)}, found {list(predicted.shape)}",
                hint="the graph is not that of the denoiser; if it is one of several, write them all again",
            )
        return predicted[:total, : self.channels]


def find(model: ir.Model) -> Denoiser:
    """The roles of the inputs of a denoiser.

    The sample is the float input of rank 3 or more whose shape an output repeats. Among inputs of rank 0 or 1 the
    timestep is the float one, or what becomes sines and cosines, or what is called so; labels pick rows of a table.

    Raises:
        OnnxqError: there is no sample or no timestep, or the timestep has another rank or dtype.
    """
    specs = input_specs(model)
    values = {value.name: value for value in model.graph.inputs}
    found = next(_samples(model, specs), None)
    if found is None:
        shapes = ", ".join(f"{spec.name} {spec.dtype}{_shown(spec.shape)}" for spec in specs)
        raise OnnxqError(
            f"expected a denoiser (a float sample and an output of its shape), found inputs {shapes}",
            hint="sampling is for denoisers; other models take --data, and `onnxq compare` judges them",
        )
    sample, output = found
    others = [spec for spec in specs if spec is not sample]
    timestep = _timestep(others, values)
    tables = {spec.name: _table_rows(values[spec.name]) for spec in others}
    conditions = tuple(
        Condition(spec, tables[spec.name] if spec.dtype.kind in "iu" and len(spec.shape) == 1 else None)
        for spec in others
        if spec is not timestep
    )
    channels = sample.shape[1]
    if channels is None or None in sample.shape[2:]:
        raise OnnxqError(
            f"expected a sample of known size, found {sample.name!r} {_shown(sample.shape)}",
            hint=f"give {sample.example(USUAL_LATENT_SIDE)} with your sizes, or export it with only its batch free",
        )
    return Denoiser(tuple(specs), sample, timestep, conditions, output, channels, tables[timestep.name])


def _samples(model: ir.Model, specs: Sequence[InputSpec]) -> Iterator[tuple[InputSpec, str]]:
    for spec in specs:
        for value in model.graph.outputs:
            shape = list(value.shape or ())
            if spec.dtype.kind != "f" or len(spec.shape) < 3 or len(shape) != len(spec.shape):
                continue
            pairs = list(zip(spec.shape, shape, strict=True))
            channels, found = pairs[1]
            same = all(a is None or not isinstance(b, int) or a == b for a, b in pairs[2:])
            if same and (channels is None or not isinstance(found, int) or found in (channels, 2 * channels)):
                yield spec, value.name or ""


def _timestep(others: Sequence[InputSpec], values: Mapping[str | None, ir.Value]) -> InputSpec:
    numbers = [spec for spec in others if len(spec.shape) <= 1 or spec.shape[1:] == (1,)]
    named = [spec for spec in others if spec.name.lower() in TIMESTEP_NAMES]
    candidates = [spec for spec in numbers if spec.dtype.kind == "f"]
    candidates = candidates or [spec for spec in numbers if _becomes_waves(values[spec.name])]
    candidates = candidates or [spec for spec in numbers if spec in named] or named or numbers
    if not candidates:
        raise OnnxqError(
            "expected an input for the timestep (one number a sample), found none",
            hint="export the denoiser with its timestep as an input of shape [batch] or []",
        )
    chosen = candidates[0]
    if chosen.dtype.kind not in "iuf" or len(chosen.shape) > 1:
        raise OnnxqError(
            f"expected integers or floats of shape [batch] or [] for the timestep, found {chosen.name!r} "
            f"{chosen.dtype}{_shown(chosen.shape)}",
            hint="export the denoiser with its timestep as one number a sample",
        )
    return chosen


def _becomes_waves(value: ir.Value) -> bool:
    """Whether sines or cosines are taken of the value: the usual embedding of time."""
    return any(graphs.is_op(node, "Sin", "Cos") for node, _ in _readers(value))


def _table_rows(value: ir.Value) -> int | None:
    """Rows of the constant table that the value picks from, if it is an index."""
    for node, index in _readers(value):
        table = node.inputs[0]
        if graphs.is_op(node, "Gather") and index == 1 and table is not None and graphs.is_constant(table):
            rows = table.shape[0] if table.shape is not None and len(table.shape) == 2 else None
            if isinstance(rows, int):
                return rows
    return None


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """What reads the value, if only through conversions and arithmetic."""
    level = [value]
    for _ in range(DEEPEST_EMBEDDING):
        following: list[ir.Value] = []
        for item in level:
            for node, index in graphs.consumers(item):
                yield node, index
                if graphs.is_op(node, *BETWEEN_INPUT_AND_EMBEDDING):
                    following.append(node.outputs[0])
        level = following


def _rows(array: Array, start: int, count: int) -> Array:
    """Some rows; the last is repeated where there are too few."""
    index = np.minimum(np.arange(start, start + count), len(array) - 1)
    return array[start : start + count] if start + count <= len(array) else array[index]


def _shown(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def open_conditions(path: Path | None, denoiser: Denoiser) -> dict[str, Array]:
    """Rows for the conditions that cannot be drawn (embeddings of text, images, …).

    Args:
        path: An ``.npz`` keyed by input name; ``NAME.unconditional`` holds one row for guidance.
        denoiser: The denoiser.

    Raises:
        OnnxqError: an array is missing, or has another shape.
    """
    needed = [item.spec for item in denoiser.conditions if item.classes is None]
    if not needed:
        return {}
    names = ", ".join(repr(spec.name) for spec in needed)
    if path is None:
        raise OnnxqError(
            f"expected values for the condition {names}, which are not class labels, found none",
            hint=f"give --conditions FILE.npz with rows under {needed[0].name!r}",
        )
    hint = f"write it with np.savez, keyed by input name: {names}"
    found = read_arrays(path, what="an .npz of conditions", hint=hint)
    for spec in needed:
        array = found.get(spec.name)
        fits = array is not None and len(array.shape) == len(spec.shape) and len(array) > 0
        sizes = () if array is None else array.shape if spec.is_whole else array.shape[1:]
        if array is None or not fits or any(a not in (None, b) for a, b in zip(spec.row_shape, sizes, strict=True)):
            raise OnnxqError(
                f"expected {'an array' if spec.is_whole else 'rows'} of shape {_shown(spec.shape)} under "
                f"{spec.name!r} in {path}, found {'nothing' if array is None else list(array.shape)}",
                hint="one row for each condition along the first axis; one array where the input has no batch axis",
            )
    return {name: np.asarray(array) for name, array in found.items()}
