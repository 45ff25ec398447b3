"""What exporters leave beside a model: the configuration of its network, or of its pipeline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from onnxq.calibration.data import InputSpec

CONFIG = "config.json"
PACKED_SIDE = 2  # latents on each side of what a token of packed ones holds


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file that may be there; empty where it is not, or something else."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def published_shape(file: Path, spec: InputSpec) -> list[int] | None:
    """The shape that a network was trained for, where its input leaves the size free.

    Args:
        file: Its ``config.json``, or that of the autoencoder whose latents it works on. In the latter ``sample_size``
            is that of pictures, and latents are smaller.
        spec: The input, [batch, channels, height, width], or packed latents [batch, tokens, channels].
    """
    entries = read_config(file)
    size, blocks, latents = (entries.get(name) for name in ("sample_size", "block_out_channels", "latent_channels"))
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int for side in sides):
        return None
    if type(latents) is int and isinstance(blocks, list) and blocks:
        smaller = [side >> (len(blocks) - 1) for side in sides]
    else:
        latents, smaller = 0, sides
    match spec.shape:
        case (_, int(channels), None, None):
            shape = [1, channels, *(smaller if channels == latents else sides)]
        case (_, None, int(channels)) if channels == PACKED_SIDE**2 * latents:
            shape = [1, math.prod(side // PACKED_SIDE for side in smaller), channels]
        case _:
            return None
    return shape if min(shape) > 0 else None
