"""Which steps of the sampler can do with fewer bits, and the graphs that then serve them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxq.diffusion.diffusers_schedule import Diffusers
from onnxq.diffusion.schedule import Schedule
from onnxq.diffusion.subgraphs import Subgraph
from onnxq.errors import OnnxqError


def forward_snr_db(schedule: Schedule) -> list[float]:
    """Signal to noise ratio alpha² / sigma² of what the network is given, in each step of the sampler.

    Raises:
        OnnxqError: the schedule is none of diffusion.
    """
    alphas = schedule.alphas() if isinstance(schedule, Diffusers) else None
    if alphas is None:
        raise OnnxqError(
            "expected a schedule with products of alpha to choose bits by step, found one without",
            hint="leave low_activations out, or give --scheduler of a model trained with noise",
        )
    return [10 * float(np.log10(max(alpha, 1e-30) / max(1 - alpha, 1e-30))) for alpha in alphas[:-1]]


def choose(sqnr_db: Sequence[Mapping[int, float]], forward_db: Sequence[float]) -> list[int]:
    """The cheapest setting for each step whose quantization noise is below the noise that is there anyway.

    Source: PTQD (arXiv 2305.10657), section 3.4: the fewest bits with SNR_Q(t) > SNR_F(t), else the most.

    Args:
        sqnr_db: For each setting, the cheapest first: SQNR of the prediction by step. Between steps that were not
            measured it is interpolated.
        forward_db: Of the forward process in each step, 0 being the noisiest.

    Returns:
        The index of a setting for each step.
    """
    steps = np.arange(len(forward_db))
    chosen = np.full(len(steps), len(sqnr_db) - 1)
    for index in reversed(range(len(sqnr_db))):
        known = sorted(sqnr_db[index])
        found = np.interp(steps, known, [min(sqnr_db[index][step], 300.0) for step in known])
        chosen[found > np.asarray(forward_db)] = index
    return [int(index) for index in chosen]


def subgraphs_of(models: Sequence[ir.Model], chosen: Sequence[int], timesteps: Sequence[float]) -> list[Subgraph]:
    """A graph for each setting that serves any step; weights that are equal are the same tensor, stored once.

    Args:
        models: One for each setting, the last of them the one for all steps.
        chosen: The setting of each step.
        timesteps: What the network is told in each step.
    """
    last = models[-1].graph.initializers
    found = []
    for index, model in enumerate(models):
        steps = tuple(step for step, setting in enumerate(chosen) if setting == index)
        for name, value in model.graph.initializers.items():
            other = last[name].const_value if name in last else None
            if other is not None and value.const_value is not None and _equal(value.const_value, other):
                value.const_value = other
        if steps:
            found.append(Subgraph(model, steps, tuple(timesteps[step] for step in steps)))
    return found


def _equal(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
