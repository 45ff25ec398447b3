"""What an error in each layer's weight does to the outputs of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.folding import array_of
from onnxq.job import Job
from onnxq.runtime import Session
from onnxq.sensitivity import batch_power, judged_samples

Array = np.ndarray[Any, Any]


def output_importance(job: Job, rounded: Mapping[str, Array], samples: int) -> dict[str, float]:
    """Error at the outputs for each unit of squared error in a layer's weight, measured one layer at a time.

    The samples are those of the job: random ones without data. They rank layers as real ones do.

    Args:
        job: Before ``insert``.
        rounded: A weight a little off for each layer, by the name of the node, output channels first.
        samples: How many samples to run.
    """
    seen = judged_samples(Session(job.model, device=job.settings.device), job.source, job.specs, samples)
    found: dict[str, float] = {}
    layers = [item for item in graphs.weighted_nodes(job.model.graph) if item.node.name in rounded]
    with job.progress.stage("importance", "Trying layers", len(layers), "layers") as advance:
        for position, item in enumerate(layers):
            value, name = item.weight, item.node.name or ""
            assert value is not None
            kept, weight = value.const_value, array_of(value)
            shape = np.moveaxis(weight, item.channel_axis, 0).shape
            off = np.moveaxis(rounded[name].reshape(shape), 0, item.channel_axis)
            value.const_value = ir.tensor(np.ascontiguousarray(off, weight.dtype), name=value.name)
            try:
                session = Session(job.model, device=job.settings.device)
                powers = [batch_power(sample, session.run(sample.feed)) for sample in seen]
            finally:
                value.const_value = kept
            error = sum(sum(power.error.values()) for power in powers)
            found[name] = error / max(float(np.square(off - weight, dtype=np.float64).sum()), 1e-30)
            advance(position + 1)
    return found
