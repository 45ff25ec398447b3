"""Samples as pictures: a grid in a file, and what a report shows of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]

LARGEST_FACTOR = 64  # of a difference that is made visible


def is_picture(images: dict[str, Array]) -> bool:
    """Whether the samples can be shown: grey or coloured, not latents."""
    return all(array.ndim == 4 and array.shape[1] in (1, 3) for array in images.values())


def grid_png(
    images: dict[str, Array], data_range: tuple[float, float], columns: int = 8, least_width: int = 1024
) -> bytes:
    """A PNG with the float samples on the left and the quantized ones, same noise, on the right.

    Args:
        images: By kind: [count, 1 or 3 channels, height, width].
        data_range: The values of black and white.
        columns: Images in a row of each side.
        least_width: Pixels are repeated until the picture is nearly as wide.

    Raises:
        OnnxqError: the samples are no images.
    """
    import io

    from PIL import Image

    if not is_picture(images):
        found = next(iter(images.values()))
        raise OnnxqError(
            f"expected samples of 1 or 3 channels for a grid of images, found shape {list(found.shape[1:])}",
            hint="give latents their --decoder, or leave -o out and read the numbers with --json",
        )
    low, high = data_range
    sides = []
    for kind in sorted(images):  # float, then quantized
        codes = np.clip((images[kind] - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
        codes = np.repeat(codes, 3, axis=1) if codes.shape[1] == 1 else codes
        count, _, height, width = codes.shape
        across = min(columns, count)
        rows = -(-count // across)
        side = np.full((rows * (height + 2), across * (width + 2), 3), 32, np.uint8)
        for index, image in enumerate(codes):
            row, column = divmod(index, across)
            top, left = row * (height + 2) + 1, column * (width + 2) + 1
            side[top : top + height, left : left + width] = image.transpose(1, 2, 0)
        sides.append(side)
    gap = np.full((len(sides[0]), 8, 3), 255, np.uint8)
    whole = sides[0] if len(sides) == 1 else np.concatenate([sides[0], gap, sides[1]], axis=1)
    picture = Image.fromarray(whole)
    scale = max(1, least_width // whole.shape[1])
    picture = picture.resize((whole.shape[1] * scale, whole.shape[0] * scale), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def write_grid(path: Path, images: dict[str, Array], data_range: tuple[float, float]) -> None:
    """Write :func:`grid_png`, whole or not at all.

    Raises:
        OnnxqError: the samples are no images.
    """
    from onnxq.writing import atomic_folder

    picture = grid_png(images, data_range)
    with atomic_folder(path) as folder:
        (folder / "grid.png").write_bytes(picture)
        os.replace(folder / "grid.png", path)


def small_grid_png(images: dict[str, Array], data_range: tuple[float, float], most_bytes: int) -> bytes:
    """The grid without repeated pixels, of as many images as fit into so many bytes (one in any case)."""
    count = len(next(iter(images.values())))
    while True:
        picture = grid_png({kind: array[:count] for kind, array in images.items()}, data_range, least_width=0)
        if len(picture) <= most_bytes or count == 1:
            return picture
        count //= 2


def report_pictures(
    images: Mapping[str, Array], data_range: tuple[float, float], most_bytes: int
) -> list[dict[str, Any]]:
    """A grid of each kind of samples, and of the difference of two, with captions; none where they are no pictures.

    Args:
        images: By kind: [count, 1 or 3 channels, height, width]; ``float`` and ``quantized`` are of the same noise.
        data_range: The values of black and white.
        most_bytes: Of all pictures together.
    """
    if not is_picture(dict(images)):
        return []
    shown = [(kind, {kind: array}) for kind, array in sorted(images.items())]
    low, high = data_range
    if {"float", "quantized"} <= images.keys():
        difference = images["quantized"] - images["float"]
        largest = float(np.quantile(np.abs(difference), 0.999))
        half = (high - low) / 2
        factor = float(np.clip(2.0 ** np.floor(np.log2(half / largest)), 1, LARGEST_FACTOR)) if largest else 1.0
        amplified = low + half + difference * factor
        shown.append((f"quantized less float, {factor:g} times as strong; grey is none", {"difference": amplified}))
    return [
        {"png": small_grid_png(kinds, data_range, most_bytes // len(shown)), "caption": caption}
        for caption, kinds in shown
    ]
