"""How much of a sample is noise at the steps of a flow, where pipelines say so and not their schedulers.

``even``: 1 to 1/steps. ``even_timesteps``: the timesteps themselves are even, whole, and what the network is told,
whatever noise they are shifted to. ``linear_quadratic``: evenly for half of the steps, as of a schedule with many more,
then along a parabola. ``karras``: EDM's levels of noise, as parts of what they and data are together.

Source: diffusers' pipelines; T. Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
NeurIPS 2022 (arXiv 2206.00364), equation 5; A. Polyak et al., Movie Gen (arXiv 2410.13720), section 3.4.2, for
``linear_quadratic``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Rule = Literal["scheduler", "even", "even_timesteps", "linear_quadratic", "karras"]

LINEAR_PART = 0.025  # of the noise is gone after the even half of the steps: Mochi's
LEAST_NOISE, MOST_NOISE, CURVATURE = 0.002, 80.0, 7.0  # Cosmos 2's, against data of deviation 1


def given_sigmas(rule: Rule, steps: int, timesteps: int) -> dict[str, Array]:
    """What a scheduler's ``set_timesteps`` is given besides their number.

    Args:
        rule: See above; ``scheduler``: nothing, it has its own.
        steps: Of the sampler.
        timesteps: ``num_train_timesteps``.
    """
    match rule:
        case "even":
            return {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        case "even_timesteps":
            told = np.linspace(timesteps, 1, steps).astype(np.int64).astype(np.float32)
            return {"timesteps": told, "sigmas": told / timesteps}
        case "linear_quadratic":
            return {"sigmas": _linear_quadratic(steps)}
        case "karras":
            roots = np.linspace(MOST_NOISE ** (1 / CURVATURE), LEAST_NOISE ** (1 / CURVATURE), steps)
            noise = roots**CURVATURE
            return {"sigmas": noise / (noise + 1)}
    return {}


def _linear_quadratic(steps: int) -> Array:
    """From 1; both halves meet with one slope, and the parabola reaches 0 behind the last step."""
    linear = max(steps // 2, 1)
    rest = steps - linear
    gone = np.linspace(0, LINEAR_PART, linear, endpoint=False)
    if not rest:
        return 1 - gone
    slope = LINEAR_PART / linear
    step = np.arange(rest)
    bend = (1 - LINEAR_PART - slope * rest) / rest**2
    return np.concatenate([1 - gone, 1 - LINEAR_PART - slope * step - bend * step**2])
