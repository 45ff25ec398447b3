"""SmoothQuant: outliers of activations go into the weights, where rounding can take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxq.job import Job
from onnxq.learning.channel_scales import least_output_error, migration, weight_maxima
from onnxq.learning.smoothing import axes_of, layer_specs, record
from onnxq.passes.smooth_activations import SmoothActivations, groups, is_foldable
from onnxq.recipes.static import Static

ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True)
class SmoothQuant:
    """Channels of activations scaled down and weights up, offline; then static quantization.

    1. Rewrite the graph; record the largest magnitude of every channel that matrix products read.
    2. s = max|X|^α / max|W|^(1−α) per channel (equation 4), over all layers that read the value.
    3. Fold 1/s into what makes the value and s into the weights: the function stays, no node is added.
    4. Calibrate and quantize as the static recipe does.

    Source: G. Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
    ICML 2023 (arXiv 2211.10438), section 4.

    Departures:
        - Besides LayerNorm, every producer that is linear per channel takes a scale: products, convolutions, the
          linear factor of a gate, also behind Relu.
        - ``search`` chooses α for each group of layers by the error of their outputs; the paper has one for all.
        - Activations have one static scale per tensor (the paper's O3); weights one per channel.

    Attributes:
        alpha: How much of the difficulty goes to the weights, between 0 and 1.
        search: Whether α is searched for each group of layers instead.
        insert: Whether a value that cannot be scaled offline gets one Mul.
        convolutions: Whether convolutions are smoothed too.
        observer: How a range follows from the statistics of an activation.
        bias_correction: Whether biases take back the mean shift that rounding the weights causes.
        weight_ranges: How a range follows from the weights: ``minmax`` or ``mse``.
        samples: How many samples channels are recorded from.
    """

    alpha: float = 0.5
    search: bool = False
    insert: bool = False
    convolutions: bool = False
    observer: str = "robust"
    bias_correction: bool = True
    weight_ranges: str = "minmax"
    samples: int = 128

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        job.prepare()
        self._smooth(job)
        Static(self.observer, self.bias_correction, weight_ranges=self.weight_ranges).quantize(job)

    def _smooth(self, job: Job) -> None:
        specs = layer_specs(job)
        found = [
            group
            for group in groups(job.model.graph, self.convolutions)
            if any(layer.node in specs for layer in group.layers) and (self.insert or is_foldable(group))
        ]
        if not found:
            job.warnings.append(
                "nothing was smoothed: no value that layers read can be scaled without a node, as behind norms that a "
                "shortcut reads too; --set insert=true gives each a Mul"
            )
            return
        recorded = record(job, axes_of(found), self.samples, rare_tokens=True)
        scales = {}
        for group in found:
            statistics, weights = recorded[group.name], weight_maxima(group)
            scale = migration(statistics.maxima, weights, self.alpha)
            if self.search:
                tried = [np.ones(group.channels), *(migration(statistics.maxima, weights, alpha) for alpha in ALPHAS)]
                scale = least_output_error(group, statistics, tried, specs, job.scheme.activations)
            scales[group.name] = scale
        SmoothActivations(scales, insert=self.insert, convolutions=self.convolutions)(job.model)
