"""The sampler that a denoiser is used with: which timesteps it visits, and how each prediction moves the sample.

A schedule is a JSON file. With a ``_class_name`` of diffusers' (``DDIMScheduler``, ``DDPMScheduler``, …) it is
diffusers' own scheduler. For flow matching, where time runs from noise at 0 to data at 1, it is::

    {"_class_name": "FlowMatching", "prediction_type": "velocity", "num_inference_steps": 50}

``prediction_type`` may also be ``sample`` (the network predicts the data itself). Both kinds may add
``num_inference_steps`` (what ``--steps`` is without the option), ``guidance_interval`` ([low, high]: the timesteps
between which guidance acts) and ``data_range`` ([low, high] of an image, [-1, 1] if not given). A DDIM scheduler that
clips the predicted image (``clip_sample``) also corrects the noise by what was clipped, which is diffusers'
``use_clipped_model_output``, as the original samplers do; the file may set that to false. It may also add noise, by
``eta`` between 0 and 1 (1 is DDPM's variance).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from onnxq import model as models
from onnxq.calibration.data import Array
from onnxq.diffusion.denoiser import Denoiser
from onnxq.errors import OnnxqError

DEFAULT_STEPS = 50
PREDICTIONS = ("epsilon", "sample", "v_prediction")
MOST_TIMESTEPS = 1_000_000  # of a schedule: each has a row in its tables
OWN_KEYS = ("num_inference_steps", "use_clipped_model_output", "eta", "guidance_interval", "data_range")
# Files of diffusers' schedulers are named after their classes; the package itself takes much longer to import.
MODULES = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "LMSDiscreteScheduler": "lms_discrete",
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
    "HeunDiscreteScheduler": "heun_discrete",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "dpmsolver_singlestep",
    "UniPCMultistepScheduler": "unipc_multistep",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler_discrete",
}
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
ASSUMED_FLOW = {"_class_name": "FlowMatching", "prediction_type": "velocity"}


class Schedule(Protocol):
    """One run of a sampler over a batch. Steps are counted in sampling order; 0 is the noisiest.

    Attributes:
        timesteps: What the network is told at each step.
        guidance_interval: Timesteps between which guidance acts.
        data_range: The values between which an image lies.
    """

    timesteps: list[float]
    guidance_interval: tuple[float, float]
    data_range: tuple[float, float]

    def begin(self, seeds: Sequence[int]) -> float:
        """Start a run of one sample for each seed; returns what standard normal noise is multiplied with."""

    def scaled(self, sample: Array, step: int) -> Array:
        """The sample as the network sees it."""

    def advance(self, prediction: Array, step: int, sample: Array) -> Array:
        """The next sample."""


@dataclass
class FlowMatching:
    """Euler steps along a straight flow from noise (time 0) to data (time 1).

    x' = x + (t' - t) v; where the network predicts the data x1, v = (x1 - x) / (1 - t).
    Source: Y. Lipman et al., Flow Matching for Generative Modeling, ICLR 2023 (arXiv 2210.02747).
    """

    timesteps: list[float]
    predicts_sample: bool
    guidance_interval: tuple[float, float] = (-np.inf, np.inf)
    data_range: tuple[float, float] = (-1.0, 1.0)

    def begin(self, seeds: Sequence[int]) -> float:
        """Standard normal noise is what time 0 holds; nothing later is random."""
        return 1.0

    def scaled(self, sample: Array, step: int) -> Array:
        """The sample as it is."""
        return sample

    def advance(self, prediction: Array, step: int, sample: Array) -> Array:
        """One Euler step."""
        time = self.timesteps[step]
        following = self.timesteps[step + 1] if step + 1 < len(self.timesteps) else 1.0
        velocity = (prediction - sample) / (1 - time) if self.predicts_sample else prediction
        moved: Array = (sample + (following - time) * velocity).astype(np.float32)
        return moved


class Diffusers:
    """A scheduler of the package diffusers behind :class:`Schedule`.

    Attributes:
        eta: How much noise a DDIM scheduler adds.
        noise_factors: By step: what that noise is multiplied with, where it is not 1.
    """

    def __init__(self, scheduler: Any, steps: int, own: Mapping[str, Any]) -> None:
        self.scheduler, self.steps = scheduler, steps
        takes = inspect.signature(scheduler.step).parameters
        self._takes_generators = "generator" in takes
        self._options: dict[str, Any] = {}
        if "use_clipped_model_output" in takes:
            clips = bool(getattr(scheduler.config, "clip_sample", False))
            self._options["use_clipped_model_output"] = clips and own.get("use_clipped_model_output", True)
        self.eta = float(own.get("eta", 0.0))
        self.noise_factors: dict[int, float] = {}
        self._generators: list[Any] = []
        with _blaming(scheduler):
            scheduler.set_timesteps(steps)
            self.timesteps = [float(value) for value in scheduler.timesteps]
        low, high = own.get("guidance_interval", (-np.inf, np.inf))
        self.guidance_interval = (float(low), float(high))
        low, high = own.get("data_range", (-1.0, 1.0))
        self.data_range = (float(low), float(high))

    def begin(self, seeds: Sequence[int]) -> float:
        """Forget the steps of an earlier run; each sample has its own generator, so batches of any size agree."""
        import torch

        self.scheduler.set_timesteps(self.steps)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if self._takes_generators and not self.eta:
            self._options["generator"] = self._generators
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))  # schedulers of flows have none

    def scaled(self, sample: Array, step: int) -> Array:
        """What ``scale_model_input`` makes of the sample."""
        import torch

        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        with _blaming(self.scheduler):
            scaled = self.scheduler.scale_model_input(torch.from_numpy(sample), self.scheduler.timesteps[step])
        result: Array = scaled.numpy()
        return result

    def advance(self, prediction: Array, step: int, sample: Array) -> Array:
        """``step`` of the scheduler."""
        import torch

        if self.eta:  # drawn here as diffusers would, sample by sample, so that it can be made smaller
            shape = (1, *sample.shape[1:])
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in self._generators])
            self._options |= {"eta": self.eta, "variance_noise": noise * self.noise_factors.get(step, 1.0)}
        with _blaming(self.scheduler):
            moved = self.scheduler.step(
                torch.from_numpy(np.ascontiguousarray(prediction, np.float32)),
                self.scheduler.timesteps[step],
                torch.from_numpy(sample),
                **self._options,
            ).prev_sample
        result: Array = moved.to(torch.float32).numpy()
        return result

    def alphas(self) -> list[float] | None:
        """The cumulative product of alpha at each visited timestep and at the end, where the scheduler has one."""
        products = getattr(self.scheduler, "alphas_cumprod", None)
        if products is None:
            return None
        last = float(getattr(self.scheduler, "final_alpha_cumprod", 1.0))
        return [*(float(products[round(time)]) for time in self.timesteps), last]


def read_config(
    file: Path | None, model: ir.Model, model_path: Path | None, denoiser: Denoiser
) -> tuple[dict[str, Any], str]:
    """The schedule's entries, and one line that says where they come from.

    Args:
        file: What ``--scheduler`` names; else the model's metadata (``onnxq.scheduler``); else
            ``MODEL.scheduler.json`` beside the model; else what is most common is assumed.
        model: The denoiser's graph.
        model_path: Its file.
        denoiser: The roles of its inputs.

    Raises:
        OnnxqError: the file is missing or not a JSON object.
    """
    beside = None if model_path is None else model_path.with_suffix(".scheduler.json")
    metadata = models.get_metadata(model).get("scheduler")
    if file is not None:
        if file.is_dir():
            file = file / "scheduler_config.json"
        return _parse(_read(file), str(file)), f"schedule from {file}"
    if metadata is not None:
        return _parse(metadata, "the model's metadata"), "schedule from the model's metadata"
    if beside is not None and beside.is_file():
        return _parse(_read(beside), str(beside)), f"schedule from {beside}"
    if denoiser.timestep.dtype.kind == "f":
        return dict(ASSUMED_FLOW), "no schedule was given: flow matching with velocities is assumed (--scheduler FILE)"
    return dict(ASSUMED_DIFFUSION), (
        "no schedule was given: 1,000 linear betas 1e-4 to 0.02 and a predicted epsilon are assumed (--scheduler FILE)"
    )


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


def make(config: Mapping[str, Any], denoiser: Denoiser, steps: int | None) -> Schedule:
    """The schedule of ``steps`` steps.

    Raises:
        OnnxqError: the class or prediction type is unknown, or the steps or timesteps do not fit the model.
    """
    name = str(config["_class_name"])
    count = steps or _count(config, "num_inference_steps", DEFAULT_STEPS)
    own: dict[str, Any] = {key: _pair(config, key) for key in OWN_KEYS[3:] if key in config}
    if name == "FlowMatching":
        if denoiser.timestep.dtype.kind != "f":
            raise OnnxqError(
                f"expected a float timestep for flow matching, found {denoiser.timestep.name!r} "
                f"{denoiser.timestep.dtype}",
                hint="give --scheduler the configuration that the denoiser was trained with",
            )
        kind = config.get("prediction_type", "velocity")
        if kind not in ("velocity", "sample"):
            raise OnnxqError(
                f"expected prediction_type velocity or sample for FlowMatching, found {kind!r}",
                hint="correct the scheduler's file",
            )
        return FlowMatching([step / count for step in range(count)], kind == "sample", **own)
    own["use_clipped_model_output"] = bool(config.get("use_clipped_model_output", True))
    own["eta"] = config.get("eta", 0.0)
    if not isinstance(own["eta"], int | float) or not 0 <= own["eta"] <= (name == "DDIMScheduler"):
        raise OnnxqError(
            f"expected eta between 0 and 1 of a DDIMScheduler, found {own['eta']!r} of {name}",
            hint="correct the scheduler's file",
        )
    schedule = Diffusers(_scheduler(name, config, count), count, own)
    last = max(schedule.timesteps)
    if denoiser.timestep_rows is not None and round(last) >= denoiser.timestep_rows:
        raise OnnxqError(
            f"expected timesteps below {denoiser.timestep_rows}, the rows of the model's table, found {last:g} "
            f"in the schedule ({name})",
            hint="give --scheduler the configuration that the denoiser was trained with",
        )
    return schedule


def _scheduler(name: str, config: Mapping[str, Any], steps: int) -> Any:
    if name not in MODULES:
        raise OnnxqError(
            f"expected a scheduler of FlowMatching, {', '.join(MODULES)}, found {name!r}",
            hint="any of them can sample a model trained with noise; name one in the scheduler's file",
        )
    prediction = config.get("prediction_type", "epsilon")
    if "Flow" not in name and prediction not in PREDICTIONS:
        raise OnnxqError(
            f"expected prediction_type of {', '.join(PREDICTIONS)}, found {prediction!r}",
            hint="correct the scheduler's file",
        )
    train = _count(config, "num_train_timesteps", 1000)
    if not 1 <= steps <= train:
        raise OnnxqError(
            f"expected between 1 and {train} sampler steps (num_train_timesteps), found {steps}",
            hint="choose fewer --steps",
        )
    try:
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("diffusers", "torch"):
            raise
        raise OnnxqError(
            f"expected diffusers and torch for {name}, found no {error.name}",
            hint="pip install 'onnxq[diffusion]' (any build of torch; the CPU one does)",
        ) from error
    entries = {key: value for key, value in config.items() if key not in OWN_KEYS}
    with _blaming(getattr(module, name)):
        return getattr(module, name).from_config(entries)


@contextlib.contextmanager
def _blaming(scheduler: Any) -> Iterator[None]:
    """Whatever a scheduler of diffusers stumbles over stands in its configuration, which it hardly checks."""
    name = getattr(scheduler, "__name__", type(scheduler).__name__)
    try:
        yield
    except (MemoryError, OnnxqError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise OnnxqError(
            f"expected a configuration that diffusers' {name} takes, found {reason}",
            hint="correct the scheduler's file",
        ) from error


def _count(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or not 1 <= value <= MOST_TIMESTEPS:
        raise OnnxqError(
            f"expected {key} of the schedule between 1 and {MOST_TIMESTEPS}, found {value!r}",
            hint="correct the scheduler's file",
        )
    return value


def _pair(config: Mapping[str, Any], key: str) -> tuple[float, float]:
    value = config[key]
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(x, int | float) for x in value)
    if not numbers or not value[0] < value[1]:
        raise OnnxqError(
            f"expected [low, high] for {key} of the schedule, found {value!r}", hint="correct the scheduler's file"
        )
    return float(value[0]), float(value[1])
