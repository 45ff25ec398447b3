"""What an error in one sampler step does to the images: measured on the float network, step by step.

A sampler does not weigh its steps alike. Where it starts at almost no signal (a signal of 5e-5 beside noise of 1, as a
cosine schedule ends in), the first image that it makes of the prediction is the prediction's error two thousandfold:
there an error of a thousandth moves the images further than one of a tenth in the last step does.
"""

from __future__ import annotations

import numpy as np

from onnxq.calibration.data import Array
from onnxq.diffusion.denoiser import Runnable
from onnxq.diffusion.trajectory import Sampler

SAMPLES = 4
ERROR_DB = 36.0  # about what 8 bits leave of a prediction; clipping makes larger errors count for less
SMALLEST = 1e-12  # an influence so small is none


def image_influence(
    sampler: Sampler, session: Runnable, *, samples: int = SAMPLES, error_db: float = ERROR_DB
) -> Array:
    """How large the images' error becomes for each error of one step's prediction; both squared, over their powers.

    The sampler runs from the same noise as it is, and with noise added to the prediction in one step. Steps 0, 1, 2, 4,
    8 … and the last are tried; between them the logarithm is interpolated.

    Args:
        sampler: What to run.
        session: The float denoiser.
        samples: How many images to judge.
        error_db: Signal to noise ratio of the disturbed prediction.

    Returns:
        The influence of each step [steps].
    """
    steps = len(sampler.schedule.timesteps)
    probed = sorted({0, steps - 1, *(1 << power for power in range(steps.bit_length()) if 1 << power < steps)})
    wanted = _images(sampler, session, samples, None, 0.0)
    power = max(float(np.sum(wanted**2)), SMALLEST)
    relative = 10 ** (-error_db / 20)
    found = []
    for step in probed:
        moved = _images(sampler, session, samples, step, relative) - wanted
        found.append(max(float(np.sum(moved**2)) / power / relative**2, SMALLEST))
    influence: Array = np.exp(np.interp(np.arange(steps), probed, np.log(found)))
    return influence


def _images(sampler: Sampler, session: Runnable, samples: int, disturbed: int | None, relative: float) -> Array:
    """What the sampler ends in, with noise of a relative size in the prediction of one step."""
    found = []
    for start in range(0, samples, sampler.batch):
        indices = range(start, min(samples, start + sampler.batch))
        run = sampler.run(session, indices)
        for visit in run:
            if visit.step == disturbed:
                for index, row in zip(indices, visit.prediction, strict=True):
                    noise = np.random.default_rng([sampler.seed, index, 6]).standard_normal(row.shape, np.float32)
                    row += np.float32(relative * np.sqrt(np.mean(row**2) / np.mean(noise**2))) * noise
        found.append(run.sample)
    return np.concatenate(found).astype(np.float64)
