"""PTQD: what quantization does to the prediction is measured in each sampler step and taken back."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from onnxq import model as models
from onnxq.calibration.data import STEP_KEY, Array, Source, batches, inputs_of
from onnxq.config import build_knobs
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.noise_correction import Correction, OutputError, fit_held_out
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.passes.correct_prediction import CorrectPrediction
from onnxq.runtime import Session

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
        - Bits that change with the step (section 3.4) are not chosen here.

    Attributes:
        base: The recipe that quantizes.
        least_r_squared: Below it the slope counts as 0.
        clip_slope: Whether a negative slope counts as 0 (the paper).
    """

    base: str = "q-diffusion"
    least_r_squared: float = 0.05
    clip_slope: bool = True

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        from onnxq import recipes

        denoiser = denoisers.find(job.model)
        _need_steps(job.source)
        entry = recipes.get(self.base)
        exact = Session(job.model, device=job.settings.device)
        build_knobs(entry.load(), entry.knobs, self.base).run(job)
        self.correct(job, exact, denoiser)

    def correct(self, job: Job, exact: Session, denoiser: denoisers.Denoiser) -> None:
        """Steps 2 and 3, on a job whose model is quantized; its inputs have steps.

        Args:
            job: The job.
            exact: The float network, as it was before anything was changed.
            denoiser: Its roles.
        """
        with job.progress.stage("correct", "Measuring the error of each step"):
            quantized = Session(job.model, device=job.settings.device, optimize=job.target.name == "cpu")
            halves, timesteps = _compare(exact, quantized, job, denoiser)
            corrections = {
                step: fit_held_out(*pair, least_r_squared=self.least_r_squared, clip_slope=self.clip_slope)
                for step, pair in sorted(halves.items())
            }
        self._append(job, denoiser, corrections, timesteps)
        job.step_sqnr_db = {step: _joined(halves[step]).sqnr_db(correction) for step, correction in corrections.items()}

    def _append(
        self, job: Job, denoiser: denoisers.Denoiser, corrections: dict[int, Correction], times: dict[int, float]
    ) -> None:
        steps = sorted(corrections)
        if denoiser.channels != corrections[steps[0]].mean.size:
            raise OnnxqError(
                f"expected {denoiser.channels} channels in the prediction {denoiser.output!r}, "
                f"found {corrections[steps[0]].mean.size}",
                hint="use a recipe without correction, for example --recipe int8",
            )
        CorrectPrediction(
            denoiser.output,
            denoiser.timestep.name,
            np.asarray([times[step] for step in steps]),
            np.asarray([corrections[step].factor for step in steps]),
            np.stack([corrections[step].offset for step in steps]),
        )(job.model)
        table = [
            {
                "step": step,
                "timestep": times[step],
                "slope": corrections[step].slope,
                "mean": corrections[step].mean.tolist(),
                "deviation": corrections[step].deviation,
                "r_squared": corrections[step].r_squared,
            }
            for step in steps
        ]
        models.set_metadata(job.model, noise_correction=json.dumps(table))


def _need_steps(source: Source) -> None:
    if STEP_KEY not in next(iter(source), {}):
        raise OnnxqError(
            f"expected calibration inputs with their sampler step (an array {STEP_KEY!r}), found none",
            hint="leave --data out, or make it with `onnxq trajectories`",
        )


def _compare(
    exact: Session, quantized: Session, job: Job, denoiser: denoisers.Denoiser
) -> tuple[dict[int, tuple[OutputError, OutputError]], dict[int, float]]:
    """Statistics of each step in two halves, and the steps' timesteps."""
    halves: dict[int, tuple[OutputError, OutputError]] = {}
    times: dict[int, float] = {}
    for batch in batches(job.source, job.specs, batch_size=ROWS, samples=job.settings.samples):
        feed = inputs_of(batch, job.specs)
        expected, found = (session.run(feed, [denoiser.output])[0] for session in (exact, quantized))
        stamps = np.broadcast_to(feed[denoiser.timestep.name], len(expected))
        steps: Array = np.broadcast_to(batch[STEP_KEY], len(expected))
        for row, (step, stamp) in enumerate(zip(steps.tolist(), stamps.tolist(), strict=True)):
            pair = halves.setdefault(step, (OutputError(), OutputError()))
            times[step] = float(stamp)
            half = pair[(pair[0].rows + pair[1].rows) % 2]
            half.update(expected[row : row + 1], found[row : row + 1])
    return halves, times


def _joined(pair: tuple[OutputError, OutputError]) -> OutputError:
    whole = OutputError()
    for half in pair:
        whole.merge(half)
    return whole
