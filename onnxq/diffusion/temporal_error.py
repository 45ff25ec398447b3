"""How well a quantized denoiser knows what time it is.

A temporal feature that quantization moves is not only wrong: it may end nearer to the feature of another step than to
its own, and the network then removes the noise of that step. Both are counted over all steps of the sampler.

Source: TFMQ-DM (arXiv 2311.16503), section 3.2: temporal feature disturbance and mismatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.diffusion.temporal_tables import FeatureTable

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TemporalError:
    """The error of the temporal features.

    Attributes:
        sqnr_db: Of all features together.
        worst_cosine: Between a feature and its float one, over features and steps.
        mismatches: How many features (of a step, and label) lie nearer to another step's, by cosine.
        features: How many there are: features times steps times labels.
    """

    sqnr_db: float
    worst_cosine: float
    mismatches: int
    features: int


def temporal_error(
    exact: Mapping[str, FeatureTable], found: Mapping[str, FeatureTable], steps: int
) -> TemporalError | None:
    """Compare tables of the float and of the quantized denoiser; ``None`` where they have no value in common.

    Args:
        exact: Of the float network.
        found: Of the quantized one, for the same timesteps and labels.
        steps: How many timesteps they are for.
    """
    signal = noise = 0.0
    worst, mismatches, features = 1.0, 0, 0
    for name in sorted(exact.keys() & found.keys()):
        wanted, seen = (tables[name].rows.astype(np.float64) for tables in (exact, found))
        signal += float(np.sum(wanted**2))
        noise += float(np.sum((seen - wanted) ** 2))
        by_label = (rows.reshape(steps, -1, *rows.shape[1:]).swapaxes(0, 1) for rows in (wanted, seen))
        for one, other in zip(*by_label, strict=True):  # a label's steps are compared among themselves
            cosines = _unit(other.reshape(steps, -1)) @ _unit(one.reshape(steps, -1)).T
            own = np.diagonal(cosines)
            worst = min(worst, float(own.min()))
            mismatches += int(np.sum(own < cosines.max(axis=1)))
            features += steps
    if not features:
        return None
    ratio = float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-30) / noise))
    return TemporalError(ratio, worst, mismatches, features)


def _unit(rows: Array) -> Array:
    unit: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return unit
