"""From the float graph to one with Q/DQ whose scales are set: where nearly every recipe starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.calibration.bias_correction import correct_biases, corrected_apart
from onnxq.calibration.calibrate import set_activation_scales, set_weight_scales
from onnxq.calibration.observers import Observer
from onnxq.calibration.one_sided import free_zero_points
from onnxq.calibration.weight_ranges import Search
from onnxq.job import Job

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Calibrated:
    """What a recipe may want to know of it.

    Attributes:
        shifted: Names of the one-sided activations that have a zero point though codes are symmetric.
        biases: Corrected biases by initializer, where the graph keeps its own.
    """

    shifted: list[str]
    biases: dict[str, Array]


def insert_calibrated(
    job: Job,
    observe: Observer,
    search: Search | None,
    *,
    shift: bool = False,
    corrects_biases: bool = False,
    is_teacher: bool = False,
) -> Calibrated:
    """Insert Q/DQ, run the float graph once, and set the scales of activations and weights; codes are stored later.

    Args:
        job: Prepared, with all exceptions in place.
        observe: How a range follows from the statistics of an activation.
        search: How the range of a weight does (see :func:`set_weight_scales`).
        shift: Whether one-sided activations get a zero point where codes are symmetric.
        corrects_biases: Whether biases take back the mean shift that rounding the weights to the nearest code causes.
        is_teacher: Whether the graph without its Q/DQ is what a student learns from: it keeps its biases then, and the
            corrected ones are returned for the student to start from.
    """
    job.insert(means=corrects_biases)
    statistics = job.record()
    shifted = free_zero_points(job, statistics, observe) if shift else []
    job.ranges = set_activation_scales(job.model, statistics, observe)
    set_weight_scales(job.model, search)
    job.search = search
    biases: dict[str, Array] = {}
    if corrects_biases and is_teacher:
        biases = corrected_apart(job.model, job.channel_means)
    elif corrects_biases:
        correct_biases(job.model, job.channel_means)
    return Calibrated(shifted, biases)
