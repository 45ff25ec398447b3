"""What single channels of activations look like: extremes, mean magnitudes, and a few whole rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import InputSpec, Source, batches, inputs_of, row_count
from onnxq.calibration.recording import bytes_of_one, rows_at_once
from onnxq.runtime import Session

Array = np.ndarray[Any, Any]

KEPT_ROWS = 1024  # of each value: enough for the error of a layer's output
LARGEST_BATCH = 4


class ChannelStatistics:
    """Extremes, mean magnitude and some rows of a value, per channel.

    Attributes:
        low: The smallest value of each channel.
        high: The largest.
        rows: Part of the positions, [positions, channels]; spread evenly over what was seen.
    """

    def __init__(self) -> None:
        self.low: Array = np.empty(0)
        self.high: Array = np.empty(0)
        self.rows: Array = np.empty((0, 0), np.float32)
        self._magnitude: Array = np.empty(0)
        self._count = 0
        self._stride = 1  # every so manieth position is kept

    def update(self, values: Array, axis: int, only_finite: bool = False) -> None:
        """Add a tensor whose channels lie along ``axis``; positions with NaN or infinity are left out if so asked."""
        rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis]).astype(np.float32, copy=False)
        if only_finite:
            rows = rows[np.isfinite(rows).all(axis=1)]
        if not len(rows):
            return
        other = ChannelStatistics()
        other.low, other.high = rows.min(axis=0), rows.max(axis=0)
        other._magnitude, other._count = np.abs(rows).sum(axis=0, dtype=np.float64), len(rows)
        other._stride = self._stride
        other.rows = rows[-self._count % self._stride :: self._stride].copy()
        self.merge(other)

    def merge(self, other: ChannelStatistics) -> None:
        """Add what another one has seen."""
        if not other._count:
            return
        if not self._count:
            self.low, self.high, self.rows = other.low, other.high, other.rows
            self._magnitude, self._count, self._stride = other._magnitude, other._count, other._stride
        else:
            self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
            self._magnitude, self._count = self._magnitude + other._magnitude, self._count + other._count
            stride = max(self._stride, other._stride)
            kept = (self.rows[:: stride // self._stride], other.rows[:: stride // other._stride])
            self.rows, self._stride = np.concatenate(kept), stride
        while len(self.rows) > KEPT_ROWS:
            self.rows, self._stride = self.rows[::2].copy(), self._stride * 2

    @property
    def maxima(self) -> Array:
        """The largest magnitude of each channel."""
        return np.maximum(-self.low, self.high)

    @property
    def mean_magnitude(self) -> Array:
        """The mean magnitude of each channel."""
        return np.asarray(self._magnitude / max(1, self._count))


def record_channels(
    model: ir.Model,
    axes: Mapping[str, int],
    source: Source,
    specs: list[InputSpec],
    *,
    samples: int,
    device: str = "cpu",
    on_batch: Callable[[int], None] | None = None,
    only_finite: bool = False,
) -> dict[str, ChannelStatistics]:
    """Run the float graph over the calibration inputs and keep statistics of single channels.

    Args:
        model: The float graph.
        axes: The values to look at, and their channel axes.
        source: Calibration samples.
        specs: The model's inputs.
        samples: Use at most so many.
        device: ``cpu`` or ``cuda``.
        on_batch: Called with the number of samples after each batch.
        only_finite: Leave positions out that the model makes NaN of.
    """
    found = {name: ChannelStatistics() for name in axes}
    inputs = {spec.name for spec in specs}
    inner = [name for name in axes if name not in inputs]
    session = Session(model, taps=inner, device=device)
    size = rows_at_once(bytes_of_one(session, inner, source, specs), LARGEST_BATCH)
    done = 0
    for batch in batches(source, specs, batch_size=size, samples=samples):
        feed = inputs_of(batch, specs)
        values = dict(zip(inner, session.run(feed, inner), strict=True)) if inner else {}
        for name, statistics in found.items():
            statistics.update(values[name] if name in values else feed[name], axes[name], only_finite)
        done += row_count(feed, specs)
        if on_batch is not None:
            on_batch(done)
    return found
