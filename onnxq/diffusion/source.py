"""Calibration inputs of a denoiser from its file and the settings alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxq.calibration import sizes
from onnxq.config import Settings
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.conditions import open_conditions
from onnxq.diffusion.distilled_guidance import told_guidance
from onnxq.diffusion.exported_config import CONFIG, published_shape
from onnxq.diffusion.influence import image_influence
from onnxq.diffusion.schedule import open_schedule, unread_entries
from onnxq.diffusion.schedule_file import pipeline_folders, read_schedule
from onnxq.diffusion.trajectory import Sampler, Trajectories
from onnxq.errors import OnnxqError
from onnxq.parallel import Workers
from onnxq.progress import Progress
from onnxq.runtime import Session

if TYPE_CHECKING:
    from onnxq.job import Job

INPUTS = 256
TRAJECTORIES = 16
TOLERANCE = 1e-3  # between a float timestep in a file and the same in the schedule; integers are far apart


def open_sampler(
    model: ir.Model,
    path: Path | None,
    settings: Settings,
    samples: int | None = None,
    progress: Progress | None = None,
) -> tuple[Sampler, str]:
    """The sampler of a denoiser, and one line that says where its schedule comes from.

    Args:
        model: The denoiser.
        path: Its file.
        settings: ``scheduler``, ``steps``, ``guidance``, ``conditions``, ``seed``, ``shapes`` and ``device`` are read.
        samples: How many will be drawn, where that is known: no more prompts are encoded.
        progress: Where to say how far that is.

    Raises:
        OnnxqError: the model is no denoiser, or schedule, guidance or conditions do not fit it.
    """
    file = None if settings.scheduler is None else Path(settings.scheduler)
    around = pipeline_folders(file, path)
    sizes.choose(model, settings.shapes or _published_shapes(model, path, around))
    denoiser = denoisers.find(model)
    given = None if settings.conditions is None else Path(settings.conditions)
    told = told_guidance(model, denoiser, settings.guidance if "guidance" in settings.model_fields_set else None)
    usual = {} if told is None else {told.name: told.row}
    conditions = open_conditions(given, denoiser, around, settings.device, usual, samples, progress)
    entries, line = read_schedule(file, model, path, denoiser)
    schedule = open_schedule(entries, denoiser, settings.steps)
    if unread := unread_entries(entries):
        line = f"{line}, where {entries['_class_name']} does not read {', '.join(unread)}"
    weight = settings.guidance
    if told is not None and conditions[told.name] is told.row:
        line, weight = f"{line}; the network is told of guidance {told.weight:g}", 1.0
    sampler = Sampler(denoiser, schedule, weight, conditions, settings.seed)
    sampler.check()
    return sampler, line


def _published_shapes(model: ir.Model, path: Path | None, pipelines: Sequence[Path]) -> dict[str, Sequence[int]]:
    """The sample's size where the export leaves it free: the network's, or of packed latents the autoencoder's."""
    spec = denoisers.find_sample(model)
    if spec is None:
        return {}
    beside = [] if path is None else [path.with_name(CONFIG)]
    names = ("vae_decoder", "vae") if len(spec.shape) == 3 else ("unet", "transformer")
    for file in [*beside, *(folder / name / CONFIG for folder in pipelines for name in names)]:
        if shape := published_shape(file, spec):
            return {spec.name: shape}
    return {}


def sampler_of(job: Job) -> Sampler:
    """The sampler whose steps a recipe works with, all of them, whichever of them the calibration inputs hold.

    Args:
        job: Before its graph is changed. Its inputs are the denoiser's own trajectories, or recorded before: then the
            schedule is found as for ``onnxq trajectories``.

    Raises:
        OnnxqError: there is no such schedule, or the inputs were seen at timesteps that it does not visit.
    """
    if isinstance(job.source, Trajectories):
        return job.source.sampler
    sampler, origin = open_sampler(job.model, job.path, job.settings, TRAJECTORIES, job.progress)
    timesteps = np.asarray(sampler.schedule.timesteps)
    for sample in itertools.islice(iter(job.source), job.settings.samples):
        found = float(sample[sampler.denoiser.timestep.name])
        if np.abs(timesteps - found).min() > TOLERANCE * max(1.0, abs(found)):
            raise OnnxqError(
                f"expected inputs at the {len(timesteps)} timesteps of the sampler ({origin}), found one at {found:g}",
                hint="give --scheduler and --steps that the inputs were recorded with, or leave --data out",
            )
    return sampler


def check_timesteps(metadata: Mapping[str, str], timesteps: Sequence[float]) -> None:
    """Refuse a schedule for which a model with tables of temporal features has no rows.

    Args:
        metadata: Of the model (see :func:`onnxq.model.get_metadata`).
        timesteps: Those that the schedule visits.

    Raises:
        OnnxqError: a timestep would get the features of another.
    """
    text = metadata.get("temporal_timesteps", "[]")
    try:
        rows = np.asarray(json.loads(text), np.float64).reshape(-1)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise OnnxqError(
            f"expected timesteps in the model's metadata, found {text[:60]!r}", hint="quantize the model again"
        ) from error
    for time in timesteps if rows.size else ():
        if np.abs(rows - time).min() > TOLERANCE * max(1.0, abs(time)):
            raise OnnxqError(
                f"expected the {len(rows)} timesteps that the model has tables for, found {time:g} in the schedule",
                hint=f"sample with --steps {len(rows)} and the scheduler that it was quantized with",
            )


def own_trajectories(
    model: ir.Model,
    path: Path,
    settings: Settings,
    progress: Progress,
    recipe: object = None,
    workers: Workers | None = None,
) -> Trajectories:
    """What ``onnxq quantize`` calibrates a denoiser on when no data is given.

    A recipe may have its own idea of it, in knobs called ``selection``, ``trajectories`` and ``kept_steps``. With the
    selection ``influence`` each step's influence on the images is measured first.
    """
    count: int = getattr(recipe, "trajectories", TRAJECTORIES)
    sampler, origin = open_sampler(model, path, settings, count, progress)
    steps = len(sampler.schedule.timesteps)
    kept: int = getattr(recipe, "kept_steps", 0)
    wanted = settings.samples or (count * kept if kept else INPUTS)
    policy: str = getattr(recipe, "selection", "uniform")
    with progress.stage("trajectories", "Sampling trajectories", count * steps, "steps") as advance:
        session = Session(path, device=settings.device)
        source = Trajectories(
            sampler,
            session,
            count=wanted,
            trajectories=count,
            policy=policy,
            influence=image_influence(sampler, session) if policy == "influence" else None,
            advance=advance,
            workers=workers,
            shared=None if workers is None else workers.share_file(path, settings.device),
        )
    guidance = f", guidance {sampler.guidance:g}" if sampler.guidance != 1 else ""
    source.description = f"from {count} trajectories of {steps} steps{guidance} ({origin})"
    return source
