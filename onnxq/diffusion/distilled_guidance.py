"""Networks that learned what guidance does: they are told its weight, and run once where others run twice.

FLUX dev reads the weight as a number, ``guidance``, which becomes waves as the timestep does; pipelines give it as it
is, or a thousand times as large where the network counts its waves in timesteps (HunyuanVideo). Latent consistency
models read the waves themselves, ``timestep_cond`` [batch, width] (arXiv 2310.04378, section 4.3; in the pipelines'
count of guidance, where 1 means none).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import Array
from onnxq.diffusion.denoiser import Condition, Denoiser
from onnxq.diffusion.network_time import FAST_WAVES, wave_rate

AS_NUMBER, AS_WAVES = "guidance", "timestep_cond"
USUAL = {AS_NUMBER: 3.5, AS_WAVES: 8.5}  # of FLUX dev's pipeline, and of the consistency models'
PER_UNIT = np.float32(1000)
SLOWEST = np.float32(1e-4)  # of the waves, to the fastest


@dataclass(frozen=True)
class ToldGuidance:
    """What a network is told of guidance.

    Attributes:
        name: Of the input.
        row: For one sample.
        weight: Of the guidance that it means.
    """

    name: str
    row: Array
    weight: float


def told_guidance(model: ir.Model, denoiser: Denoiser, asked: float | None) -> ToldGuidance | None:
    """What the network is told of guidance; ``None`` if it reads nothing of that kind.

    Args:
        model: The denoiser's graph.
        denoiser: The roles of its inputs.
        asked: The weight that the user asks for; ``None``: the usual one.
    """
    for item in denoiser.conditions:
        spec, weight = item.spec, USUAL.get(item.spec.name, 0.0) if asked is None else asked
        if spec.dtype.kind != "f":
            continue
        if spec.name == AS_NUMBER and len(spec.shape) <= 1:
            others = (
                Condition(denoiser.timestep, None),
                *(other for other in denoiser.conditions if other is not item),
            )
            rate = wave_rate(model, dataclasses.replace(denoiser, timestep=spec, conditions=others))
            factor = PER_UNIT if 0 < rate < FAST_WAVES else 1
            return ToldGuidance(spec.name, np.full([1] * len(spec.shape), weight * factor, np.float32), weight)
        if spec.name == AS_WAVES and len(spec.shape) == 2 and spec.shape[1] is not None:
            return ToldGuidance(spec.name, _waves(weight, spec.shape[1])[None], weight)
    return None


def _waves(weight: float, width: int) -> Array:
    """Sines, then cosines, of frequencies in even ratios; a place that is left over is 0."""
    half = width // 2
    rates = SLOWEST ** (np.arange(half, dtype=np.float32) / np.float32(max(half - 1, 1)))
    turned = np.float32(weight - 1) * PER_UNIT * rates
    return np.concatenate([np.sin(turned), np.cos(turned), np.zeros(width - 2 * half, np.float32)])
