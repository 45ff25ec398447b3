"""A side-car file of statistics: what a model would remember of its data if it still had BatchNormalization.

Who has the data writes it once; who has only the model makes calibration inputs from it. It holds the mean and the
standard deviation of every channel of every convolution's output, and no sample.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.calibration.archives import read_arrays
from onnxq.calibration.data import Source, batches, input_specs, inputs_of, row_count
from onnxq.calibration.recording import HELD_BYTES_PER_BATCH, bytes_of_one, rows_at_once
from onnxq.errors import OnnxqError
from onnxq.runtime import Session
from onnxq.serialized import serialize

Array = np.ndarray[Any, Any]

META = "onnxq.statistics"  # where a graph keeps what a side-car says
MEAN, DEVIATION = "/mean", "/deviation"
BATCH = 4  # few, because every tapped value of a batch is in memory at once


def tapped(graph: ir.Graph) -> list[str]:
    """The values whose statistics a side-car holds: outputs of convolutions with constant weights, in graph order."""
    layers = (item.node for item in layer_nodes.weighted_nodes(graph) if graphs.is_constant(item.weight))
    found = [node.outputs[0] for node in layers if graphs.is_op(node, "Conv", "ConvTranspose")]
    return [value.name or "" for value in found if graphs.is_float(value)]


def record(
    model: ir.Model, source: Source, *, samples: int | None = None, on_batch: Callable[[int], None] | None = None
) -> dict[str, Array]:
    """The arrays of a side-car: NAME/mean and NAME/deviation, [channels] each.

    Args:
        model: The float model as :func:`onnxq.model.load` gives it.
        source: Samples.
        samples: Use at most so many.
        on_batch: Called with the number of samples after each batch.

    Raises:
        OnnxqError: the model has no convolutions, or the data is not what it needs.
    """
    names, specs = tapped(model.graph), input_specs(model)
    if not names:
        raise OnnxqError(
            "expected convolutions, whose outputs a side-car describes, found none in the model",
            hint="give --data where the model is quantized",
        )
    session, moments, done = Session(serialize(model, names)), _Moments(), 0
    size = rows_at_once(bytes_of_one(session, names, source, specs), BATCH, HELD_BYTES_PER_BATCH)
    for batch in batches(source, specs, batch_size=size, samples=samples):
        feed = inputs_of(batch, specs)
        for name, value in zip(names, session.run(feed, names), strict=True):
            moments.add(name, value)
        done += row_count(feed, specs)
        if on_batch is not None:
            on_batch(done)
    return moments.arrays()


def attach(model: ir.Model, path: Path) -> None:
    """Let the model remember what a side-car says, beside what its BatchNormalization does.

    Args:
        model: The float model as :func:`onnxq.model.load` gives it.
        path: The side-car.

    Raises:
        OnnxqError: the file is none, or it is of another model.
    """
    found = _read(path)
    values = graphs.values(model.graph)
    for name, (mean, deviation) in found.items():
        value = values.get(name)
        channels = None if value is None or value.shape is None or len(value.shape) < 2 else value.shape[1]
        if value is None:
            raise OnnxqError(
                f"expected statistics of values of the model in {path}, found such of {name!r}, which it has not",
                hint="record them with `onnxq statistics` on this very model",
            )
        sizes = {mean.shape, deviation.shape, (channels if isinstance(channels, int) else mean.size,)}
        if len(sizes) != 1:
            raise OnnxqError(
                f"expected a mean and a deviation for each of the {channels} channels of {name!r} in {path}, found "
                f"{mean.size} and {deviation.size}",
                hint="record them with `onnxq statistics` on this very model",
            )
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation >= 0).all()):
            raise OnnxqError(
                f"expected finite means and deviations of at least 0 for {name!r} in {path}, found others",
                hint="record them with `onnxq statistics` again",
            )
    model.graph.meta[META] = found


def attached(model: ir.Model) -> dict[str, tuple[Array, Array]]:
    """What :func:`attach` let the model remember: mean and deviation of each channel, by the name of the value."""
    found: dict[str, tuple[Array, Array]] = model.graph.meta.get(META, {})
    return found


def _read(path: Path) -> dict[str, tuple[Array, Array]]:
    hint = "write it with `onnxq statistics MODEL --data PATH -o FILE`"
    read = read_arrays(path, what="an npz of statistics", hint=hint)
    if any(array.dtype.kind not in "fiub" for array in read.values()):
        raise OnnxqError(f"expected an npz of statistics at {path}, found arrays that hold no numbers", hint=hint)
    arrays = {key: array.astype(np.float32) for key, array in read.items()}
    names = [key.removesuffix(MEAN) for key in arrays if key.endswith(MEAN)]
    if not names or {name + end for name in names for end in (MEAN, DEVIATION)} != set(arrays):
        raise OnnxqError(
            f"expected a mean and a deviation of each value in {path}, found {', '.join(sorted(arrays)[:3]) or 'none'}",
            hint="write it with `onnxq statistics MODEL --data PATH -o FILE`",
        )
    return {name: (arrays[name + MEAN], arrays[name + DEVIATION]) for name in names}


class _Moments:
    """Sums of every channel, in double precision."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Array) -> None:
        rows = np.moveaxis(value, 1, -1).reshape(-1, value.shape[1]).astype(np.float64)
        self._sums[name] = self._sums.get(name, 0.0) + np.stack([rows.sum(0), np.square(rows).sum(0)])
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def arrays(self) -> dict[str, Array]:
        found = {}
        for name, sums in self._sums.items():
            mean, square = sums / self._counts[name]
            found[name + MEAN] = mean.astype(np.float32)
            found[name + DEVIATION] = np.sqrt(np.maximum(square - mean**2, 0)).astype(np.float32)
        return found
