"""The error of a quantized denoiser taken apart, and taken back: what follows the prediction, its mean, its variance.

Source: Y. He, L. Liu, J. Liu, W. Wu, H. Zhou, B. Zhuang, PTQD: Accurate Post-Training Quantization for Diffusion
Models, NeurIPS 2023 (arXiv 2305.10657). With e the float prediction and e + D the quantized one, D = k e + D', and
per channel c the mean of D' is m[c]:

    corrected = (quantized - m[c]) / (1 + k)
    sigma'²   = max(sigma² - B² var(D') / (1 + k)², 0)        (B: what the sampler multiplies the prediction with)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxq.calibration.data import Array
from onnxq.diffusion.diffusers_schedule import Diffusers
from onnxq.diffusion.trajectory import Sampler
from onnxq.errors import OnnxqError


@dataclass
class OutputError:
    """Sums over pairs of predictions in one sampler step; nothing else is kept.

    Attributes:
        rows: Samples seen.
        elements: Elements of one channel seen.
        sums: For each channel: of e, D, e², D², e D [5, channels].
        row_squares: For each channel, the sum of squares of each sample's mean D [channels].
    """

    rows: int = 0
    elements: int = 0
    sums: Array = field(default_factory=lambda: np.zeros((5, 1)))
    row_squares: Array = field(default_factory=lambda: np.zeros(1))

    def update(self, expected: Array, found: Array) -> None:
        """Add predictions [samples, channels, …] of the float and of the quantized network."""
        exact = expected.reshape(*expected.shape[:2], -1).astype(np.float64)
        error = found.reshape(exact.shape).astype(np.float64) - exact
        parts = (exact, error, exact**2, error**2, exact * error)
        self.sums = self.sums + np.stack([part.sum(axis=(0, 2)) for part in parts])
        self.row_squares = self.row_squares + (error.mean(axis=2) ** 2).sum(axis=0)
        self.rows += exact.shape[0]
        self.elements += exact.shape[0] * exact.shape[2]

    def merge(self, other: OutputError) -> None:
        """Add what another one has seen."""
        self.rows += other.rows
        self.elements += other.elements
        self.sums = self.sums + other.sums
        self.row_squares = self.row_squares + other.row_squares

    def mean_square(self, correction: Correction | None = None) -> float:
        """Mean squared error of the prediction, corrected or as it is; from the sums alone."""
        exact, error, exact_square, error_square, product = self.sums
        if correction is None:
            return float(error_square.sum() / (self.elements * len(error)))
        k, mean = correction.slope, correction.mean
        total = error_square + k**2 * exact_square - 2 * k * product
        total = total - 2 * mean * (error - k * exact) + self.elements * mean**2
        return float(total.sum() / (self.elements * len(error)) / (1 + k) ** 2)

    def sqnr_db(self, correction: Correction | None = None) -> float:
        """The same as a signal to noise ratio."""
        noise = self.mean_square(correction)
        return float("inf") if noise <= 0 else 10 * float(np.log10(max(self.signal, 1e-30) / noise))

    @property
    def signal(self) -> float:
        """Mean square of the float prediction."""
        return float(self.sums[2].sum() / (self.elements * self.sums.shape[1]))


@dataclass(frozen=True)
class Correction:
    """How the prediction of one step is corrected; the first three are zero where nothing is.

    Attributes:
        slope: k, the part of the error that follows the prediction.
        mean: m[c], the mean of the rest [channels].
        deviation: The standard deviation of the rest.
        r_squared: How much of the error's variance follows the prediction.
    """

    slope: float
    mean: Array
    deviation: float
    r_squared: float = 0.0

    @property
    def factor(self) -> float:
        """What the quantized prediction is multiplied with."""
        return 1 / (1 + self.slope)

    @property
    def offset(self) -> Array:
        """What is added to it afterwards [channels]."""
        offset: Array = -self.mean / (1 + self.slope)
        return offset

    def __call__(self, prediction: Array) -> Array:
        """The corrected prediction [samples, channels, …]."""
        shape = (1, -1, *([1] * (prediction.ndim - 2)))
        corrected: Array = prediction * self.factor + self.offset.reshape(shape)
        return corrected


def fit(
    error: OutputError, *, least_r_squared: float = 0.05, clip_slope: bool = True, standard_errors: float = 2.0
) -> Correction:
    """The correction of one step.

    Args:
        error: What was seen.
        least_r_squared: Below it the slope is taken as 0: it would be noise (StepbaQ found that it then harms).
        clip_slope: Whether a negative slope is taken as 0, as in the paper; nothing else needs it.
        standard_errors: A channel's mean within so many standard errors of 0 is taken as 0.
    """
    n = error.elements * error.sums.shape[1]
    exact, wrong, exact_square, wrong_square, product = error.sums.sum(axis=1) / n
    variance, error_variance = exact_square - exact**2, wrong_square - wrong**2
    covariance = product - exact * wrong
    if n == 0 or variance <= 0 or error_variance <= 0:
        return Correction(0.0, np.zeros(error.sums.shape[1]), 0.0)
    slope, r_squared = covariance / variance, covariance**2 / (variance * error_variance)
    if r_squared < least_r_squared or (clip_slope and slope < 0) or slope <= -0.5:
        slope = 0.0
    mean = (error.sums[1] - slope * error.sums[0]) / error.elements
    row_mean = error.sums[1] / error.elements
    spread = np.sqrt(np.maximum(error.row_squares / error.rows - row_mean**2, 0) / max(error.rows - 1, 1))
    mean = np.where(np.abs(mean) > standard_errors * spread, mean, 0.0)
    rest = error_variance + slope**2 * variance - 2 * slope * covariance
    return Correction(float(slope), mean, float(np.sqrt(max(rest, 0.0))), float(r_squared))


def fit_held_out(first: OutputError, second: OutputError, **options: float) -> Correction:
    """The correction of one step from two halves of the data, or none where it does not help the other half."""
    whole = OutputError()
    whole.merge(first)
    whole.merge(second)
    found = fit(whole, **options)  # type: ignore[arg-type]
    for one, other in ((first, second), (second, first)):
        if one.rows and other.rows and other.mean_square(fit(one, **options)) > other.mean_square():  # type: ignore[arg-type]
            return Correction(0.0, np.zeros_like(found.mean), found.deviation, found.r_squared)
    return found


@dataclass(frozen=True)
class SamplerTables:
    """The corrections inside a sampler: x' = A x + B e + C[c] + S z, with e the quantized prediction as it is.

    Attributes:
        sample: A [steps].
        prediction: B / (1 + k) [steps].
        constant: -B m[c] / (1 + k) [steps, channels].
        noise: What is left of the sampler's noise [steps].
    """

    sample: Array
    prediction: Array
    constant: Array
    noise: Array

    def advance(self, x: Array, prediction: Array, step: int, noise: Array | float = 0.0) -> Array:
        """One step of the sampler."""
        shape = (1, -1, *([1] * (x.ndim - 2)))
        moved: Array = self.sample[step] * x + self.prediction[step] * prediction + self.constant[step].reshape(shape)
        moved += self.noise[step] * noise
        return moved


def sampler_tables(
    alphas: Sequence[float],
    corrections: Mapping[int, Correction],
    channels: int,
    *,
    eta: float = 0.0,
    keep_direction: bool = True,
) -> SamplerTables:
    """Corrections folded into the coefficients of DDIM (eta 0 to 1; 1 has DDPM's variance).

    Args:
        alphas: The cumulative product of alpha at each visited step, and 1 at the end [steps + 1].
        corrections: By step; a step without one is left alone.
        channels: Of the sample.
        eta: How much noise the sampler adds.
        keep_direction: Whether the coefficient of the prediction keeps the sampler's own sigma, so that the marginal
            variance comes out right; ``False`` recomputes it from what is left of the noise, as the authors' code does.
    """
    now, later = np.asarray(alphas[:-1], np.float64), np.asarray(alphas[1:], np.float64)
    sigma = eta * np.sqrt((1 - later) / (1 - now) * (1 - now / later))
    sample = np.sqrt(later / now)
    image = np.sqrt(later * (1 - now) / now)
    prediction = np.sqrt(np.maximum(1 - later - sigma**2, 0)) - image
    none = Correction(0.0, np.zeros(channels), 0.0)
    found = [corrections.get(step, none) for step in range(len(now))]
    factor = np.array([item.factor for item in found])
    deviation = np.array([item.deviation for item in found])
    noise = np.sqrt(np.maximum(sigma**2 - (prediction * deviation * factor) ** 2, 0))
    if not keep_direction:
        prediction = np.sqrt(np.maximum(1 - later - noise**2, 0)) - image
    constant = prediction[:, None] * np.stack([item.offset for item in found])
    return SamplerTables(sample, prediction * factor, constant, noise)


def correct_noise(sampler: Sampler, table: str) -> dict[int, float]:
    """Let a sampler add less noise where quantization has added some already.

    What the recipe ``ptqd`` has written into the model's metadata is applied to the schedule that the model is sampled
    with: a DDIM scheduler with ``eta`` above 0, for epsilon, without guidance (which changes the error's variance).

    Args:
        sampler: Its schedule is told by how much to shrink its noise.
        table: The metadata entry ``onnxq.noise_correction``.

    Returns:
        By step, what is left of the standard deviation of the sampler's noise; empty where there is nothing to do.
    """
    schedule = sampler.schedule
    alphas = schedule.alphas() if isinstance(schedule, Diffusers) else None
    if not isinstance(schedule, Diffusers) or alphas is None or not schedule.eta or sampler.guidance != 1:
        return {}
    if schedule.scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        return {}
    found = {}
    try:
        rows = json.loads(table)
        times = np.asarray([row["timestep"] for row in rows], np.float64)
        for step, time in enumerate(schedule.timesteps):
            row = rows[int(np.abs(times - time).argmin())]  # as the correction in the graph is looked up
            mean = np.broadcast_to(np.asarray(row["mean"], np.float64), sampler.denoiser.noise_shape[:1])
            if not 1 + float(row["slope"]) > 0:
                raise ValueError("the correction divides by 1 + slope")
            found[step] = Correction(float(row["slope"]), mean, float(row["deviation"]), float(row["r_squared"]))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise OnnxqError(
            f"expected the table of the noise's correction in the model's metadata, found {table[:60]!r}",
            hint="quantize the model again",
        ) from error
    plain, corrected = (
        sampler_tables(alphas, items, sampler.denoiser.noise_shape[0], eta=schedule.eta).noise for items in ({}, found)
    )
    left = np.divide(corrected, plain, out=np.ones_like(plain), where=plain > 0)
    schedule.noise_factors = {step: float(factor) for step, factor in enumerate(left) if factor < 1}
    return schedule.noise_factors
