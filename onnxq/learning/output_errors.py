"""What an error in a weight does to the outputs of its layers, on a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from onnxq import layer_nodes
from onnxq.calibration.data import batches, inputs_of, row_count
from onnxq.calibration.recording import HELD_BYTES_PER_BATCH, bytes_of_one, rows_at_once
from onnxq.job import Job
from onnxq.learning.hessian import Hessian, Layer, layer
from onnxq.runtime import Session
from onnxq.weights.float_weights import FloatWeight

Array = np.ndarray[Any, Any]

BATCH = 8


class OutputError:
    """Σ ‖e·x‖² over the layers that read a weight, as the quadratic form e·E[x·xᵀ]·eᵀ of each row.

    Args:
        layer: One of the layers, for the weight's geometry.
        products: E[x·xᵀ], [groups, columns, columns], summed over the layers.
        per_channel: Whether each row of the weight has a scale of its own; otherwise all of it is one row.
    """

    def __init__(self, layer: Layer, products: Array, per_channel: bool) -> None:
        self.layer, self.products, self.per_channel = layer, products.astype(np.float32), per_channel

    def __call__(self, difference: Array, part: slice) -> Array:
        """The error of each row.

        Args:
            difference: Errors of some rows, [rows, elements].
            part: Which rows of the weight they are.
        """
        if not self.per_channel:
            matrix = self.layer.matrix(torch.from_numpy(difference.reshape(self.layer.shape))).numpy()
            return np.asarray(np.einsum("grc,gcd,grd->", matrix, self.products, matrix, optimize=True)).reshape(1)
        rows = self._rows()
        errors = np.empty(len(difference))
        numbers = np.arange(part.start or 0, (part.start or 0) + len(difference)) // rows
        for group in np.unique(numbers):
            chosen = difference[numbers == group]
            errors[numbers == group] = np.einsum("rc,rc->r", chosen @ self.products[group], chosen, dtype=np.float64)
        return np.maximum(errors, 0)

    def _rows(self) -> int:
        outputs = self.layer.shape[self.layer.item.channel_axis]
        return max(1, outputs // self.layer.groups)


def output_errors(job: Job, weights: Sequence[FloatWeight], samples: int) -> dict[str, OutputError]:
    """Run the float graph over a few samples; the errors of all weights that are matrices or kernels.

    Args:
        job: Before ``insert``.
        weights: The weights.
        samples: How many samples.

    Returns:
        By the weight's name.
    """
    readers: dict[str, list[Layer]] = {}
    names = {node: weight.name for weight in weights for node in weight.nodes}
    for item in layer_nodes.weighted_nodes(job.model.graph):
        found = layer(item) if (item.node.name or "") in names else None
        if found is not None:
            readers.setdefault(names[item.node.name or ""], []).append(found)
    shared: dict[tuple[object, ...], tuple[Layer, Hessian]] = {
        reader.geometry: (reader, Hessian()) for found in readers.values() for reader in found
    }
    given = {spec.name for spec in job.specs}
    taps = sorted({reader.activation for reader, _ in shared.values()} - given)
    session = Session(job.model, taps=taps, device=job.settings.device)
    done = 0
    with job.progress.stage("outputs", "Recording inputs of layers", samples) as advance:
        size = rows_at_once(bytes_of_one(session, taps, job.source, job.specs), BATCH, HELD_BYTES_PER_BATCH)
        for batch in batches(job.source, job.specs, batch_size=size, samples=samples):
            feed = inputs_of(batch, job.specs)
            values = dict(zip(taps, session.run(feed, taps), strict=True)) | feed
            for reader, hessian in shared.values():
                hessian.update(reader, torch.from_numpy(values[reader.activation].astype(np.float32)))
            done += row_count(feed, job.specs)
            advance(min(done, samples))
    axes = {weight.name: weight.axis for weight in weights}
    return {
        name: OutputError(
            found[0],
            np.sum([shared[reader.geometry][1].value.cpu().numpy() for reader in found], axis=0),
            axes[name] is not None,
        )
        for name, found in readers.items()
        if len({reader.shape for reader in found}) == 1 and axes[name] in (None, found[0].item.channel_axis)
    }
