"""What exporters leave beside a model: the configuration of its network, or of its pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxq.calibration.data import InputSpec

CONFIG = "config.json"


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file that may be there; empty where it is not, or something else."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def published_shape(file: Path, spec: InputSpec) -> list[int] | None:
    """The shape that a network was trained for, where its input [batch, channels, height, width] leaves the size free.

    Args:
        file: Its ``config.json``. Of an autoencoder, ``sample_size`` is that of pictures, and latents are smaller.
        spec: The input.
    """
    entries = read_config(file)
    size, blocks = entries.get("sample_size"), entries.get("block_out_channels")
    sides = [size, size] if isinstance(size, int) else size
    if len(spec.shape) != 4 or spec.shape[1] is None or spec.shape[2:] != (None, None) or not isinstance(sides, list):
        return None
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        return None
    if spec.shape[1] == entries.get("latent_channels") and isinstance(blocks, list) and blocks:
        sides = [side >> (len(blocks) - 1) for side in sides]
    return [1, spec.shape[1], *sides] if min(sides) > 0 else None
