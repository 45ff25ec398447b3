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

What pipelines of diffusers do by themselves can be said to its schedulers, too, and is what
:mod:`onnxq.diffusion.network_time` finds if it is not: ``network_time``, whether the network is told the ``timestep``,
the part of the sample that is ``noise`` (timestep / num_train_timesteps), or that which is ``data`` (1 minus that);
``negated``, whether its prediction changes sign before the scheduler's step (it does with ``data`` if nothing is said);
``even_sigmas``, whether a flow's noise starts from even parts, 1 to 1/steps; and ``mu``, by which a schedule that
shifts with the size of the sample (``use_dynamic_shifting``) does so.
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
from onnxq.diffusion.network_time import FAST_WAVES, wave_rate
from onnxq.errors import OnnxqError
from onnxq.passes.split_shortcuts import find_shortcuts

DEFAULT_STEPS = 50
PREDICTIONS = ("epsilon", "sample", "v_prediction")
FLOW_PREDICTION = "flow_prediction"  # of solvers that were made for noise, with use_flow_sigmas
MOST_TIMESTEPS = 1_000_000  # of a schedule: each has a row in its tables
PAIRS = ("guidance_interval", "data_range")
OWN_KEYS = (
    "num_inference_steps", "use_clipped_model_output", "eta", "network_time", "negated", "even_sigmas", "mu", *PAIRS,
)  # fmt: skip
NETWORK_TIMES = ("timestep", "noise", "data")
FEWEST_COUNTED = (
    10.0  # the largest timestep of a scheduler that counts steps; EDM's are quarters of logarithms, below 2
)
# Tokens of a small and of a large sample, and the shifts of their schedules: keys of a configuration, FLUX's numbers.
SHIFTS = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
TOKEN_SIDE = 2  # places of a latent that become one token, along each axis
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
    "DEISMultistepScheduler": "deis_multistep",
    "SASolverScheduler": "sasolver",
    "KDPM2DiscreteScheduler": "k_dpm_2_discrete",
    "KDPM2AncestralDiscreteScheduler": "k_dpm_2_ancestral_discrete",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "EDMEulerScheduler": "edm_euler",
    "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep",
    "CogVideoXDDIMScheduler": "ddim_cogvideox",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler_discrete",
    "FlowMatchHeunDiscreteScheduler": "flow_match_heun_discrete",
}
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

    Args:
        scheduler: It.
        chosen: What its ``set_timesteps`` is given.
        own: Entries of the schedule that are not its own (see the module).

    Attributes:
        eta: How much noise a DDIM scheduler adds.
        noise_factors: By step: what that noise is multiplied with, where it is not 1.
    """

    def __init__(self, scheduler: Any, chosen: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.scheduler, self._chosen = scheduler, dict(chosen)
        self._network_time = own.get("network_time", "timestep")
        self._sign = -1 if own.get("negated", self._network_time == "data") else 1
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
            scheduler.set_timesteps(**self._chosen)
            counted = [float(value) for value in scheduler.timesteps]
        if self._network_time == "noise" and max(counted) < FEWEST_COUNTED:
            self._network_time = "timestep"  # it tells parts of 1 already, or logarithms
        self.timesteps = [self._told(time) for time in counted]
        low, high = own.get("guidance_interval", (-np.inf, np.inf))
        self.guidance_interval = (float(low), float(high))
        low, high = own.get("data_range", (-1.0, 1.0))
        self.data_range = (float(low), float(high))

    def _told(self, timestep: float) -> float:
        """What the network is told of a timestep of the scheduler."""
        if self._network_time == "timestep":
            return timestep
        noise = timestep / float(self.scheduler.config.num_train_timesteps)
        return noise if self._network_time == "noise" else 1 - noise

    def begin(self, seeds: Sequence[int]) -> float:
        """Forget the steps of an earlier run; each sample has its own generator, so batches of any size agree."""
        import torch

        self.scheduler.set_timesteps(**self._chosen)
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
                torch.from_numpy(np.ascontiguousarray(self._sign * prediction, np.float32)),
                self.scheduler.timesteps[step],
                torch.from_numpy(sample),
                **self._options,
            ).prev_sample
        result: Array = moved.to(torch.float32).numpy()
        return result

    def alphas(self) -> list[float] | None:
        """The cumulative product of alpha at each visited timestep and at the end, where the scheduler has one."""
        products = getattr(self.scheduler, "alphas_cumprod", None)
        if products is None or not all(0 <= round(time) < len(products) for time in self.timesteps):
            return None
        if self._network_time != "timestep" or getattr(self.scheduler.config, "use_flow_sigmas", False):
            return None
        last = float(getattr(self.scheduler, "final_alpha_cumprod", 1.0))
        return [*(float(products[round(time)]) for time in self.timesteps), last]


def read_config(
    file: Path | None, model: ir.Model, model_path: Path | None, denoiser: Denoiser
) -> tuple[dict[str, Any], str]:
    """The schedule's entries, and one line that says where they come from.

    Args:
        file: What ``--scheduler`` names, a file or the folder of a pipeline or its scheduler; else the model's metadata
            (``onnxq.scheduler``); else ``MODEL.scheduler.json`` beside the model; else the schedule of the pipeline
            that the model lies in, as exporters write it (``unet/model.onnx``, ``scheduler/scheduler_config.json``);
            else what is most common is assumed.
        model: The denoiser's graph.
        model_path: Its file.
        denoiser: The roles of its inputs.

    Raises:
        OnnxqError: the file is missing or not a JSON object.
    """
    metadata = models.get_metadata(model).get("scheduler")
    if file is None and metadata is not None:
        return _parse(metadata, "the model's metadata"), "schedule from the model's metadata"
    if file is not None and file.is_dir():
        file = _in_pipeline(file) or file / CONFIG
    if file is None and model_path is not None:
        beside = model_path.with_suffix(".scheduler.json")
        folder = model_path.absolute().parent
        file = beside if beside.is_file() else _in_pipeline(folder) or _in_pipeline(folder.parent)
    if file is not None:
        return _parse(_read(file), str(file)), f"schedule from {file}"
    assumed, words = _assumed(model, denoiser)
    return dict(assumed), f"no schedule was given: {words} assumed (--scheduler FILE)"


def _assumed(model: ir.Model, denoiser: Denoiser) -> tuple[Mapping[str, Any], str]:
    """What is most common for such a network, in words too.

    Whole numbers count steps of diffusion. So do floats that exporters call timestep and that become slow waves: of
    diffusion in a UNet, of a flow in a transformer. Other floats are parts of 1.
    """
    if denoiser.timestep.dtype.kind == "f":
        rate = wave_rate(model, denoiser)
        counts = 0 < rate < FAST_WAVES and denoiser.timestep.name.lower().startswith("timestep")
        if rate >= FAST_WAVES or (counts and not find_shortcuts(model.graph)):
            return ASSUMED_FLOW, "a flow from noise to data, with a shift of 3, is"
        if not counts:
            return ASSUMED_FLOW_MATCHING, "flow matching with velocities is"
    return ASSUMED_DIFFUSION, "1,000 linear betas 1e-4 to 0.02 and a predicted epsilon are"


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


def make(config: Mapping[str, Any], denoiser: Denoiser, steps: int | None) -> Schedule:
    """The schedule of ``steps`` steps.

    Raises:
        OnnxqError: the class or prediction type is unknown, or the steps or timesteps do not fit the model.
    """
    name = str(config["_class_name"])
    count = steps or _count(config, "num_inference_steps", DEFAULT_STEPS)
    own: dict[str, Any] = {key: _pair(config, key) for key in PAIRS if key in config}
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
    time = config.get("network_time", "timestep")
    if time not in NETWORK_TIMES:
        raise OnnxqError(
            f"expected network_time of {', '.join(NETWORK_TIMES)}, found {time!r}", hint="correct the scheduler's file"
        )
    for key in ("negated", "even_sigmas"):
        if not isinstance(config.get(key, False), bool):
            raise OnnxqError(
                f"expected true or false for {key} of the schedule, found {config[key]!r}",
                hint="correct the scheduler's file",
            )
    own |= {key: config[key] for key in ("network_time", "negated") if key in config}
    schedule = Diffusers(_scheduler(name, config, count), _chosen(config, count, denoiser), own)
    last = max(schedule.timesteps)
    if denoiser.timestep_rows is not None and round(last) >= denoiser.timestep_rows:
        raise OnnxqError(
            f"expected timesteps below {denoiser.timestep_rows}, the rows of the model's table, found {last:g} "
            f"in the schedule ({name})",
            hint="give --scheduler the configuration that the denoiser was trained with",
        )
    return schedule


def _chosen(config: Mapping[str, Any], steps: int, denoiser: Denoiser) -> dict[str, Any]:
    """How a scheduler is told the steps.

    The shift mu grows with the tokens of a sample, between two sizes that the configuration names.
    Source: P. Esser et al., Scaling Rectified Flow Transformers, ICML 2024 (arXiv 2403.03206), section 5.3.2, as
    diffusers' pipelines interpolate it.
    """
    chosen: dict[str, Any] = {"num_inference_steps": steps}
    if config.get("even_sigmas") and "FlowMatch" in config["_class_name"]:
        chosen["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    if config.get("use_dynamic_shifting"):
        few, base, many, most = numbers = [config.get(key, usual) for key, usual in SHIFTS.items()]
        if not all(isinstance(item, int | float) for item in numbers) or few >= many:
            raise OnnxqError(
                f"expected numbers for {', '.join(SHIFTS)} of the schedule, found {numbers}",
                hint="correct the scheduler's file",
            )
        chosen["mu"] = config.get("mu", base + (most - base) * (_tokens(denoiser) - few) / (many - few))
    return chosen


def _tokens(denoiser: Denoiser) -> int:
    """What a transformer cuts a sample into: squares of each frame of its latent, where it is not tokens already."""
    sizes = [size or 1 for size in denoiser.sample.shape[1:]]
    if len(sizes) == 2:
        return sizes[0]
    *frames, height, width = (size for axis, size in enumerate(sizes, start=1) if axis != denoiser.channel_axis)
    return int(np.prod(frames)) * (height // TOKEN_SIDE) * (width // TOKEN_SIDE)


def _scheduler(name: str, config: Mapping[str, Any], steps: int) -> Any:
    if name not in MODULES:
        raise OnnxqError(
            f"expected a scheduler of FlowMatching, {', '.join(MODULES)}, found {name!r}",
            hint="any of them can sample a model trained with noise: give --scheduler a file that names one",
        )
    prediction = config.get("prediction_type", "epsilon")
    known = (*PREDICTIONS, FLOW_PREDICTION) if config.get("use_flow_sigmas") else PREDICTIONS
    if "Flow" not in name and prediction not in known:
        raise OnnxqError(
            f"expected prediction_type of {', '.join(known)}, found {prediction!r}",
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
