"""A scheduler of the package diffusers, told the steps and telling the network the time as pipelines do it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxq.diffusion.denoiser import Denoiser
from onnxq.diffusion.flow_sigmas import given_sigmas
from onnxq.diffusion.network_time import told
from onnxq.diffusion.schedule_entries import OwnEntries, SchedulerEntries
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
FLOW_PREDICTION = "flow_prediction"  # of solvers that were made for noise, with use_flow_sigmas
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
    "IPNDMScheduler": "ipndm",
    "EDMEulerScheduler": "edm_euler",
    "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep",
    "CogVideoXDDIMScheduler": "ddim_cogvideox",
    "CogVideoXDPMScheduler": "dpm_cogvideox",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler_discrete",
    "FlowMatchHeunDiscreteScheduler": "flow_match_heun_discrete",
    "FlowMatchLCMScheduler": "flow_match_lcm",
}


class Diffusers:
    """A scheduler of the package diffusers behind :class:`onnxq.diffusion.schedule.Schedule`.

    Args:
        scheduler: It.
        chosen: What its ``set_timesteps`` is given.
        own: Entries of the schedule that are not its own.

    Attributes:
        timesteps, guidance_interval, data_range: Those of :class:`onnxq.diffusion.schedule.Schedule`.
        eta: How much noise a DDIM scheduler adds.
        noise_factors: By step: what that noise is multiplied with, where it is not 1.
    """

    def __init__(self, scheduler: Any, chosen: Mapping[str, Any], own: OwnEntries) -> None:
        self.scheduler, self._chosen = scheduler, dict(chosen)
        self._sign, self.eta = own.sign, own.eta
        takes = inspect.signature(scheduler.step).parameters
        self._takes_generators = "generator" in takes
        self._takes_last_data = "old_pred_original_sample" in takes
        self._starts_with_data = own.sigmas == "karras" and "sigmas" in chosen  # not all is noise then
        self._last_data: Any = None  # what the step before took for the image
        self._options: dict[str, Any] = {}
        if "use_clipped_model_output" in takes:
            clips = bool(getattr(scheduler.config, "clip_sample", False))
            self._options["use_clipped_model_output"] = clips and own.use_clipped_model_output
        self.noise_factors: dict[int, float] = {}
        self._generators: list[Any] = []
        with _blaming(scheduler):
            scheduler.set_timesteps(**self._chosen)
            counted = [float(value) for value in scheduler.timesteps]
        self.timesteps = told(counted, own.network_time, float(scheduler.config.num_train_timesteps))
        self._tells_timesteps = self.timesteps == counted
        self.guidance_interval, self.data_range = own.guidance_interval, own.data_range

    def begin(self, seeds: Sequence[int]) -> float:
        """Forget the steps of an earlier run; each sample has its own generator, so batches of any size agree."""
        import torch

        self.scheduler.set_timesteps(**self._chosen)
        self._last_data = None
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if self._takes_generators and not self.eta:
            self._options["generator"] = self._generators
        if self._starts_with_data:
            return float(self.scheduler.sigmas[0])
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
        times = self.scheduler.timesteps
        if self._takes_last_data:
            before = times[step - 1] if step else None
            self._options |= {"old_pred_original_sample": self._last_data, "timestep_back": before}
        with _blaming(self.scheduler):
            moved, *rest = self.scheduler.step(
                torch.from_numpy(np.ascontiguousarray(self._sign * prediction, np.float32)),
                timestep=times[step],
                sample=torch.from_numpy(sample),
                return_dict=False,
                **self._options,
            )
        self._last_data = rest[0] if self._takes_last_data else None
        result: Array = moved.to(torch.float32).numpy()
        return result

    def alphas(self) -> list[float] | None:
        """The cumulative product of alpha at each visited timestep and at the end, where the scheduler has one."""
        products = getattr(self.scheduler, "alphas_cumprod", None)
        if products is None or not all(0 <= round(time) < len(products) for time in self.timesteps):
            return None
        if not self._tells_timesteps or getattr(self.scheduler.config, "use_flow_sigmas", False):
            return None
        last = float(getattr(self.scheduler, "final_alpha_cumprod", 1.0))
        return [*(float(products[round(time)]) for time in self.timesteps), last]


def open_diffusers(config: Mapping[str, Any], own: OwnEntries, denoiser: Denoiser, steps: int) -> Diffusers:
    """The scheduler of the package that a configuration names, for so many steps.

    Raises:
        OnnxqError: diffusers is not installed, or the configuration is none of its schedulers'.
    """
    name, theirs = str(config["_class_name"]), SchedulerEntries.read(config)
    if name not in MODULES:
        raise OnnxqError(
            f"expected a scheduler of FlowMatching, {', '.join(MODULES)}, found {name!r}",
            hint="any of them can sample a model trained with noise: give --scheduler a file that names one",
        )
    if own.eta and name != "DDIMScheduler":
        raise OnnxqError(
            f"expected eta of a DDIMScheduler alone, found {own.eta:g} of {name}", hint="correct the scheduler's file"
        )
    known = (*PREDICTIONS, FLOW_PREDICTION) if theirs.use_flow_sigmas else PREDICTIONS
    if "Flow" not in name and theirs.prediction_type not in (None, *known):
        raise OnnxqError(
            f"expected prediction_type of {', '.join(known)}, found {theirs.prediction_type!r}",
            hint="correct the scheduler's file",
        )
    if steps > theirs.num_train_timesteps:
        raise OnnxqError(
            f"expected between 1 and {theirs.num_train_timesteps} sampler steps (num_train_timesteps), found {steps}",
            hint="choose fewer --steps",
        )
    chosen: dict[str, Any] = {"num_inference_steps": steps}
    if "FlowMatch" in name:
        chosen |= given_sigmas(own.sigmas, steps, theirs.num_train_timesteps)
        if own.sigmas == "karras":
            config = {**config, "use_karras_sigmas": False}  # they are already
    if theirs.use_dynamic_shifting:
        chosen["mu"] = theirs.mu(own.mu_rule, _tokens(denoiser), steps) if own.mu is None else own.mu
    return Diffusers(_scheduler(name, config), chosen, own)


def _tokens(denoiser: Denoiser) -> int:
    """What a transformer cuts a sample into: squares of each frame of its latent, where it is not tokens already."""
    sizes = [size or 1 for size in denoiser.sample.shape[1:]]
    if len(sizes) == 2:
        return sizes[0]
    *frames, height, width = (size for axis, size in enumerate(sizes, start=1) if axis != denoiser.channel_axis)
    return int(np.prod(frames)) * (height // TOKEN_SIDE) * (width // TOKEN_SIDE)


def entries_of(name: str) -> set[str]:
    """What the file of one of diffusers' schedulers may say, with what is read here though the scheduler does not."""
    return {*inspect.signature(_class(name)).parameters, *SchedulerEntries.model_fields}


def _scheduler(name: str, config: Mapping[str, Any]) -> Any:
    made = _class(name)
    with _blaming(made):
        return made.from_config({key: value for key, value in config.items() if key not in OwnEntries.model_fields})


def _class(name: str) -> Any:
    try:
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("diffusers", "torch"):
            raise
        raise OnnxqError(
            f"expected diffusers and torch for {name}, found no {error.name}",
            hint="pip install 'onnxq[diffusion]' (any build of torch; the CPU one does)",
        ) from error
    return getattr(module, name)


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
