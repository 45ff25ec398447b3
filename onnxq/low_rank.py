"""Low-rank correction of any recipe's weights: which layers get it, and from what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnxq.calibration.channels import ChannelStatistics, record_channels
from onnxq.calibration.noise import Noise
from onnxq.errors import OnnxqError
from onnxq.folding import array_of
from onnxq.learning.channel_scales import weight_specs
from onnxq.passes.add_low_rank import ENDINGS, AddLowRank, takes_low_rank
from onnxq.passes.smooth_activations import groups
from onnxq.weights.low_rank import Factors, Salience, factors_of

if TYPE_CHECKING:
    from onnxq.job import Job

SAMPLES = 128
FACTORS = "int8"  # the thin matrices: a quarter of float's bytes, and their error is of second order


def add_low_rank(job: Job, rank: int) -> None:
    """Split the weights that are going to be rounded, and leave the thin products in 8 bits with float inputs.

    Layers whose smaller side is below twice the rank are left as they are: a product would not be thin.

    Args:
        job: Before :meth:`Job.insert`, with a graph that is prepared.
        rank: Of the products.

    Raises:
        OnnxqError: no layer can have one.
    """
    specs = weight_specs(job.target.place(job.model.graph, job.scheme, job.settings.left_out, job.exceptions))
    found = []
    for group in groups(job.model.graph):
        for item in group.layers:
            if item.node in specs and takes_low_rank(item) and min(array_of(item.weight).shape) >= 2 * rank:
                found.append((group, item))
    if not found:
        raise OnnxqError(
            f"expected MatMul or Gemm layers of at least {2 * rank} inputs and outputs that get quantized weights, "
            "found none",
            hint="use a smaller --low-rank, or leave it out",
        )
    recorded: dict[str, ChannelStatistics] = {}
    if not isinstance(job.source, Noise):
        total = min(SAMPLES, len(job.source), job.settings.samples or SAMPLES)
        axes = {group.name: group.axis for group, _ in found}
        with job.progress.stage("channels", "Recording channels", total) as advance:
            recorded = record_channels(
                job.model, axes, job.source, job.specs, samples=total, device=job.settings.device, on_batch=advance
            )
    factors: dict[str, Factors] = {}
    saliences: dict[str, Salience] = {}
    with job.progress.stage("low_rank", "Low-rank products", len(found)) as advance:
        for index, (group, item) in enumerate(found):
            if group.name in recorded and group.name not in saliences:
                saliences[group.name] = Salience(recorded[group.name].rows)
            matrix = np.moveaxis(array_of(item.weight), item.channel_axis, 0)
            spec, salience = specs[item.node], saliences.get(group.name)
            factors[item.node.name or ""] = factors_of(matrix, spec, rank, salience, job.settings.seed)
            advance(index + 1)
    AddLowRank(factors)(job.model)
    thin = job.target.scheme(FACTORS, "float")
    job.exceptions |= {f"{name}_{ending}": thin for name in factors for ending in ENDINGS}
    left = float(np.mean([item.error for item in factors.values()]))
    job.measurements["low_rank"] = {"rank": rank, "layers": len(factors), "error_left": left}
