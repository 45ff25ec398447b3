"""Values for the inputs of a denoiser that are neither sample nor timestep nor class labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxq.calibration.archives import read_arrays
from onnxq.calibration.data import Array, InputSpec
from onnxq.diffusion.denoiser import UNCONDITIONAL, Denoiser, shown, without_axis
from onnxq.diffusion.packing import made_positions
from onnxq.diffusion.prompts import encode_prompts, is_of_text
from onnxq.errors import OnnxqError
from onnxq.progress import Progress

PROMPTS = "prompts"  # texts in an .npz, for inputs that it holds no rows for
TEXT = ".txt"


def open_conditions(
    path: Path | None,
    denoiser: Denoiser,
    pipelines: Sequence[Path] = (),
    device: str = "cpu",
    usual: Mapping[str, Array] | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> Mapping[str, Array]:
    """Rows for the conditions that cannot be drawn (embeddings of text, images, …).

    Args:
        path: An ``.npz`` keyed by input name; ``NAME.unconditional`` holds one row for guidance. The channels of a
            sample that are not noisy come under ``SAMPLE.behind``, or ``SAMPLE.before`` where they stand before them.
            Texts under ``prompts``, or a ``.txt`` with one a line, are encoded for inputs without rows.
        denoiser: The denoiser.
        pipelines: Folders that may be that of its pipeline, likeliest first.
        device: Where prompts are encoded.
        usual: Rows of inputs that the file need not have. It need not have positions either
            (:mod:`onnxq.diffusion.packing`).
        samples: How many will be drawn: of more rows or prompts so many are taken, evenly spaced, since files are
            often sorted by what they are about. ``None``: all.
        progress: Where to say how far the encoding of prompts is.

    Raises:
        OnnxqError: an array is missing or has another shape, prompts cannot be encoded, or nothing reads the file.
    """
    needed = [item.spec for item in denoiser.conditions if item.classes is None]
    keys = [spec.name for spec in needed] + ([denoiser.beside_names[1]] if denoiser.beside else [])
    if not keys:
        if path is not None:
            raise OnnxqError(
                f"expected a denoiser that reads more than {_labels(denoiser)} for {path}, found none such",
                hint="leave --conditions out: classes take turns by themselves",
            )
        return {}
    found: dict[str, Array] = {} if path is None else _read(path, keys)
    for name in {PROMPTS, *keys, *denoiser.beside_names} & found.keys() - denoiser.whole:
        found[name] = _evenly(found[name], samples)
    found = {**(usual or {}), **found}
    if PROMPTS in found and PROMPTS not in keys:
        missing = [spec for spec in needed if spec.name not in found and is_of_text(spec)]
        prompts = [str(prompt) for prompt in found.pop(PROMPTS).ravel()]
        found |= encode_prompts(prompts, missing, denoiser, pipelines, device, progress) if missing else {}
    for spec in needed:
        if spec.name not in found and (made := made_positions(spec, denoiser, found)) is not None:
            found[spec.name] = made
    if path is None and any(key not in found for key in keys):
        names = [key for key in keys if key not in found]
        raise OnnxqError(
            f"expected values for the condition {', '.join(map(repr, names))}, which are not class labels, found none",
            hint=f"give --conditions FILE.npz with rows under {names[0]!r}, or a .txt of prompts with the denoiser in "
            "its pipeline's folder",
        )
    for spec in needed:
        _check_rows(spec, found.get(spec.name), path)
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


def _labels(denoiser: Denoiser) -> str:
    """What a denoiser reads of which nothing can be given."""
    names = [item.spec.name for item in denoiser.conditions]
    return f"class labels ({', '.join(names)})" if names else "sample and timestep"


def _read(path: Path, keys: Sequence[str]) -> dict[str, Array]:
    """What the user gives."""
    if path.suffix == TEXT:
        return {PROMPTS: np.asarray(_lines(path))}
    hint = f"write it with np.savez, keyed by input name: {', '.join(map(repr, keys))}"
    return read_arrays(path, what="an .npz of conditions", hint=hint)


def _evenly(rows: Array, count: int | None) -> Array:
    """At most so many rows, evenly spaced; the same ones of arrays that are as long."""
    if count is None or not rows.ndim or len(rows) <= count:
        return rows
    chosen: Array = rows[np.arange(count) * len(rows) // count]
    return chosen


def _check_rows(spec: InputSpec, array: Array | None, path: Path | None) -> None:
    """Refuse what is no row of an input, or none."""
    fits = array is not None and len(array.shape) == len(spec.shape) and array.size > 0
    sizes = () if array is None else array.shape if spec.is_whole else array.shape[1:]
    if array is not None and fits and all(a in (None, b) for a, b in zip(spec.row_shape, sizes, strict=True)):
        return
    hint = "one row for each condition along the first axis; one array where the input has no batch axis"
    if path is not None and path.suffix == TEXT:
        hint = f"text gives none: write an .npz with the texts under {PROMPTS!r} and rows for what else it reads"
    raise OnnxqError(
        f"expected {'an array' if spec.is_whole else 'rows'} of shape {shown(spec.shape)} under "
        f"{spec.name!r} in {path}, found {'nothing' if array is None else list(array.shape)}",
        hint=hint,
    )


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


def _check_beside(denoiser: Denoiser, given: Sequence[Array], path: Path | None) -> None:
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
