"""AWQ: weights that meet large activations are scaled up before they are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.calibration import calibrate, observers
from onnxq.calibration.channels import ChannelStatistics
from onnxq.folding import array_of
from onnxq.job import Job
from onnxq.learning.channel_scales import least_output_error, salience
from onnxq.learning.clipping import clipped_for_outputs
from onnxq.learning.smoothing import axes_of, layer_specs, record
from onnxq.passes.smooth_activations import Group, SmoothActivations, groups, is_foldable
from onnxq.scheme import Spec
from onnxq.targets import Placement

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Awq:
    """Weight-only quantization after a search for scales and clips on real inputs.

    1. Rewrite the graph; record the mean magnitude and some rows of every value that matrix products read.
    2. For the layers that share an input: s = mean|X|^r with the r, of 20, that leaves the least error at their
       outputs with rounded weights (equations 4 and 5). r = 0 is one of them, so that nothing gets worse there.
    3. Fold 1/s into what makes the input and s into the weights.
    4. Clip the weights of each scale where that leaves the least error at the output.
    5. Scales from the clipped weights, nearest rounding, lint, check.

    Source: J. Lin et al., AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration,
    MLSys 2024 (arXiv 2306.00978), section 3.2, and the authors' code for the clips.

    Departures:
        - The error is that of the layers' own outputs; the authors' code takes the attention block's for q, k and v.
        - Codes are symmetric unless the format is unsigned; the authors' are asymmetric.
        - Query and key projections are clipped too: a graph does not say which they are.
        - A value's projection through attention (v → o) takes no scale.
        - Every producer that is linear per channel takes one, not only norms and linear layers.

    Attributes:
        ratios: How many r between 0 and 1 are tried.
        clip: Whether clips are searched.
        insert: Whether a value that cannot be scaled offline gets one Mul.
        observer: How a range follows from the statistics of an activation, if activations are quantized.
        samples: How many samples channels are recorded from.
    """

    ratios: int = 20
    clip: bool = True
    insert: bool = False
    observer: str = "robust"
    samples: int = 128

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observer = observers.get(self.observer)
        job.prepare()
        specs = layer_specs(job)
        found = [group for group in groups(job.model.graph) if any(layer.node in specs for layer in group.layers)]
        by_name = {group.name: group for group in found}  # what is scaled gets another name
        recorded = record(job, axes_of(found), self.samples)
        scales = self._scales(found, recorded, specs)
        smooth = SmoothActivations(scales, insert=self.insert)
        smooth(job.model)
        applied = {name: scales[name] for name in smooth.folded + smooth.inserted}
        job.insert()  # the result is checked against the model before the clips
        if self.clip and job.placement is not None:
            _clip(job.placement, by_name, recorded, applied)
        job.ranges = calibrate.set_activation_scales(job.model, job.record(), observer)
        calibrate.set_weight_scales(job.model)
        job.lower()

    def _scales(
        self, found: Sequence[Group], recorded: Mapping[str, ChannelStatistics], specs: Mapping[ir.Node, Spec]
    ) -> dict[str, Array]:
        scales = {}
        for group in found:
            if not self.insert and not is_foldable(group):
                continue
            statistics = recorded[group.name]
            tried = [salience(statistics.mean_magnitude, step / self.ratios) for step in range(self.ratios)]
            scales[group.name] = least_output_error(group, statistics, tried, specs, None)
        return scales


def _clip(
    placement: Placement,
    found: Mapping[str, Group],
    recorded: Mapping[str, ChannelStatistics],
    scales: Mapping[str, Array],
) -> None:
    """Clip the float weights, which only their quantizers read by now."""
    sites = {node: site for site in placement.sites if graphs.is_constant(site.value) for node, _ in site.uses}
    for name, group in found.items():
        rows = recorded[name].rows / scales.get(name, np.ones(group.channels))
        for layer in group.layers:
            site = sites.get(layer.node)
            if site is None or len(site.uses) > 1 or len(site.value.uses()) > 1 or graphs.rank(site.value) != 2:
                continue
            weight = array_of(site.value)
            transposed = layer.reduction_axis == 0
            clipped = clipped_for_outputs(weight.T if transposed else weight, rows, site.spec)
            dtype = site.value.dtype or ir.DataType.FLOAT
            stored = np.ascontiguousarray((clipped.T if transposed else clipped).astype(dtype.numpy()))
            site.value.const_value = ir.Tensor(stored, dtype=dtype, name=site.value.name)
