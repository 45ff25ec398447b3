"""Layers that are spared because they alone make most of the error of the images: in float, or with wider weights.

The floor of steps looks at the worst step. An error counts by what it does to the images, though, and a layer that is
no worse than others there may make nearly all of the error in the one step that counts a hundredfold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxq.calibration.data import STEP_KEY, Array
from onnxq.calibration.observers import Observer
from onnxq.calibration.weight_ranges import Search
from onnxq.diffusion.sparing import RANKING_STEPS, SparingSearch
from onnxq.job import Job
from onnxq.scheme import Scheme
from onnxq.sensitivity import ErrorPower

NEGLIGIBLE = 1e-4  # part of the images' power, 40 dB: nobody sees it
AHEAD = 2  # layers are tried at once where one brings too little: beside others it may make less than alone


@dataclass(frozen=True)
class Spared:
    """What was found.

    Attributes:
        layers: Names of the nodes, the most sensitive first.
        error: The images' error that is foretold with them spared, squared, as part of their power.
    """

    layers: list[str]
    error: float


def spare_for_images(
    job: Job,
    observer: Observer,
    search: Search | None,
    influence: Array,
    least_gain_db: float,
    scheme: Scheme | None = None,
) -> Spared:
    """Give layers another scheme in ``job.exceptions``, as long as the next takes so much off the images' error.

    Layers are ranked by the error of the images that each makes alone, in the steps that make most of it; at most half
    of them are spared, and none once that error is negligible. Everything is measured on calibration samples, on the
    graph that the target will run.

    Args:
        job: Its graph is prepared and has no Q/DQ yet; where inputs carry no steps, nothing is done.
        observer: How ranges follow from statistics.
        search: How ranges follow from weights.
        influence: Of each step on the images [steps].
        least_gain_db: By how much the images' error has to fall for each layer.
        scheme: What such a layer gets; float by default.

    Returns:
        The layers, and what error is left.
    """
    if STEP_KEY not in next(iter(job.source), {}):
        return Spared([], 0.0)
    with job.progress.stage("images", f"Judging {'layers' if scheme is None else 'widths'} by images"):
        layers = SparingSearch(job, observer, search, scheme)
        shares = error_shares(layers.judge(0), influence)
        error, count, further = sum(shares.values()), 0, 1
        if error > NEGLIGIBLE:
            worst = sorted(shares, key=lambda step: shares[step])[-RANKING_STEPS:]
            layers.rank(worst, lambda power: image_error(power, influence))
        while error > NEGLIGIBLE and further <= AHEAD and count + further <= len(layers.layers) // 2:
            less = image_error(layers.judge(count + further), influence)
            if less > 0 and 10 * np.log10(error / less) >= further * least_gain_db:
                error, count, further = less, count + further, 1
            else:
                further += 1
        found = layers.ranking.first(count) if count else []
        job.exceptions |= dict.fromkeys(found, layers.spared)
        if not layers.spared.weights.enabled:
            reason = f"in float it takes {least_gain_db:g} dB or more off the error of the images"
            job.reasons |= dict.fromkeys(found, reason)
    return Spared(found, error)


def image_error(power: ErrorPower, influence: Array) -> float:
    """The error of the images that follows from the prediction's in all steps; squared, as part of their power."""
    return sum(error_shares(power, influence).values())


def error_shares(power: ErrorPower, influence: Array) -> dict[int, float]:
    """The error of the images that follows from the prediction's in each step."""
    signal, error = power.signal, power.error
    return {step: float(influence[step]) * error[step] / signal[step] for step in signal if signal[step] > 0}
