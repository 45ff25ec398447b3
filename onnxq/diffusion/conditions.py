"""Values for the inputs of a denoiser that are neither sample nor timestep nor class labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxq.calibration.archives import read_arrays
from onnxq.calibration.data import Array
from onnxq.diffusion.denoiser import UNCONDITIONAL, Denoiser, shown, without_axis
from onnxq.diffusion.prompts import encode_prompts, is_of_text
from onnxq.errors import OnnxqError

PROMPTS = "prompts"  # texts in an .npz, for inputs that it holds no rows for


def open_conditions(
    path: Path | None, denoiser: Denoiser, pipelines: Sequence[Path] = (), device: str = "cpu"
) -> Mapping[str, Array]:
    """Rows for the conditions that cannot be drawn (embeddings of text, images, …).

    Args:
        path: An ``.npz`` keyed by input name; ``NAME.unconditional`` holds one row for guidance. The channels of a
            sample that are not noisy come under ``SAMPLE.behind``, or ``SAMPLE.before`` where they stand before them.
            Texts under ``prompts``, or a ``.txt`` with one a line, are encoded for inputs without rows.
        denoiser: The denoiser.
        pipelines: Folders that may be that of its pipeline, likeliest first.
        device: Where prompts are encoded.

    Raises:
        OnnxqError: an array is missing or has another shape, or prompts cannot be encoded.
    """
    needed = [item.spec for item in denoiser.conditions if item.classes is None]
    keys = [spec.name for spec in needed] + ([denoiser.beside_names[1]] if denoiser.beside else [])
    if not keys:
        return {}
    names = ", ".join(map(repr, keys))
    if path is None:
        raise OnnxqError(
            f"expected values for the condition {names}, which are not class labels, found none",
            hint=f"give --conditions FILE.npz with rows under {keys[0]!r}, or a .txt of prompts with the denoiser in "
            "its pipeline's folder",
        )
    hint = f"write it with np.savez, keyed by input name: {names}"
    if path.suffix == ".txt":
        found: dict[str, Array] = {PROMPTS: np.asarray(_lines(path))}
        shape_hint = f"text gives none: write an .npz with the texts under {PROMPTS!r} and rows for what else it reads"
    else:
        shape_hint = "one row for each condition along the first axis; one array where the input has no batch axis"
        found = read_arrays(path, what="an .npz of conditions", hint=hint)
    if PROMPTS in found and PROMPTS not in keys:
        missing = [spec for spec in needed if spec.name not in found and is_of_text(spec)]
        prompts = [str(prompt) for prompt in found.pop(PROMPTS).ravel()]
        found |= encode_prompts(prompts, missing, denoiser, pipelines, device) if missing else {}
    for spec in needed:
        array = found.get(spec.name)
        fits = array is not None and len(array.shape) == len(spec.shape) and len(array) > 0
        sizes = () if array is None else array.shape if spec.is_whole else array.shape[1:]
        if array is None or not fits or any(a not in (None, b) for a, b in zip(spec.row_shape, sizes, strict=True)):
            raise OnnxqError(
                f"expected {'an array' if spec.is_whole else 'rows'} of shape {shown(spec.shape)} under "
                f"{spec.name!r} in {path}, found {'nothing' if array is None else list(array.shape)}",
                hint=shape_hint,
            )
    if denoiser.beside:
        _check_beside(denoiser, [found[key] for key in denoiser.beside_names if key in found], path)
    for name, array in found.items():
        row = found.get(name + UNCONDITIONAL)
        if row is not None and row.size != np.prod(array.shape[1:]):
            raise OnnxqError(
                f"expected one row of shape {list(array.shape[1:])} under '{name}{UNCONDITIONAL}' in {path}, "
                f"found {list(row.shape)}",
                hint=f"it stands for no condition, beside the rows under {name!r}",
            )
    return {name: np.asarray(array) for name, array in found.items()}


def _lines(path: Path) -> list[str]:
    """The prompts of a text file."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        found = error if path.exists() else "nothing"
        raise OnnxqError(f"expected UTF-8 text in {path}, found {found}", hint="check --conditions") from error
    if not prompts:
        raise OnnxqError(f"expected a prompt a line in {path}, found none", hint="write some, as users would")
    return prompts


def _check_beside(denoiser: Denoiser, given: Sequence[Array], path: Path) -> None:
    """Refuse what does not fill the channels of the sample that are not noisy."""
    sample, axis = denoiser.sample, denoiser.channel_axis
    channels = sum(array.shape[axis] if array.ndim == len(sample.shape) and len(array) else 0 for array in given)
    sizes = [without_axis(array.shape, axis) for array in given]
    if channels != denoiser.beside or any(size != without_axis(sample.shape, axis) for size in sizes):
        shape = shown([None, *sample.shape[1:axis], denoiser.beside, *sample.shape[axis + 1 :]])
        (before, behind), found = denoiser.beside_names, " and ".join(str(list(array.shape)) for array in given)
        raise OnnxqError(
            f"expected rows of shape {shape} under {behind!r} in {path}, found {found or 'nothing'}",
            hint=f"what {sample.name!r} holds behind its {denoiser.channels} noisy channels; before them: {before!r}",
        )
