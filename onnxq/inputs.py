"""Calibration inputs: what the user gave, trajectories of a denoiser, or what is made up without data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import kinds
from onnxq.calibration import sizes
from onnxq.calibration.data import InputSpec, Preprocessing, Source, input_specs, open_source
from onnxq.calibration.noise import Noise
from onnxq.calibration.picture_size import apart
from onnxq.calibration.side_car import attached
from onnxq.config import Settings
from onnxq.diffusion.exported_config import CONFIG, published_shape
from onnxq.diffusion.latents import read_scaling
from onnxq.parallel import Workers
from onnxq.progress import Progress

Array = np.ndarray[Any, Any]

SMALL_ELEMENTS = 3 * 96 * 96
MOST_ELEMENTS = 32 * 3 * 224 * 224  # of all inputs that are made of a model, unless more are asked for
FEWEST = 4


def calibration_inputs(
    model: ir.Model,
    path: Path,
    data: str | os.PathLike[str] | Iterable[Mapping[str, Array]] | None,
    settings: Settings,
    progress: Progress,
    recipe: object = None,
    *,
    judged_only: bool = False,
    checkpoint: Path | None = None,
    workers: Workers | None = None,
) -> tuple[Source, list[str]]:
    """The samples to calibrate on, and what the user should know about them.

    Args:
        model: The normalised float model.
        path: Its file, beside which a schedule may lie.
        data: What the user gave, or ``None``.
        settings: Preprocessing, number of samples, seed, schedule.
        progress: Where to say what is being done.
        recipe: The recipe, which may say which steps of a denoiser's trajectories it wants.
        judged_only: Whether nothing is learned from the samples; random ones then do to judge the result.
        checkpoint: A folder that keeps batches of made inputs, so that an interrupted run goes on with the next.
        workers: Who shares the making of trajectories; ``None``: nobody.

    Raises:
        OnnxqError: the data is not what the model needs, or the model has inputs that nothing can be made up for.
    """
    specs = input_specs(model)
    if data is None and (settings.scheduler or kinds.kind_of(model) is kinds.Kind.DENOISER):
        from onnxq.diffusion.source import own_trajectories

        return own_trajectories(model, path, settings, progress, recipe, workers), []
    if data is None and kinds.kind_of(model) is kinds.Kind.LANGUAGE:
        from onnxq.calibration.causality import writes_text
        from onnxq.calibration.generated_text import GeneratedText
        from onnxq.calibration.random_tokens import RandomTokens
        from onnxq.calibration.text import has_numbers

        numbers = [spec.name for spec in specs if has_numbers(spec)]
        if numbers or not writes_text(model, specs):
            guesses = not judged_only
            words, advice = "random tokens", "give text with --data FILE.txt --tokenizer tokenizer.json"
            if numbers:
                words += f" and random numbers ({', '.join(numbers)})"
                advice = "give real ones with --data FILE.npz, keyed by input name"
            done, worth = ("calibrated", "ranges are guesses") if guesses else ("judged", "real text tells more")
            return RandomTokens(model, specs, count=settings.samples or 32, seed=settings.seed), [
                f"{done} on {words}, because no --data was given: {worth}; {advice}"
                + (", or take --recipe int8-dynamic, which needs none" if guesses and settings.target == "cpu" else "")
            ]
        with progress.stage("generate", "Writing text"):
            written = GeneratedText(model, specs, count=settings.samples or 32, seed=settings.seed)
        return written, [
            f"calibrated on {len(written)} sequences of {written.length} tokens that the model wrote itself"
        ]
    if data is None and judged_only and settings.synthesis == "auto":
        return Noise(specs, count=settings.samples or 32, seed=settings.seed), [
            "judged on random inputs, because no --data was given; quantizing itself needed none"
        ]
    if data is None:
        return _made_up(model, path, specs, settings, progress, recipe, checkpoint)
    source = open_source(data, specs, Preprocessing(**settings.preprocess.model_dump()))
    return source, getattr(source, "notes", [])


def _made_up(
    model: ir.Model,
    path: Path,
    specs: Sequence[InputSpec],
    settings: Settings,
    progress: Progress,
    recipe: object,
    checkpoint: Path | None,
) -> tuple[Source, list[str]]:
    """Inputs made from the model: by the method that was asked for, the recipe's own, or what suits the model."""
    asked = settings.synthesis if settings.synthesis != "auto" else getattr(recipe, "synthesis", "auto")
    has_statistics = any(node.op_type == "BatchNormalization" for node in model.graph) or bool(attached(model))
    reason = (
        "as asked for"
        if asked == "noise"
        else "a model exported with its BatchNormalization nodes, or --statistics, would tell more"
    )
    if asked not in ("noise", "auto") or (
        asked == "auto" and (has_statistics or kinds.kind_of(model) is kinds.Kind.TRANSFORMER)
    ):
        try:
            from onnxq.synthesis import synthesize
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            reason = "pip install 'onnxq[learn]' lets onnxq make inputs from the model itself"
        else:
            method = synthesize.default_method(model) if asked == "auto" else asked
            if asked == "auto" and not has_statistics and not apart(specs)[0][0].is_picture:
                reason = "its input is no picture, whose patches could be told apart"
            elif asked != "auto" or synthesize.can_synthesise(model, specs, method):
                made = synthesize.synthesise(
                    model,
                    method,
                    count=settings.samples or getattr(recipe, "images", 0) or default_count(specs),
                    budget=settings.budget,
                    seed=settings.seed,
                    device=settings.device,
                    checkpoint=checkpoint,
                    progress=progress,
                )
                if np.isfinite(made.inputs).all():
                    return made, []
                reason = "its weights or statistics are so large that inputs made from them overflow"
            elif has_statistics:
                reason = "its inputs are none that can be made from BatchNormalization"
    shapes = {spec.name: shape for spec in specs if (shape := published_shape(path.with_name(CONFIG), spec))}
    if shapes and not settings.shapes:
        sizes.choose(model, shapes)
        specs = input_specs(model)
    latents = len(specs) == 1 and len(specs[0].shape) == 4 and not specs[0].is_picture
    scaling = read_scaling(path) if latents else None
    noise = Noise(specs, count=settings.samples or 32, seed=settings.seed, scaling=scaling)
    words, advice = "random inputs", ""
    if scaling is not None:
        words = "random latents, scaled as the autoencoder's config.json says"
        advice = "; give --data with those of the denoiser, which `onnxq sample DENOISER -o latents.npz` writes"
    return noise, [f"calibrated on {words}, because no --data was given ({reason}): ranges are guesses{advice}"]


def default_count(specs: Sequence[InputSpec]) -> int:
    """How many inputs are made: fewer large ones, each of which shows every layer more positions."""
    elements = int(np.prod([size or 1 for size in apart(specs)[0][0].shape[1:]]))
    return 64 if elements <= SMALL_ELEMENTS else min(32, max(FEWEST, MOST_ELEMENTS // elements))
