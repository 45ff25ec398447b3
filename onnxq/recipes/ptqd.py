"""PTQD: what quantization does to the prediction is measured in each sampler step and taken back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import model as models
from onnxq.calibration.data import STEP_KEY, Array, Source, batches, inputs_of
from onnxq.calibration.recording import Recording
from onnxq.config import build_knobs
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.mean_image import SPARE_SHARE, ErrorImage, mean_image, worth_storing
from onnxq.diffusion.noise_correction import Correction, OutputError, fit_held_out
from onnxq.diffusion.source import sampler_of
from onnxq.diffusion.step_precision import choose, forward_snr_db, subgraphs_of
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.passes.correct_prediction import CorrectPrediction
from onnxq.runtime import Session
from onnxq.scheme import Scheme

ROWS = 16


@dataclass(frozen=True)
class Ptqd:
    """A correction behind any quantized denoiser.

    1. Quantize with another recipe.
    2. Run the float and the quantized network on the same inputs along the float trajectory. For each step: the part
       of the error that follows the prediction (slope k), the mean of the rest for each channel, its variance.
    3. Append corrected = (prediction - mean) / (1 + k) to the graph, looked up by timestep; what the sampler needs to
       shrink its own noise by goes into the metadata (``onnxq.noise_correction``), for
       ``onnxq.diffusion.noise_correction.sampler_tables``.

    Source: Y. He, L. Liu, J. Liu, W. Wu, H. Zhou, B. Zhuang, PTQD: Accurate Post-Training Quantization for Diffusion
    Models, NeurIPS 2023 (arXiv 2305.10657), sections 3.2 and 3.3.

    Departures:
        - The statistics are of the network's own output, with and without condition together, not of the guided one:
          they then hold for every weight of guidance, and the tail can stand in the graph.
        - A slope that explains less than ``least_r_squared`` of the error, and a channel's mean within two standard
          errors, count as 0; a step whose correction does not help on the other half of the samples is left alone.
        - Variance is one number for a step, as in the authors' code. The coefficient of the prediction keeps the
          sampler's own sigma; their code recomputes it, which undoes most of the correction.
        - Bits that change with the step (section 3.4) are chosen between two formats of activations, each calibrated on
          all steps; each has a graph, with an index that says which serves what, and weights that are equal are stored
          once. Both ratios are of powers.

    Attributes:
        base: The recipe that quantizes.
        least_r_squared: Below it the slope counts as 0.
        clip_slope: Whether a negative slope counts as 0 (the paper).
        low_activations: A second, cheaper format of activations (``int4``, or ``int8`` beside ``int16`` or ``float``)
            for the steps whose own noise hides what it loses; none if empty.
    """

    base: str = "q-diffusion"
    least_r_squared: float = 0.05
    clip_slope: bool = True
    low_activations: str = ""

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        from onnxq import recipes

        denoiser = denoisers.find(job.model)
        _need_steps(job.source)
        entry = recipes.get(self.base)
        base = build_knobs(entry.load(), entry.knobs, self.base)
        exact = Session(job.model, device=job.settings.device)
        if not self.low_activations:
            base.run(job)
            return self.correct(job, exact, denoiser)
        sampler = sampler_of(job)
        forward = forward_snr_db(sampler.schedule)
        scheme = Scheme(job.scheme.weights, job.target.scheme(None, self.low_activations).activations)
        low = dataclasses.replace(job, model=job.model.clone(), scheme=scheme, checkpoint=None)
        low.exceptions, low.reasons, low.ranges = dict(job.exceptions), {}, {}
        low.observed = Recording({})  # its values may be rewritten in another way
        fits = []
        for item in (low, job):
            base.run(item)
            fits.append(self._fit(item, exact, denoiser))
            fits[-1].append_to(item.model, denoiser)
        chosen = choose([fit.sqnr_db for fit in fits], forward)
        job.subgraphs = subgraphs_of([low.model, job.model], chosen, sampler.schedule.timesteps)
        job.measurements["activations_by_step"] = [
            (low, job)[setting].scheme.activations.format.name for setting in chosen
        ]
        _remember(job, _mixed(fits, chosen))

    def correct(self, job: Job, exact: Session, denoiser: denoisers.Denoiser, influence: Array | None = None) -> None:
        """Steps 2 and 3, on a job whose model is quantized; its inputs have steps.

        Args:
            job: The job.
            exact: The float network, as it was before anything was changed.
            denoiser: Its roles.
            influence: Of each step on the images [steps]: where that takes something off their error, a step's mean
                error is taken back as an image, not by channel alone.
        """
        fit = self._fit(job, exact, denoiser, influence)
        fit.append_to(job.model, denoiser)
        _remember(job, fit)

    def _fit(self, job: Job, exact: Session, denoiser: denoisers.Denoiser, influence: Array | None = None) -> Fit:
        with job.progress.stage("correct", "Measuring the error of each step"):
            quantized = Session(job.model, device=job.settings.device, optimize=job.target.name == "cpu")
            halves, pictures, timesteps = _compare(exact, quantized, job, denoiser, influence is not None)
            corrections = {
                step: fit_held_out(*pair, least_r_squared=self.least_r_squared, clip_slope=self.clip_slope)
                for step, pair in sorted(halves.items())
            }
            joined = {step: _joined(pair) for step, pair in sorted(halves.items())}
            ratios = {step: joined[step].sqnr_db(correction) for step, correction in corrections.items()}
            images: dict[int, Array] = {}
            if influence is not None:
                found = {step: mean_image(pictures[step], correction) for step, correction in corrections.items()}
                errors = {step: joined[step].mean_square(correction) for step, correction in corrections.items()}
                weights = {step: influence[step] / max(error.signal, 1e-30) for step, error in joined.items()}
                spare = SPARE_SHARE * models.initializer_bytes(job.model)
                images = worth_storing(found, errors, weights, spare)
        return Fit(corrections, timesteps, ratios, images)


@dataclass(frozen=True)
class Fit:
    """What was found of a quantized denoiser, by step.

    Attributes:
        corrections: How its prediction is corrected.
        timesteps: What the network is told.
        sqnr_db: Of the corrected prediction.
        images: What is taken from it beyond that, where it pays [channels, …].
    """

    corrections: dict[int, Correction]
    timesteps: dict[int, float]
    sqnr_db: dict[int, float]
    images: dict[int, Array] = field(default_factory=dict)

    def append_to(self, model: ir.Model, denoiser: denoisers.Denoiser) -> None:
        """Correct the model's prediction."""
        steps = sorted(self.corrections)
        found = [self.corrections[step] for step in steps]
        channels = denoiser.noise_shape[0]
        if channels != found[0].mean.size:
            raise OnnxqError(
                f"expected {channels} channels in the prediction {denoiser.output!r}, found {found[0].mean.size}",
                hint="use a recipe without correction, for example --recipe int8",
            )
        times = np.asarray([self.timesteps[step] for step in steps])
        factors, offsets = np.asarray([item.factor for item in found]), np.stack([item.offset for item in found])
        images = {steps.index(step): -image for step, image in sorted(self.images.items())}
        CorrectPrediction(denoiser.output, denoiser.timestep.name, times, factors, offsets, images)(model)

    def table(self) -> list[dict[str, Any]]:
        """What a sampler needs to know."""
        return [
            {
                "step": step,
                "timestep": self.timesteps[step],
                "slope": correction.slope,
                "mean": correction.mean.tolist(),
                "deviation": correction.deviation,
                "r_squared": correction.r_squared,
            }
            for step, correction in sorted(self.corrections.items())
        ]


def _remember(job: Job, fit: Fit) -> None:
    models.set_metadata(job.model, noise_correction=json.dumps(fit.table()))
    job.step_sqnr_db = fit.sqnr_db


def _mixed(fits: Sequence[Fit], chosen: Sequence[int]) -> Fit:
    """Of each step, what was found of the graph that serves it."""
    pick = {step: fits[chosen[step]] for step in fits[-1].corrections}
    return Fit(
        {step: fit.corrections[step] for step, fit in pick.items()},
        fits[-1].timesteps,
        {step: fit.sqnr_db[step] for step, fit in pick.items()},
    )


def _need_steps(source: Source) -> None:
    if STEP_KEY not in next(iter(source), {}):
        raise OnnxqError(
            f"expected calibration inputs with their sampler step (an array {STEP_KEY!r}), found none",
            hint="leave --data out, or make it with `onnxq trajectories`",
        )


def _compare(
    exact: Session, quantized: Session, job: Job, denoiser: denoisers.Denoiser, with_images: bool
) -> tuple[dict[int, tuple[OutputError, OutputError]], dict[int, tuple[ErrorImage, ErrorImage]], dict[int, float]]:
    """Statistics of each step in two halves, those of mean images if they are wanted, and the steps' timesteps."""
    halves: dict[int, tuple[OutputError, OutputError]] = {}
    pictures: dict[int, tuple[ErrorImage, ErrorImage]] = {}
    times: dict[int, float] = {}
    for batch in batches(job.source, job.specs, batch_size=ROWS, samples=job.settings.samples):
        feed = inputs_of(batch, job.specs)
        expected, found = (session.run(feed, [denoiser.output])[0] for session in (exact, quantized))
        stamps = np.broadcast_to(feed[denoiser.timestep.name], len(expected))
        steps: Array = np.broadcast_to(batch[STEP_KEY], len(expected))
        for row, (step, stamp) in enumerate(zip(steps.tolist(), stamps.tolist(), strict=True)):
            pair = halves.setdefault(step, (OutputError(), OutputError()))
            times[step] = float(stamp)
            turn = (pair[0].rows + pair[1].rows) % 2
            pair[turn].update(expected[row : row + 1], found[row : row + 1])
            if with_images:
                pictures.setdefault(step, (ErrorImage(), ErrorImage()))[turn].update(
                    expected[row : row + 1], found[row : row + 1]
                )
    return halves, pictures, times


def _joined(pair: tuple[OutputError, OutputError]) -> OutputError:
    whole = OutputError()
    for half in pair:
        whole.merge(half)
    return whole
