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
``sigmas``, how much noise a flow's steps start from (:mod:`onnxq.diffusion.flow_sigmas`): ``even``, ``even_timesteps``,
``linear_quadratic`` or ``karras``; ``mu``, by which a schedule that shifts with the size of the sample
(``use_dynamic_shifting``) does so; and ``mu_rule``, by which it follows from that size: a ``line``, CogView4's
``root``, or FLUX.2's ``empirical`` one, in which steps count too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from onnxq.diffusion.denoiser import Denoiser
from onnxq.diffusion.diffusers_schedule import entries_of, open_diffusers
from onnxq.diffusion.flow_matching import ENTRIES, open_flow_matching
from onnxq.diffusion.schedule_entries import OwnEntries
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]
DEFAULT_STEPS = 50
FEW_STEPS = {"LCMScheduler": 4, "TCDScheduler": 4}  # of networks that were distilled to need no more


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


def open_schedule(config: Mapping[str, Any], denoiser: Denoiser, steps: int | None) -> Schedule:
    """The schedule of a file's entries, for so many steps; ``None``: for as many as the entries say.

    Raises:
        OnnxqError: an entry is unknown or wrong, or the steps or timesteps do not fit the model.
    """
    own = OwnEntries.read(config)
    count = steps or own.num_inference_steps or FEW_STEPS.get(config["_class_name"], DEFAULT_STEPS)
    if config["_class_name"] == "FlowMatching":
        return open_flow_matching(config, own, denoiser, count)
    schedule = open_diffusers(config, own, denoiser, count)
    last = max(schedule.timesteps)
    if denoiser.timestep_rows is not None and round(last) >= denoiser.timestep_rows:
        raise OnnxqError(
            f"expected timesteps below {denoiser.timestep_rows}, the rows of the model's table, found {last:g} "
            f"in the schedule ({config['_class_name']})",
            hint="give --scheduler the configuration that the denoiser was trained with",
        )
    return schedule


def unread_entries(config: Mapping[str, Any]) -> list[str]:
    """Entries of a schedule that opened which nothing reads: of another scheduler, or misspelled."""
    name = config["_class_name"]
    known = OwnEntries.model_fields.keys() | (ENTRIES if name == "FlowMatching" else entries_of(name))
    return [key for key in config if key not in known and not key.startswith("_")]
