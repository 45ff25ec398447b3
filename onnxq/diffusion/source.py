"""Calibration inputs of a denoiser from its file and the settings alone."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from onnxq.config import Settings
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion import schedule as schedules
from onnxq.diffusion.trajectory import Sampler, Trajectories
from onnxq.progress import Progress
from onnxq.runtime import Session

INPUTS = 256
TRAJECTORIES = 16


def open_sampler(model: ir.Model, path: Path, settings: Settings) -> tuple[Sampler, str]:
    """The sampler of a denoiser, and one line that says where its schedule comes from.

    Args:
        model: The denoiser.
        path: Its file.
        settings: ``scheduler``, ``steps``, ``guidance``, ``conditions`` and ``seed`` are read.

    Raises:
        OnnxqError: the model is no denoiser, or schedule, guidance or conditions do not fit it.
    """
    denoiser = denoisers.find(model)
    conditions = denoisers.open_conditions(None if settings.conditions is None else Path(settings.conditions), denoiser)
    file = None if settings.scheduler is None else Path(settings.scheduler)
    config, line = schedules.read_config(file, model, path, denoiser)
    schedule = schedules.make(config, denoiser, settings.steps)
    sampler = Sampler(denoiser, schedule, settings.guidance, conditions, settings.seed)
    sampler.check()
    return sampler, line


def own_trajectories(
    model: ir.Model, path: Path, settings: Settings, progress: Progress, recipe: object = None
) -> Trajectories:
    """What ``onnxq quantize`` calibrates a denoiser on when no data is given.

    A recipe may have its own idea of it, in knobs called ``selection``, ``trajectories`` and ``kept_steps``.
    """
    sampler, origin = open_sampler(model, path, settings)
    steps = len(sampler.schedule.timesteps)
    count: int = getattr(recipe, "trajectories", TRAJECTORIES)
    kept: int = getattr(recipe, "kept_steps", 0)
    wanted = settings.samples or (count * kept if kept else INPUTS)
    policy: str = getattr(recipe, "selection", "uniform")
    with progress.stage("trajectories", "Sampling trajectories", count * steps, "steps") as advance:
        session = Session(path, device=settings.device)
        source = Trajectories(sampler, session, count=wanted, trajectories=count, policy=policy, advance=advance)
    guidance = f", guidance {settings.guidance:g}" if settings.guidance != 1 else ""
    source.description = f"from {count} trajectories of {steps} steps{guidance} ({origin})"
    return source
