"""The mean error of a denoiser's prediction as an image, for each sampler step, and how much of it to take back.

PTQD (arXiv 2305.10657) takes back the mean error of each channel. Where a step's input is nothing but noise, all noise
is alike to the network, and what it then errs by on average is an image that is known beforehand. Of few samples a mean
image is mostly noise itself, so it is shrunk by the noise that it holds (W. James, C. Stein, Estimation with quadratic
loss, 1961), and what does not help on other samples is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxq.calibration.data import Array
from onnxq.diffusion.noise_correction import Correction

LEAST_SHARE = 0.01  # of the images' error: a mean image that takes more off is worth its bytes in any case
SPARE_SHARE = 0.05  # of the bytes of all weights, for the others


@dataclass
class ErrorImage:
    """Sums over pairs of predictions in one sampler step: e of the float network, e + D of the quantized one.

    Attributes:
        rows: Samples seen.
        sums: Of e and D for each element [2, channels, …].
        squares: Of e², D² and e D over all elements [3].
    """

    rows: int = 0
    sums: Array = field(default_factory=lambda: np.zeros(2))
    squares: Array = field(default_factory=lambda: np.zeros(3))

    def update(self, expected: Array, found: Array) -> None:
        """Add predictions [samples, channels, …]."""
        exact = expected.astype(np.float64)
        error = found.astype(np.float64) - exact
        sums = np.stack([exact.sum(axis=0), error.sum(axis=0)])
        self.sums = self.sums + sums if self.rows else sums
        self.squares = self.squares + np.array([np.sum(exact**2), np.sum(error**2), np.sum(exact * error)])
        self.rows += len(exact)

    def merge(self, other: ErrorImage) -> None:
        """Add what another one has seen."""
        self.sums = self.sums + other.sums if self.rows and other.rows else (self if self.rows else other).sums
        self.squares = self.squares + other.squares
        self.rows += other.rows

    def mean(self, correction: Correction) -> tuple[Array, float]:
        """The mean error that a correction leaves, without each channel's mean, and the noise in it (mean square)."""
        slope = correction.factor - 1  # corrected - e = slope e + factor D + offset
        whole = (slope * self.sums[0] + correction.factor * self.sums[1]) / self.rows
        squares = np.array([slope**2, correction.factor**2, 2 * slope * correction.factor]) @ self.squares
        noise = (squares / self.rows - np.sum(whole**2)) / max(self.rows - 1, 1) / whole.size
        return whole - whole.mean(axis=tuple(range(1, whole.ndim)), keepdims=True), max(float(noise), 0.0)

    def shrunk(self, correction: Correction) -> Array:
        """The mean error, smaller by the part that is noise."""
        image, noise = self.mean(correction)
        power = float(np.mean(image**2))
        result: Array = image * max(0.0, 1 - noise / power) if power > 0 else image
        return result


def mean_image(halves: tuple[ErrorImage, ErrorImage], correction: Correction) -> tuple[Array, float]:
    """What to take from the corrected prediction of a step, from two halves of the data.

    Returns:
        The image [channels, …], zero where it does not help the other half, and by how much the mean squared error
        falls, measured on the other half.
    """
    whole = ErrorImage()
    for half in halves:
        whole.merge(half)
    gains = []
    for one, other in (halves, halves[::-1]):
        if one.rows < 2 or other.rows < 2:
            return np.zeros(whole.sums.shape[1:]), 0.0
        image = one.shrunk(correction)
        gains.append(float(np.mean(2 * image * other.mean(correction)[0] - image**2)))
    if min(gains) <= 0:
        return np.zeros(whole.sums.shape[1:]), 0.0
    return whole.shrunk(correction), float(np.mean(gains))


def worth_storing(
    images: Mapping[int, tuple[Array, float]],
    errors: Mapping[int, float],
    weights: Mapping[int, float],
    spare_bytes: float,
) -> dict[int, Array]:
    """The mean images of the steps that gain most: all that take a hundredth off the images' error, others if small.

    What a mean error does adds up over the steps that share it, so that steps of little influence gain together.

    Args:
        images: By step, from :func:`mean_image`.
        errors: By step, the mean squared error of the corrected prediction.
        weights: By step, what that does to what is sampled: the step's influence over the prediction's mean square.
        spare_bytes: What all images together may take, where they gain less than that.
    """
    total = sum(weights[step] * error for step, error in errors.items())
    gains = {step: weights[step] * gain for step, (_, gain) in images.items() if gain > 0}
    kept: dict[int, Array] = {}
    for step in sorted(gains, key=lambda step: -gains[step]):
        image = images[step][0]
        if gains[step] > LEAST_SHARE * total or 4 * image.size * (len(kept) + 2) <= spare_bytes:  # one is of zeros
            kept[step] = image
    return dict(sorted(kept.items()))
