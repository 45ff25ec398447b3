"""What a network is told of the time that its scheduler counts, and which way it predicts.

Schedulers of diffusers count timesteps down from ``num_train_timesteps``. Some networks are told that number; others,
of flows, how much of a sample is noise (from 1 to 0) or how much is data (from 0 to 1), and the last ones predict the
way from noise to data, against the scheduler's. Pipelines know that of their networks; a graph says part of it, and the
``config.json`` that exporters put beside it names the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.diffusion.denoiser import Denoiser
from onnxq.diffusion.exported_config import CONFIG, read_config
from onnxq.diffusion.temporal_tables import tabulate
from onnxq.diffusion.timestep_input import waves

# Embeddings turn by one radian for each timestep; those of networks that are told a part of 1 by about a thousand.
FAST_WAVES = 100.0
# The largest timestep of a scheduler that counts steps; EDM's are quarters of logarithms, below 2.
FEWEST_COUNTED = 10.0
# What pipelines of diffusers do with these networks, beyond what their graphs show.
NETWORKS: dict[str, dict[str, Any]] = {
    "Lumina2Transformer2DModel": {"network_time": "data", "sigmas": "even"},
    "LuminaNextDiT2DModel": {"network_time": "data"},
    "ZImageTransformer2DModel": {"network_time": "data", "sigmas": "even"},
    "AuraFlowTransformer2DModel": {"network_time": "noise"},
    "PRXTransformer2DModel": {"network_time": "noise"},
    "CogView4Transformer2DModel": {"sigmas": "even_timesteps", "mu_rule": "root"},
    "HiDreamImageTransformer2DModel": {"negated": True},
    "NucleusMoEImageTransformer2DModel": {"network_time": "noise", "negated": True, "sigmas": "even"},
    "LTXVideoTransformer3DModel": {"sigmas": "even"},
    "HunyuanVideoTransformer3DModel": {"sigmas": "even"},
    "HunyuanVideo15Transformer3DModel": {"sigmas": "even"},
    "MotifVideoTransformer3DModel": {"sigmas": "even"},
    "MochiTransformer3DModel": {"sigmas": "linear_quadratic"},
    "CosmosTransformer3DModel": {"network_time": "noise", "sigmas": "karras"},
    "EasyAnimateTransformer3DModel": {"mu": 1.0},
    "OmniGenTransformer2DModel": {"sigmas": "even"},
    "BriaTransformer2DModel": {"sigmas": "even"},
    "BriaFiboTransformer2DModel": {"sigmas": "even"},
    "ErnieImageTransformer2DModel": {"sigmas": "even"},
    "HunyuanImageTransformer2DModel": {"sigmas": "even"},
    "Flux2Transformer2DModel": {"network_time": "noise", "sigmas": "even", "mu_rule": "empirical"},
}


def conventions(path: Path | None, rate: float) -> dict[str, Any]:
    """Entries of a schedule that follow from the network (see :mod:`onnxq.diffusion.schedule`).

    Args:
        path: The network's file.
        rate: Of its waves (see :func:`wave_rate`).
    """
    name = "" if path is None else str(read_config(path.with_name(CONFIG)).get("_class_name"))
    known = NETWORKS.get(name)
    if known is None and rate >= FAST_WAVES:
        return {"network_time": "noise", "sigmas": "even"}  # FLUX and its kin
    return dict(known or {})


def wave_rate(model: ir.Model, denoiser: Denoiser) -> float:
    """By how many radians the fastest wave of the network's embedding turns for each unit of time.

    0 means that no wave is found, or that the time is a whole number, which is a timestep in any case.
    """
    if denoiser.timestep.dtype.kind != "f":
        return 0.0
    turning = sorted(
        {
            node.inputs[0].name or ""
            for node in waves(graphs.input_named(model.graph, denoiser.timestep.name))
            if node.inputs[0] is not None
        }
    )
    tables = tabulate(model, turning, {denoiser.timestep.name}, denoiser, [1.0, 2.0])
    return max((float(np.abs(np.diff(table.rows, axis=0)).max()) for table in tables.values()), default=0.0)


def told(counted: list[float], network_time: str, largest: float) -> list[float]:
    """What the network is told of the timesteps that a scheduler counts down from the largest.

    Args:
        counted: Those of the steps.
        network_time: ``timestep``, ``noise`` or ``data``.
        largest: ``num_train_timesteps``.
    """
    if network_time == "timestep":
        return counted
    if network_time == "noise" and max(counted) < FEWEST_COUNTED:
        return counted  # the scheduler tells parts of 1 already, or logarithms
    noise = [time / largest for time in counted]
    return noise if network_time == "noise" else [1 - part for part in noise]
