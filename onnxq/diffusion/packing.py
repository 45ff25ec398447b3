"""Samples that are packed into tokens, as FLUX and its kin read them: where each token stands, and the way back.

Latents [channels, height, width] are cut into squares of two by two, whose numbers lie side by side:
[height / 2 · width / 2, 4 · channels]. Beside them the network reads where each token stands: under ``img_ids`` its row
and column, under ``txt_ids`` the same for text, which stands at the origin. A fourth number, in FLUX.2, counts the
text's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnxq.calibration.data import Array, InputSpec
from onnxq.diffusion.denoiser import Denoiser
from onnxq.diffusion.exported_config import PACKED_SIDE

OF_PICTURE, OF_TEXT = "img_ids", "txt_ids"
ROW, COLUMN, IN_TEXT = 1, 2, 3  # places in a position


def token_grid(denoiser: Denoiser, given: Mapping[str, Array]) -> tuple[int, int] | None:
    """Rows and columns of a sample's tokens; ``None`` where it is no tokens, or what they would be is unknown.

    Args:
        denoiser: The denoiser.
        given: Rows of its conditions; without positions among them the picture is a square.
    """
    if len(denoiser.noise_shape) != 2 or denoiser.noise_shape[1] % PACKED_SIDE**2:
        return None
    tokens, positions = denoiser.noise_shape[0], given.get(OF_PICTURE)
    if positions is None:
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else None
    places = positions.reshape(-1, tokens, positions.shape[-1])[0]
    if places.shape[-1] <= COLUMN:
        return None
    rows, columns = (int(places[:, axis].max()) + 1 for axis in (ROW, COLUMN))
    return (rows, columns) if rows * columns == tokens else None


def made_positions(spec: InputSpec, denoiser: Denoiser, given: Mapping[str, Array]) -> Array | None:
    """Positions under an input's name, as diffusers' pipelines count them; ``None``: it reads nothing of that kind.

    Args:
        spec: The input, [tokens, places] or [batch, tokens, places].
        denoiser: The denoiser.
        given: Rows of its other conditions, of which states [texts, tokens, width] say how long texts are.
    """
    places = spec.shape[-1] if len(spec.shape) in (2, 3) else None
    if places not in (IN_TEXT, IN_TEXT + 1):
        return None
    grid = token_grid(denoiser, {})
    lengths = [spec.shape[-2], *(rows.shape[1] for rows in given.values() if rows.ndim == 3)]
    length = next((size for size in lengths if size is not None), None)
    if spec.name == OF_PICTURE and grid is not None:
        positions = np.zeros((math.prod(grid), places), np.float32)
        positions[:, ROW : COLUMN + 1] = np.indices(grid).reshape(2, -1).T
    elif spec.name == OF_TEXT and length is not None:
        positions = np.zeros((length, places), np.float32)
        positions[:, IN_TEXT:] = np.arange(length)[:, None]
    else:
        return None
    return positions if len(spec.shape) == 2 else positions[None]


def unpacked(samples: Array, grid: tuple[int, int]) -> Array:
    """Latents [samples, channels, height, width] from tokens [samples, rows · columns, 4 · channels]."""
    parts = samples.reshape(len(samples), *grid, -1, PACKED_SIDE, PACKED_SIDE)
    return parts.transpose(0, 3, 1, 4, 2, 5).reshape(len(samples), -1, PACKED_SIDE * grid[0], PACKED_SIDE * grid[1])
