"""What an error in one sampler step does to the images: measured on the float network, step by step.

A sampler does not weigh its steps alike. Where it starts at almost no signal (a signal of 5e-5 beside noise of 1, as a
cosine schedule ends in), the first image that it makes of the prediction is the prediction's error two thousandfold:
there an error of a thousandth moves the images further than one of a tenth in the last step does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.calibration.data import Array
from onnxq.diffusion.denoiser import Runnable
from onnxq.diffusion.trajectory import Sampler
from onnxq.runtime import Feed

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
    relative = 10 ** (-error_db / 20)
    power, moved = 0.0, np.zeros(len(probed))
    for start in range(0, samples, sampler.batch):
        indices = range(start, min(samples, start + sampler.batch))
        network = Remembering(session)
        wanted = _images(sampler, network, indices)
        power += float(np.sum(wanted**2))
        for position, step in enumerate(probed):
            moved[position] += np.sum((_images(sampler, network, indices, step, relative) - wanted) ** 2)
    found = np.maximum(moved / max(power, SMALLEST) / relative**2, SMALLEST)
    influence: Array = np.exp(np.interp(np.arange(steps), probed, np.log(found)))
    return influence


class Remembering:
    """A network that answers from memory as long as a sampler asks what it has asked before.

    Until a prediction is disturbed, a second run from the same noise is the first: that saves a third of the network's
    runs.

    Args:
        session: The network.
    """

    def __init__(self, session: Runnable) -> None:
        self.session = session
        self.answers: list[list[Array]] = []
        self.ends: list[int] = []  # how many answers each step of the first run had taken when it was over
        self._asked = self._known = 0

    def begin(self, last: int | None) -> None:
        """A run starts, which is the first one's up to a step's prediction, or (``None``) is the first."""
        self._asked, self._known = 0, 0 if last is None else self.ends[last]

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        """Run one batch, or say what it gave."""
        self._asked += 1
        if self._asked <= self._known:
            return self.answers[self._asked - 1]
        found = self.session.run(feed, outputs)
        if not self._known:
            self.answers.append(found)
        return found


def _images(
    sampler: Sampler, network: Remembering, indices: range, disturbed: int | None = None, relative: float = 0.0
) -> Array:
    """What the sampler ends in, with noise of a relative size in the prediction of one step."""
    network.begin(disturbed)
    run = sampler.run(network, indices)
    for visit in run:
        if disturbed is None:
            network.ends.append(len(network.answers))
        elif visit.step == disturbed:
            for index, row in zip(indices, visit.prediction, strict=True):
                noise = np.random.default_rng([sampler.seed, index, 6]).standard_normal(row.shape, np.float32)
                row += np.float32(relative * np.sqrt(np.mean(row**2) / np.mean(noise**2))) * noise
    return run.sample.astype(np.float64)
