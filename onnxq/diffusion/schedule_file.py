"""Where a schedule's entries come from: a file, the model's metadata, its pipeline's folder, or what is most common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxq import model as models
from onnxq.diffusion.denoiser import Denoiser
from onnxq.diffusion.diffusers_schedule import MODULES
from onnxq.diffusion.network_time import FAST_WAVES, conventions, wave_rate
from onnxq.errors import OnnxqError
from onnxq.passes.split_shortcuts import find_shortcuts

CONFIG = "scheduler_config.json"
ASSUMED_DIFFUSION = {
    "_class_name": "DDIMScheduler",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "timestep_spacing": "trailing",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
}
ASSUMED_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
ASSUMED_FLOW_MATCHING = {"_class_name": "FlowMatching", "prediction_type": "velocity"}


def read_schedule(
    file: Path | None, model: ir.Model, path: Path | None, denoiser: Denoiser
) -> tuple[dict[str, Any], str]:
    """The schedule's entries, with those that follow from the network, and one line that says where they come from.

    Args:
        file: What ``--scheduler`` names, a file or the folder of a pipeline or its scheduler; else the model's metadata
            (``onnxq.scheduler``); else ``MODEL.scheduler.json`` beside the model; else the schedule of the pipeline
            that the model lies in, as exporters write it (``unet/model.onnx``, ``scheduler/scheduler_config.json``);
            else what is most common is assumed.
        model: The denoiser's graph.
        path: Its file.
        denoiser: The roles of its inputs.

    Raises:
        OnnxqError: the file is missing or not a JSON object.
    """
    rate = wave_rate(model, denoiser)
    entries, line = _found(file, model, path)
    if entries is None:
        entries, words = _assumed(model, denoiser, rate)
        line = f"no schedule was given: {words} assumed (--scheduler FILE)"
    return conventions(path, rate) | entries, line


def _found(file: Path | None, model: ir.Model, path: Path | None) -> tuple[dict[str, Any] | None, str]:
    """The entries that somebody wrote, and where."""
    metadata = models.get_metadata(model).get("scheduler")
    if file is None and metadata is not None:
        return _parse(metadata, "the model's metadata"), "schedule from the model's metadata"
    if file is not None and file.is_dir():
        file = _in_pipeline(file) or file / CONFIG
    if file is None and path is not None:
        beside = path.with_suffix(".scheduler.json")
        around = (found for folder in pipeline_folders(None, path) if (found := _in_pipeline(folder)))
        file = beside if beside.is_file() else next(around, None)
    if file is None:
        return None, ""
    return _parse(_read(file), str(file)), f"schedule from {file}"


def _assumed(model: ir.Model, denoiser: Denoiser, rate: float) -> tuple[dict[str, Any], str]:
    """What is most common for such a network, in words too.

    Whole numbers count steps of diffusion. So do floats that exporters call timestep and that become slow waves: of
    diffusion in a UNet, of a flow in a transformer. Other floats are parts of 1.
    """
    if denoiser.timestep.dtype.kind == "f":
        counts = 0 < rate < FAST_WAVES and denoiser.timestep.name.lower().startswith("timestep")
        if rate >= FAST_WAVES or (counts and not find_shortcuts(model.graph)):
            return ASSUMED_FLOW, "a flow from noise to data, with a shift of 3, is"
        if not counts:
            return ASSUMED_FLOW_MATCHING, "flow matching with velocities is"
    return ASSUMED_DIFFUSION, "1,000 linear betas 1e-4 to 0.02 and a predicted epsilon are"


def pipeline_folders(given: Path | None, path: Path | None) -> list[Path]:
    """Folders that may be that of the model's pipeline, likeliest first.

    Args:
        given: What ``--scheduler`` names.
        path: The model's file.
    """
    around = [] if path is None else list(path.absolute().parents[:2])
    return ([given] if given is not None and given.is_dir() else []) + around


def _in_pipeline(folder: Path) -> Path | None:
    """The schedule of a pipeline's folder, if it is one."""
    file = folder / "scheduler" / CONFIG
    return file if file.is_file() else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OnnxqError(
            f"expected a scheduler configuration at {file}, found {'nothing' if not file.exists() else error}",
            hint="give --scheduler the scheduler_config.json of the pipeline that the denoiser comes from",
        ) from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OnnxqError(
            f"expected a scheduler configuration as JSON in {where}, found {error}",
            hint="give the scheduler_config.json of the pipeline that the denoiser comes from",
        ) from error
    if not isinstance(entries, dict) or "_class_name" not in entries:
        raise OnnxqError(
            f"expected a JSON object with a _class_name in {where}, found none",
            hint=f"its _class_name is one of FlowMatching, {', '.join(MODULES)}",
        )
    return entries
