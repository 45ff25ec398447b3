"""Engines for all graphs of a denoiser that has one for each group of sampler steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxq.diffusion.router import read_index
from onnxq.engines.tensorrt import EngineBuild, build
from onnxq.errors import OnnxqError
from onnxq.writing import atomic_folder


def build_groups(
    index: Path, output: Path, on_group: Callable[[int], None] | None = None, **options: Any
) -> list[EngineBuild]:
    """Compile every graph of an index into ``output``, and write the index of the engines last.

    The index of the engines is that of the graphs with ``engine`` and ``runtime`` beside each ``file``, which leads
    from the folder of the engines to the graph; :class:`onnxq.diffusion.router.Router` takes either index. Engines hold
    the weights each for itself, because TensorRT builds them in.

    Args:
        index: The ``.groups.json``.
        output: The folder for the engines; it is made if it is not there.
        on_group: Called with the number of engines that are done.
        **options: As for :func:`onnxq.engines.build`.

    Returns:
        What was built, in the order of the groups.

    Raises:
        OnnxqError: the index is damaged, or a graph cannot be compiled.
    """
    entries = read_index(index)
    try:
        output.mkdir(exist_ok=True)
    except OSError as error:
        raise OnnxqError(
            f"expected a folder for the engines at {output}, found none that can be made ({error.strerror})",
            hint="choose another with -o",
        ) from error
    built = []
    for number, entry in enumerate(entries):
        engine = output / f"{Path(entry['file']).stem}.engine"
        built.append(build(index.parent / entry["file"], engine, **options))
        if on_group is not None:
            on_group(number + 1)
    listed = [
        entry
        | {
            "file": os.path.relpath(index.parent / entry["file"], output),
            "engine": item.engine_path.name,
            "runtime": item.runtime,
        }
        for entry, item in zip(entries, built, strict=True)
    ]
    target = output / index.name
    with atomic_folder(target) as folder:
        (folder / index.name).write_text(json.dumps({"groups": listed}, indent=1) + "\n", encoding="utf-8")
        (folder / index.name).replace(target)
    return built
