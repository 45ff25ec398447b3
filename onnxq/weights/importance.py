"""What an error in each layer's weight does to the outputs of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import layer_nodes
from onnxq.biases import bias_place
from onnxq.calibration.bias_correction import mean_shift
from onnxq.folding import array_of
from onnxq.job import Job
from onnxq.runtime import Session
from onnxq.sensitivity import batch_power, judged_samples

Array = np.ndarray[Any, Any]


def output_importance(job: Job, rounded: Mapping[str, Array], samples: int, corrected: bool) -> dict[str, float]:
    """Error at the outputs for each unit of squared error in a layer's weight, measured one layer at a time.

    The samples are those of the job: made or random ones without data. They rank layers as real ones do.

    Args:
        job: Before ``insert``.
        rounded: A weight a little off for each layer, by the name of the node, output channels first.
        samples: How many samples to run.
        corrected: Whether biases will take back the mean shift, which then must not count: on layers with few weights
            to a channel it is most of the error.
    """
    layers = [item for item in layer_nodes.weighted_nodes(job.model.graph) if item.node.name in rounded]
    means: Mapping[str, Array] = {}
    if corrected:
        job.observe({item.activation.name or "" for item in layers})
        means = job.observed.channel_means
    seen = judged_samples(Session(job.model, device=job.settings.device), job.source, job.specs, samples)
    found: dict[str, float] = {}
    with job.progress.stage("importance", "Trying layers", len(layers), "layers") as advance:
        for position, item in enumerate(layers):
            value, name = item.weight, item.node.name or ""
            assert value is not None
            kept, weight = value.const_value, array_of(value)
            shape = np.moveaxis(weight, item.channel_axis, 0).shape
            off = np.moveaxis(rounded[name].reshape(shape), 0, item.channel_axis)
            value.const_value = ir.tensor(np.ascontiguousarray(off, weight.dtype), name=value.name)
            try:
                with _shifted_bias(item, off - weight, means.get(item.activation.name or "")):
                    session = Session(job.model, device=job.settings.device)
                    powers = [batch_power(sample, session.run(sample.feed)) for sample in seen]
            finally:
                value.const_value = kept
            error = sum(sum(power.error.values()) for power in powers)
            found[name] = error / max(float(np.square(off - weight, dtype=np.float64).sum()), 1e-30)
            advance(position + 1)
    return found


@contextmanager
def _shifted_bias(item: layer_nodes.WeightedNode, error: Array, means: Array | None) -> Iterator[None]:
    """The layer's bias without the mean of what an error in its weight adds, for a while."""
    place = bias_place(item)
    bias = None if place is None else place.value
    shift = None if means is None else mean_shift(item, error.astype(np.float64), means)
    if bias is None or bias.const_value is None or shift is None or shift.size != bias.const_value.size:
        yield
        return
    kept, values = bias.const_value, array_of(bias)
    bias.const_value = ir.tensor((values - shift.reshape(values.shape)).astype(values.dtype), name=bias.name)
    try:
        yield
    finally:
        bias.const_value = kept
