"""Give weights the levels of tables: what recipes of non-uniform grids do once they have found them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxq.calibration import bias_correction, calibrate
from onnxq.calibration.observers import Observer
from onnxq.job import Job
from onnxq.passes.tabulate_weights import TabulateWeights
from onnxq.weights.tables import Table


def insert_levels(
    job: Job,
    tables: Mapping[str, tuple[Table, np.ndarray[Any, Any]]],
    storage: str,
    observer: Observer,
    *,
    corrects_biases: bool,
) -> None:
    """Insert Q/DQ, calibrate activations, correct biases for the levels, and store those.

    Args:
        job: Before ``insert``.
        tables: The table of each weight and the scale of its rows, by the weight's name.
        storage: ``table`` or ``int8``.
        observer: How a range follows from the statistics of an activation.
        corrects_biases: Whether biases take back the mean shift that rounding to the levels causes.
    """
    job.insert(means=corrects_biases)
    job.ranges = calibrate.set_activation_scales(job.model, job.record(), observer)
    levels = TabulateWeights(tables, storage, packed=job.target.packs_codes)
    bias_correction.correct_biases(job.model, job.channel_means, levels.rounded)
    levels(job.model)
