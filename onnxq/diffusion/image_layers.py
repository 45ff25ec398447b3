"""Layers that stay float because they alone make most of the error of the images.

The floor of steps looks at the worst step. An error counts by what it does to the images, though, and a layer that is
no worse than others there may make nearly all of the error in the one step that counts a hundredfold.
"""

from __future__ import annotations

import numpy as np

from onnxq.calibration.data import STEP_KEY, Array
from onnxq.calibration.observers import Observer
from onnxq.diffusion.step_floor import FloorSearch
from onnxq.job import Job
from onnxq.sensitivity import ErrorPower
from onnxq.switchboard import Search


def keep_images(job: Job, observer: Observer, search: Search | None, influence: Array, least_gain_db: float) -> float:
    """Give layers a float scheme in ``job.exceptions``, as long as the next takes so much off the images' error.

    Layers are ranked by the error that each makes alone in the step that makes most of the images' error; at most half
    of them stay float. Everything is measured on calibration samples, on the graph that the target will run.

    Args:
        job: Its graph is prepared and has no Q/DQ yet; where inputs carry no steps, nothing is done.
        observer: How ranges follow from statistics.
        search: How ranges follow from weights.
        influence: Of each step on the images [steps].
        least_gain_db: By how much the images' error has to fall for each layer.

    Returns:
        The images' error that is foretold, squared, as part of their power.
    """
    if STEP_KEY not in next(iter(job.source), {}):
        return 0.0
    with job.progress.stage("images", "Judging layers by images"):
        layers = FloorSearch(job, observer, search)
        shares = error_shares(layers.judge(0), influence)
        error, count = sum(shares.values()), 0
        layers.rank([max(shares, key=lambda step: shares[step])])
        while count < len(layers.layers) // 2:
            less = sum(error_shares(layers.judge(count + 1), influence).values())
            if less <= 0 or 10 * np.log10(error / less) < least_gain_db:
                break
            error, count = less, count + 1
        for name in layers.ranking.first(count) if count else ():
            job.exceptions[name] = layers.float_scheme
            job.reasons[name] = f"in float it takes {least_gain_db:g} dB or more off the error of the images"
    return error


def error_shares(power: ErrorPower, influence: Array) -> dict[int, float]:
    """The error of the images that follows from the prediction's in each step."""
    signal, error = power.signal, power.error
    return {step: float(influence[step]) * error[step] / signal[step] for step in signal if signal[step] > 0}
