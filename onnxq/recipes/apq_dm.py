"""APQ-DM: the steps of the sampler in groups, each with activation scales of its own."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.calibration import calibrate, observers, weight_ranges
from onnxq.diffusion import time_scales
from onnxq.diffusion.source import sampler_of
from onnxq.diffusion.step_floor import hold_floor
from onnxq.job import Job


@dataclass(frozen=True)
class ApqDm:
    """A few scales for each activation, shared by the steps that want them.

    1. Calibrate as usual: one scale for all steps. Layers without which a step loses too much stay float.
    2. Look at the activations of each step apart. What a step loses with each of the others' scales follows from its
       histogram; dynamic programming cuts the steps into the groups with the least loss, for each activation alone
       (``scope=layer``) or for all at once.
    3. Round weights to the nearest code, store them, lint, check.
    4. Write the scales in the form that the target runs: ``lowering``.

    Source: C. Wang, Z. Wang, X. Xu, Y. Tang, J. Zhou, J. Lu, Towards Accurate Post-training Quantization for Diffusion
    Models, CVPR 2024 (arXiv 2305.18723).

    Departures:
        - Groups are contiguous and found by dynamic programming on each activation's own error; the paper relaxes the
          choice of a group to a softmax that it learns, with the quantizers, from the error of the prediction, on
          steps that it picks by the entropy of their choice. That search is not here.
        - The authors' code has groups of channels that change with every step and takes no hard choice; this is the
          paper's method, groups of steps.
        - Everything that the target has kernels for is quantized; their code quantizes the convolutions of residual
          blocks alone. Scales that a target shares among values, or whose values something else than a product reads,
          stay the same for all steps.
        - Zero points are the same for all steps.

    Attributes:
        groups: How many groups of steps (8 in the paper); 1 is static.
        partition: ``optimal`` or ``uniform``.
        scope: ``layer`` or ``global``; ``subgraphs`` are for global groups, whatever is said here.
        lowering: ``rescale``: one graph with constant scales, and a factor by step before each quantizer and behind
            each product; ``subgraphs``: a graph for each group beside the file, sharing its weights; ``none``: scales
            are looked up, which TensorRT does not build.
        powers_of_two: Whether the scales of a value are powers of two apart, so that factors are exact.
        selection: Which steps are kept where no data is given.
        trajectories: How many samples the sampler makes.
        kept_steps: Steps kept of each.
        observer: How a range follows from the statistics of an activation.
        step_floor_db: SQNR that every sampler step keeps; 0 turns it off.
    """

    groups: int = 8
    partition: str = "optimal"
    scope: str = "layer"
    lowering: str = "rescale"
    powers_of_two: bool = False
    selection: str = "uniform"
    trajectories: int = 32
    kept_steps: int = 16
    observer: str = "mse"
    step_floor_db: float = 22.0

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        time_scales.check_lowering(self.lowering)
        observe, search = observers.get(self.observer), weight_ranges.get("mse")
        sampler = sampler_of(job)
        job.prepare()
        hold_floor(job, observe, search, self.step_floor_db)
        statistics = time_scales.record(job)
        job.insert()
        job.ranges = calibrate.set_activation_scales(job.model, job.record(), observe)
        calibrate.set_weight_scales(job.model, search)
        scales = time_scales.scales_by_step(
            job,
            statistics,
            sampler,
            observe,
            groups=self.groups,
            partition=self.partition,
            scope="global" if self.lowering == "subgraphs" else self.scope,
            powers_of_two=self.powers_of_two,
        )
        job.measurements["time_scales"] = {"values": len(scales.tables), "error": scales.error}
        job.lower()
        time_scales.lower(job, sampler, scales.tables, self.lowering)
