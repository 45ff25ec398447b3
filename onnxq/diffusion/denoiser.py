"""What of an ONNX graph is the sample, the timestep and the condition of a denoiser, told from the graph alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import Array, InputSpec, fixed_batch, input_specs
from onnxq.diffusion.timestep_input import becomes_waves, is_called_timestep, table_rows
from onnxq.errors import OnnxqError
from onnxq.kinds import channel_axis
from onnxq.runtime import Feed
from onnxq.value_sizes import rows_that_fit

UNCONDITIONAL = ".unconditional"  # behind a condition's name: its one row for guidance
MOST_ROWS = 1 << 12
USUAL_LATENT_SIDE = 64  # of a sample whose size neither the model nor the user says


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
        channels: Those of the sample that are noisy; an output with twice as many predicts a variance too, which is
            dropped. Others beside them hold what the picture is made from, as the mask of inpainting.
        channel_axis: Their axis; 2 in a video whose frames come first, the last one in a sample of tokens.
        timestep_rows: Rows of the table that the timestep picks from, where there is one.
        most_rows: Samples that run at once.
    """

    specs: tuple[InputSpec, ...]
    sample: InputSpec
    timestep: InputSpec
    conditions: tuple[Condition, ...]
    output: str
    channels: int
    channel_axis: int = 1
    timestep_rows: int | None = None
    most_rows: int = MOST_ROWS

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of one sample's noise, and of its prediction."""
        sizes = [size or 1 for size in self.sample.shape]
        sizes[self.channel_axis] = self.channels
        return tuple(sizes[1:])

    @property
    def beside(self) -> int:
        """Channels of the sample that are not noisy."""
        return (self.sample.shape[self.channel_axis] or self.channels) - self.channels

    @property
    def beside_names(self) -> tuple[str, str]:
        """What those before the noisy ones are called among conditions, and those behind."""
        return f"{self.sample.name}.before", f"{self.sample.name}.behind"

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
        whole, total = self.whole, len(feed[self.sample.name])
        rows = fixed_batch(self.specs) or -(-total // -(-total // self.most_rows))  # parts of nearly the same size
        parts = []
        for start in range(0, total, rows):
            part = {name: array if name in whole else batch_rows(array, start, rows) for name, array in feed.items()}
            parts.append(session.run(part, [self.output])[0])
        predicted, wanted = np.concatenate([np.atleast_1d(part) for part in parts]), feed[self.sample.name].shape
        axis = self.channel_axis
        if len(predicted) < total or without_axis(predicted.shape, axis) != without_axis(wanted, axis):
            raise OnnxqError(
                f"expected a prediction of the sample's shape {list(wanted)}, found {list(predicted.shape)}",
                hint="the graph is not that of the denoiser; if it is one of several, write them all again",
            )
        noisy: Array = predicted[(slice(total), *[slice(None)] * (axis - 1), slice(self.channels))]
        return noisy


def without_axis(shape: Sequence[int | None], axis: int) -> list[int | None]:
    """The sizes of a sample but for its channels."""
    return [*shape[1:axis], *shape[axis + 1 :]]


def find(model: ir.Model) -> Denoiser:
    """The roles of the inputs of a denoiser.

    The sample is the float input of rank 2 or more whose shape an output repeats, but for channels: twice as many of
    them predict a variance too, and with fewer the sample has others beside its noise. Among inputs of rank 0 or 1 the
    timestep is a float one or one that becomes sines and cosines, that which is called so first; labels pick rows of a
    table.

    Raises:
        OnnxqError: there is no sample or no timestep, or the timestep has another rank or dtype.
    """
    specs = input_specs(model)
    values = {value.name: value for value in model.graph.inputs}
    found = next(_samples(model, specs), None)
    if found is None:
        shapes = ", ".join(f"{spec.name} {spec.dtype}{shown(spec.shape)}" for spec in specs)
        raise OnnxqError(
            f"expected a denoiser (a float sample and an output of its shape), found inputs {shapes}",
            hint="sampling is for denoisers; other models take --data, and `onnxq compare` judges them",
        )
    sample, output, axis, predicted = found
    others = [spec for spec in specs if spec is not sample]
    timestep = _timestep(others, values)
    tables = {spec.name: table_rows(values[spec.name]) for spec in others}
    conditions = tuple(
        Condition(spec, tables[spec.name] if spec.dtype.kind in "iu" and len(spec.shape) == 1 else None)
        for spec in others
        if spec is not timestep
    )
    channels = sample.shape[axis]
    if channels is None or None in sample.shape[1:]:
        raise OnnxqError(
            f"expected a sample of known size, found {sample.name!r} {shown(sample.shape)}",
            hint=f"give {sample.example(USUAL_LATENT_SIDE)} with your sizes, or export it with only its batch free",
        )
    noisy = min(channels, predicted or channels)
    table, rows = tables[timestep.name], rows_that_fit(model.graph, MOST_ROWS)
    return Denoiser(tuple(specs), sample, timestep, conditions, output, noisy, axis, table, rows)


def find_sample(model: ir.Model) -> InputSpec | None:
    """The input that :func:`find` takes for the sample, whatever size it has; ``None``: there is none."""
    found = next(_samples(model, input_specs(model)), None)
    return None if found is None else found[0]


def _samples(model: ir.Model, specs: Sequence[InputSpec]) -> Iterator[tuple[InputSpec, str, int, int | None]]:
    """Inputs that may be the sample, with the output, the axis of channels, and how many the output has if known."""
    for spec in specs:
        for value in model.graph.outputs:
            shape = [size if isinstance(size, int) else None for size in value.shape or ()]
            axis = channel_axis(spec.shape, shape) if spec.dtype.kind == "f" else None
            if axis is not None:
                yield spec, value.name or "", axis, shape[axis]


def _timestep(others: Sequence[InputSpec], values: Mapping[str | None, ir.Value]) -> InputSpec:
    numbers = [spec for spec in others if spec.dtype.kind != "b" and (len(spec.shape) <= 1 or spec.shape[1:] == (1,))]
    named = [spec for spec in others if is_called_timestep(spec.name)]
    embedded = [spec for spec in numbers if spec.dtype.kind == "f" or becomes_waves(values[spec.name])]
    candidates = embedded or [spec for spec in numbers if spec in named] or named or numbers
    if not candidates:
        raise OnnxqError(
            "expected an input for the timestep (one number a sample), found none",
            hint="export the denoiser with its timestep as an input of shape [batch] or []",
        )
    # Guidance is a float that becomes waves, too; without names a float is the timestep rather than whole numbers.
    chosen = min(candidates, key=lambda spec: (spec not in named, spec.dtype.kind != "f"))
    if chosen.dtype.kind not in "iuf" or len(chosen.shape) > 1:
        raise OnnxqError(
            f"expected integers or floats of shape [batch] or [] for the timestep, found {chosen.name!r} "
            f"{chosen.dtype}{shown(chosen.shape)}",
            hint="export the denoiser with its timestep as one number a sample",
        )
    return chosen


def batch_rows(array: Array, start: int, count: int) -> Array:
    """Some rows; the last is repeated where there are too few, for exports of a fixed batch."""
    index = np.minimum(np.arange(start, start + count), len(array) - 1)
    return array[start : start + count] if start + count <= len(array) else array[index]


def shown(shape: Sequence[int | None]) -> str:
    """A shape for an error, with ``any`` where it is free."""
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
