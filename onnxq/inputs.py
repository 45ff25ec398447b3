"""Calibration inputs: what the user gave, trajectories of a denoiser, or what is made up without data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import model as models
from onnxq.calibration.data import Preprocessing, Source, input_specs, open_source
from onnxq.calibration.noise import Noise
from onnxq.config import Settings
from onnxq.progress import Progress

Array = np.ndarray[Any, Any]


def calibration_inputs(
    model: ir.Model,
    path: Path,
    data: str | os.PathLike[str] | Iterable[Mapping[str, Array]] | None,
    settings: Settings,
    progress: Progress,
    recipe: object = None,
) -> tuple[Source, list[str]]:
    """The samples to calibrate on, and what the user should know about them.

    Args:
        model: The normalised float model.
        path: Its file, beside which a schedule may lie.
        data: What the user gave, or ``None``.
        settings: Preprocessing, number of samples, seed, schedule.
        progress: Where to say what is being done.
        recipe: The recipe, which may say which steps of a denoiser's trajectories it wants.

    Raises:
        OnnxqError: the data is not what the model needs, or the model has inputs that nothing can be made up for.
    """
    specs = input_specs(model)
    if data is None and (settings.scheduler or models.kind_of(model) is models.Kind.DENOISER):
        from onnxq.diffusion.source import own_trajectories

        return own_trajectories(model, path, settings, progress, recipe), []
    if data is None and models.kind_of(model) is models.Kind.LANGUAGE:
        from onnxq.calibration.generated_text import GeneratedText

        with progress.stage("generate", "Writing text"):
            written = GeneratedText(model, specs, count=settings.samples or 32, seed=settings.seed)
        return written, [
            f"calibrated on {len(written)} sequences of {written.length} tokens that the model wrote itself"
        ]
    if data is None:
        return Noise(specs, count=settings.samples or 32, seed=settings.seed), [
            "calibrated on random inputs, because no --data was given: ranges are guesses"
        ]
    preprocess = settings.preprocess.model_dump()
    return open_source(data, specs, Preprocessing(**preprocess)), []
