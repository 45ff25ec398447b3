"""Flow matching as research code samples it: Euler steps from noise at time 0 to data at time 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.diffusion.denoiser import Denoiser
from onnxq.diffusion.schedule_entries import OwnEntries
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]

ENTRIES = {"prediction_type"}  # of its file, beside those of any


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


def open_flow_matching(config: Mapping[str, Any], own: OwnEntries, denoiser: Denoiser, steps: int) -> FlowMatching:
    """A flow of so many even steps.

    Raises:
        OnnxqError: the network counts time in whole numbers, or predicts something else.
    """
    if denoiser.timestep.dtype.kind != "f":
        raise OnnxqError(
            f"expected a float timestep for flow matching, found {denoiser.timestep.name!r} {denoiser.timestep.dtype}",
            hint="give --scheduler the configuration that the denoiser was trained with",
        )
    kind = config.get("prediction_type", "velocity")
    if kind not in ("velocity", "sample"):
        raise OnnxqError(
            f"expected prediction_type velocity or sample for FlowMatching, found {kind!r}",
            hint="correct the scheduler's file",
        )
    times = [step / steps for step in range(steps)]
    return FlowMatching(times, kind == "sample", own.guidance_interval, own.data_range)
