"""APQ-DM: the steps of the sampler in groups, each with activation scales of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.diffusion import time_scales
from onnxq.diffusion.selection import POLICIES
from onnxq.diffusion.source import sampler_of
from onnxq.diffusion.step_floor import hold_floor
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.passes.cache_temporal_features import CacheTemporalFeatures

Array = np.ndarray[Any, Any]
ROUNDS = {"quick": 2, "default": 10, "paper": 100}


@dataclass(frozen=True)
class ApqDm:
    """A few scales for each activation, shared by the steps that want them.

    1. What depends on the timestep alone becomes tables of the sampler's steps, where they are smaller than its
       weights: products that have one row for each sample would cost their factors and gain nothing of them.
    2. Calibrate as usual: one scale for all steps. Layers without which a step loses too much stay float.
    3. Look at the activations of each step apart. What a step loses with each of the others' scales follows from its
       histogram; dynamic programming cuts the steps into the groups with the least loss, for each activation alone
       (``scope=layer``) or for all at once.
    4. Round weights to the nearest code, let biases take back the mean shift that this causes, store them, lint, check.
    5. With ``partition=learned``, the paper's search, from there: each quantizer becomes a mixture of G, weighted by a
       softmax for each step. Weights of the mixtures and scales are learned from the error of the prediction and the
       entropy of the choice, on steps where that entropy is high or that were picked seldom. Then each step takes the
       group of the highest weight, if that is better on held-out samples than what it started from.
    6. Write the scales in the form that the target runs: ``lowering``.

    Source: C. Wang, Z. Wang, X. Xu, Y. Tang, J. Zhou, J. Lu, Towards Accurate Post-training Quantization for Diffusion
    Models, CVPR 2024 (arXiv 2305.18723).

    Departures:
        - By default groups are contiguous and found by dynamic programming on each activation's own error alone,
          which takes no gradients; the paper's search starts at random.
        - The search mimics the float network's prediction on recorded inputs; the paper's loss is the noise of
          training, and it samples anew for every step that it picks. Errors are relative, entropies between 0 and 1.
        - The weight of the entropy grows a hundredfold: a mixture is finer than any of its quantizers, and with the
          paper's constant 0.8 a quarter of the choices stayed open.
        - Weights stay as they are while groups are learned (in the authors' code too), and zero points.
        - The authors' code has groups of channels that change with every step and takes no hard choice; this is the
          paper's method, groups of steps.
        - Everything that the target has kernels for is quantized; their code quantizes the convolutions of residual
          blocks alone. Scales that a target shares among values, or whose values something else than a product reads,
          stay the same for all steps.
        - Zero points are the same for all steps.
        - Biases take back the mean shift of the rounded weights, which adds up from step to step of the sampler
          (``bias_correction=False`` is the paper's): on the guided Fashion UNet at W4A8 the squared error of the images
          is 0.20 without and 0.030 with it.
        - The tables are TFMQ-DM's cache (arXiv 2407.19547); ``cache=False`` is the paper's.

    Attributes:
        groups: How many groups of steps (8 in the paper; unless it is said, at most one for each); 1 is static.
        partition: ``optimal``, ``uniform``, or ``learned``.
        iterations: Steps of the optimiser for ``learned``, each on samples of one step of the sampler; 0: so many for
            each of its steps as ``--budget`` says (2, 10 or 100).
        undecided: Weight of the entropy of the choice, for ``learned``.
        scope: ``layer`` or ``global``; ``subgraphs`` are for global groups, whatever is said here.
        lowering: ``rescale``: one graph with constant scales, and a factor by step before each quantizer and behind
            each product; ``subgraphs``: a graph for each group beside the file, sharing its weights; ``none``: scales
            are looked up, which TensorRT does not build.
        least_gain_db: By how much the error of a value has to fall for ``rescale`` to give it factors, which cost time.
            For ``cpu`` no factor is put where it would keep a layer from its integer kernel.
        cache: Whether temporal features become tables first.
        powers_of_two: Whether the scales of a value are powers of two apart, so that factors are exact.
        selection: Which steps are kept where no data is given.
        trajectories: How many samples the sampler makes.
        kept_steps: Steps kept of each.
        observer: How a range follows from the statistics of an activation.
        step_floor_db: SQNR that every sampler step keeps; 0 turns it off.
        bias_correction: Whether biases are corrected (M. Nagel et al., ICCV 2019, arXiv 1906.04721).
    """

    groups: int = 8
    partition: str = choice("optimal", "uniform", "learned")
    iterations: int = 0
    undecided: float = 0.8
    scope: str = choice(*time_scales.SCOPES)
    lowering: str = choice(*time_scales.LOWERINGS)
    least_gain_db: float = 2.0
    cache: bool = True
    powers_of_two: bool = False
    selection: str = choice(*POLICIES)
    trajectories: int = 32
    kept_steps: int = 16
    observer: str = "mse"
    step_floor_db: float = 22.0
    bias_correction: bool = True

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        if self.partition == "learned" and (self.lowering == "subgraphs" or self.scope == "global"):
            raise OnnxqError(
                "expected groups of each activation's own for partition=learned, found groups that all share",
                hint="use --set lowering=rescale --set scope=layer, or partition=optimal",
            )
        observe, search = observers.get(self.observer), weight_ranges.get("mse")
        sampler = sampler_of(job)
        job.prepare()
        if self.cache:
            size = job.scheme.weights.format.storage.bitwidth / 8 if job.scheme.weights.enabled else 4
            CacheTemporalFeatures(sampler.denoiser, sampler.schedule.timesteps, bytes_per_weight=size)(job.model)
        hold_floor(job, observe, search, self.step_floor_db)
        steps = len(sampler.schedule.timesteps)
        groups = self.groups if "groups" in job.settings.knobs else min(self.groups, steps)
        statistics = time_scales.record(job)
        insert_calibrated(job, observe, search, corrects_biases=self.bias_correction)
        scales = time_scales.scales_by_step(
            job,
            statistics,
            sampler,
            observe,
            groups=groups,
            partition="optimal" if self.partition == "learned" else self.partition,
            scope="global" if self.lowering == "subgraphs" else self.scope,
            powers_of_two=self.powers_of_two,
        )
        found = {"values": len(scales.tables), "error": scales.error}
        if self.lowering == "rescale":
            scales = time_scales.moving_scales(job, scales, self.least_gain_db)
        tables = scales.tables
        job.measurements["time_scales"] = {**found, "moving": len(tables)}
        if self.partition == "learned" and tables:
            tables = self.learn(job, scales, steps)
        job.measurements["scales_by_step"] = time_scales.by_value(job.model.graph, tables)
        job.lower()
        time_scales.lower(job, sampler, tables, self.lowering)

    def learn(self, job: Job, scales: time_scales.TimeScales, steps: int) -> dict[str, Array]:
        """Step 5."""
        from onnxq.learning.step_groups import GroupSearch, learn_groups  # needs torch

        search = GroupSearch(self.iterations or ROUNDS[job.settings.budget] * steps, undecided=self.undecided)
        found = learn_groups(job, scales.tables, scales.groups, search, steps)
        numbers = {key: value for key, value in vars(found).items() if key != "tables"}
        job.measurements["time_scales"] |= {"learned": numbers}
        return found.tables
