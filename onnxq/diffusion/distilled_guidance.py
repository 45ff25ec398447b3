"""Networks that learned what guidance does, as FLUX dev: they are told its weight, and run once where others run twice.

The weight goes through the same waves as the timestep. Pipelines give it as it is, or a thousand times as large where
the network counts its waves in timesteps (HunyuanVideo).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import Array
from onnxq.diffusion.denoiser import Condition, Denoiser
from onnxq.diffusion.network_time import FAST_WAVES, wave_rate

INPUT = "guidance"
USUAL = 3.5  # FLUX dev's
PER_UNIT = 1000.0


def told_weight(model: ir.Model, denoiser: Denoiser, weight: float) -> dict[str, Array]:
    """What the network is told of guidance, by the name of the input; empty if it reads nothing of that kind.

    Args:
        model: The denoiser's graph.
        denoiser: The roles of its inputs.
        weight: What the user asks for, or :data:`USUAL`.
    """
    for item in denoiser.conditions:
        spec = item.spec
        if spec.name == INPUT and spec.dtype.kind == "f" and len(spec.shape) <= 1:
            others = (
                Condition(denoiser.timestep, None),
                *(other for other in denoiser.conditions if other is not item),
            )
            rate = wave_rate(model, dataclasses.replace(denoiser, timestep=spec, conditions=others))
            factor = PER_UNIT if 0 < rate < FAST_WAVES else 1.0
            return {spec.name: np.full([1] * len(spec.shape), factor * weight, np.float32)}
    return {}
