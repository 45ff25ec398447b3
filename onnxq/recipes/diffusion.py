"""Our own composition for denoisers: what the papers found, in one order, where it pays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.autograd.blocks import cut
from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.data import STEP_KEY
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.calibration.shortcuts import FORMS, split_shortcuts
from onnxq.diffusion import time_scales
from onnxq.diffusion.image_layers import spare_for_images
from onnxq.diffusion.influence import image_influence
from onnxq.diffusion.selection import POLICIES
from onnxq.diffusion.source import sampler_of
from onnxq.diffusion.step_floor import hold_floor
from onnxq.diffusion.subgraphs import Subgraph
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.reconstruct import reconstruct
from onnxq.learning.reconstruction_knobs import BlockKnobs
from onnxq.passes.cache_temporal_features import CacheTemporalFeatures
from onnxq.recipes.ptqd import Ptqd
from onnxq.runtime import Session
from onnxq.scheme import Scheme
from onnxq.value_sizes import elements_of

WIDE_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Diffusion(BlockKnobs):
    """The parts of the papers that can pay, in one order, each left out where it would not.

    1. What depends on the timestep alone becomes tables of the sampler's steps, where they are smaller than its
       weights (TFMQ-DM's cache, arXiv 2407.19547).
    2. Layers that read a Concat are split where that pays (Q-Diffusion, arXiv 2302.04304, section 3.2).
    3. Layers without which a sampler step loses too much stay float, and those that alone make most of the error of the
       images. They are looked for with weights of 8 bits: what fewer bits lose is learned back in step 5. The layers
       whose few bits make most of the images' error keep 8: mostly the last ones, which are small.
    4. Calibrate on all steps; half of the inputs come from those in which an error moves the images most. That is
       measured: the float sampler runs with a little noise in the prediction of one step after the other.
    5. Block by block, learn the rounding of weights, their steps (GENIE-M, arXiv 2212.04780) and those of activations
       together, on what the quantized part of the network makes (BRECQ, arXiv 2102.05426). Biases take back the mean
       error that is left.
    6. With ``groups``, activations whose range drifts get a scale for each group of steps (APQ-DM, arXiv 2305.18723).
    7. Measure what error remains in each step, and take back what follows the prediction (PTQD, arXiv 2305.10657), and
       its mean as an image where that moves what is sampled.
    8. With ``float_steps``, an index beside the result sends the first steps to the float network.

    Source: the composition is ours; the papers are named above.

    Departures:
        - Tables and splits are taken where their gain, in bytes or in dB, is measured on the model at hand. The shift
          is on because it raised every step of the denoisers that it was tried on. Noise correction is on because
          learned rounding leaves a mean error that all steps share: steps look better, and yet images end further
          away (int4 weights, a guided UNet: squared error 1.5 of nearest rounding's without it, 0.16 with it).
        - Where a sampler starts at almost no signal, its first step can make nearly all of the error of the images. A
          small UNet of digits (int4 weights, 20 steps, 128 images, the mean over three seeds of noise) had 3.2e-2 with
          inputs spread evenly and no layer kept for the images. One layer in float, and mean images taken back, leave
          2.2e-2. Inputs that follow the influence change little: they do with one float layer less.
        - The papers keep the first and the last layer in 8 bits, by rule. Which layers need them is measured here: on
          the Fashion UNet six of the last, 6 % of the weights, bring the error of the images (W4A8, two seeds) from
          1.1e-3 and 1.4e-3 to 0.48e-3 and 0.54e-3.
        - What is left of the UNet of digits eight bits do not mend: it had 0.6e-2 with its first step in float, so
          there is ``float_steps``, which is 0 unless it is set.

    Attributes:
        cache: Whether temporal features become tables.
        split: How shortcuts are split: ``two_op``, ``equalize`` or ``none``.
        split_gain_db: By how much the error of a layer's output has to fall for that.
        shift: Whether one-sided activations are shifted into a symmetric range where codes have to be symmetric.
        step_floor_db: SQNR that every sampler step keeps; 0 turns it off.
        image_gain_db: By how much the foretold error of the images has to fall for a further layer to stay float; 0
            turns it off.
        wide_gain_db: By how much it has to fall for a further layer to keep weights of 8 bits where others have fewer;
            0 turns it off.
        correct: Whether the error of each step is taken back behind the network.
        groups: In how many groups of steps an activation has a scale of its own (APQ-DM); 1: one scale for all.
        least_gain_db: By how much the error of an activation has to fall for that: factors cost time.
        float_steps: How many of the first steps run the float network, which is stored beside the quantized one.
        selection: Which steps are kept where no data is given; ``influence``: half of them evenly spread, half in
            proportion to what an error there does to the images.
        trajectories: How many samples the sampler makes.
        kept_steps: Steps kept of each.
        weight_step_rate: Adam's rate for the logarithm of weight steps; 0 keeps them. Ten times as fast, the images of
            the guided Fashion UNet at W4A8 were further off than with steps kept.
    """

    cache: bool = True
    split: str = choice(*FORMS)
    split_gain_db: float = 2.0
    shift: bool = True
    step_floor_db: float = 22.0
    image_gain_db: float = 2.0
    wide_gain_db: float = 0.5
    correct: bool = True
    groups: int = 1
    least_gain_db: float = 2.0
    float_steps: int = 0
    selection: str = choice("influence", *POLICIES)
    trajectories: int = 16
    kept_steps: int = 16
    correct_biases: bool = True
    start: str = choice("gptq", "nearest")
    bias_rate: float = 0.0
    weight_step_rate: float = 1e-4

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observe, search = observers.get(self.observer), weight_ranges.once(weight_ranges.get(self.weight_ranges))
        sampler = sampler_of(job)
        times = sampler.schedule.timesteps
        if not 0 <= self.float_steps < len(times):
            raise OnnxqError(
                f"expected float_steps between 0 and {len(times) - 1}, found {self.float_steps}",
                hint=f"the sampler has {len(times)} steps, the last of which is quantized at least",
            )
        whole = job.model.clone() if self.float_steps else None
        influence = getattr(job.source, "influence", None)
        widens = self.wide_gain_db > 0 and job.scheme.weights.format.bits < WIDE_BITS
        measures = influence is None and (self.image_gain_db > 0 or widens)
        corrects = self.correct and STEP_KEY in next(iter(job.source), {})
        exact = Session(job.model, device=job.settings.device) if measures or corrects else None
        if measures and exact is not None:
            influence = image_influence(sampler, exact)
        job.prepare()
        if self.cache:
            CacheTemporalFeatures(sampler.denoiser, times, bytes_per_weight=1.0)(job.model)
        split_shortcuts(job, self.split, self.split_gain_db)
        wide = self._with_wide_weights(job)
        if self.step_floor_db > 0:
            hold_floor(wide, observe, search, self.step_floor_db)
        if influence is not None and self.image_gain_db > 0:
            spared = spare_for_images(wide, observe, search, influence, self.image_gain_db)
            job.measurements["foretold_image_error"] = spared.error
        if influence is not None and widens:
            spared = spare_for_images(job, observe, search, influence, self.wide_gain_db, wide.scheme)
            job.measurements["foretold_image_error"] = spared.error
            self._report_wide(job, spared.layers)
        blocks = cut(job.model.graph)
        by_step = time_scales.record(job) if self.groups > 1 else {}
        shifted = insert_calibrated(job, observe, search, shift=self.shift).shifted
        activations = job.scheme.activations.enabled
        rounding = self.rounding(
            job,
            weight_step_rate=self.weight_step_rate,
            activation_step_rate=self.activation_step_rate if activations else 0.0,
            quantize_activations=activations,
        )
        reconstruct(job, blocks, rounding, samples=self.samples_in(job), cache_mib=self.cache_mib)
        moving = {name: item for name, item in by_step.items() if name not in shifted}  # a shift is for one scale
        scales = time_scales.scales_by_step(job, moving, sampler, observe, groups=self.groups) if moving else None
        chosen = time_scales.moving_scales(job, scales, self.least_gain_db) if scales is not None else None
        if chosen is not None:
            job.measurements["scales_by_step"] = time_scales.by_value(job.model.graph, chosen.tables)
        job.lower()
        if scales is not None and chosen is not None:
            job.measurements["time_scales"] = {"values": len(scales.tables), "moving": len(chosen.tables)}
            time_scales.lower(job, sampler, chosen.tables, "rescale")
        if corrects and exact is not None:
            Ptqd().correct(job, exact, sampler.denoiser, influence)
        if whole is not None:
            first = self.float_steps
            job.subgraphs = [
                Subgraph(whole, tuple(range(first)), tuple(times[:first])),
                Subgraph(job.model, tuple(range(first, len(times))), tuple(times[first:])),
            ]

    @staticmethod
    def _report_wide(job: Job, wide_layers: list[str]) -> None:
        job.measurements["wide_layers"] = wide_layers
        if wide_layers:
            weights = ((item.node.name, item.weight) for item in layer_nodes.weighted_nodes(job.model.graph))
            sizes = {name: elements_of(weight) for name, weight in weights if weight and graphs.is_constant(weight)}
            share = sum(sizes.get(name, 0) for name in wide_layers) / max(1, sum(sizes.values()))
            job.measurements["wide_share"] = share
            job.warnings.append(
                f"{len(wide_layers)} layers ({share:.1%} of the weights) keep 8 bits, as fewer would make most of the "
                f"images' error; first {wide_layers[0]} (--set wide_gain_db=0 for none)"
            )

    def _with_wide_weights(self, job: Job) -> Job:
        """The same job with weights of at least 8 bits; what it finds out goes into the job's own dictionaries."""
        if job.scheme.weights.format.bits >= WIDE_BITS:
            return job
        wide = job.target.scheme(None, job.settings.activations).weights
        return dataclasses.replace(job, scheme=Scheme(wide, job.scheme.activations))
