"""What finished blocks have learned, on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.writing import atomic_folder

Array = np.ndarray[Any, Any]
KEY_FILE = "key.txt"


class Checkpoint:
    """A folder with one ``.npz`` for each finished step; what another run with other settings left is removed.

    Args:
        folder: Where; ``None`` keeps nothing.
        key: What the run depends on (see :func:`fingerprint`).
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder = folder
        if folder is None:
            return
        marker = folder / KEY_FILE
        if folder.is_dir() and marker.is_file() and marker.read_text(encoding="utf-8", errors="replace") != key:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(key, encoding="utf-8")

    def load(self, step: str) -> dict[str, Array] | None:
        """The arrays of a finished step by name, or ``None`` if it is not finished, or its file is damaged."""
        if self.folder is None:
            return None
        path = self._path(step)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                names = [str(name) for name in archive["names"]]
                return {name: archive[f"array_{index}"] for index, name in enumerate(names)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None  # what a machine that lost its power left: the step is done again

    def save(self, step: str, arrays: Mapping[str, Array]) -> None:
        """Remember a finished step, whole or not at all."""
        if self.folder is None:
            return
        path = self._path(step)
        entries = {f"array_{index}": array for index, array in enumerate(arrays.values())}
        self.folder.mkdir(parents=True, exist_ok=True)  # another run for the same output may have removed it
        with atomic_folder(path) as folder:
            np.savez(folder / path.name, names=np.array(list(arrays), dtype=np.str_), **entries)  # type: ignore[arg-type]
            os.replace(folder / path.name, path)

    def remove(self) -> None:
        """The run is done: nothing needs to be resumed."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(step.encode()).hexdigest()[:24]}.npz"


def fingerprint(model: ir.Model, *settings: object) -> str:
    """A digest of the graph's structure, every initializer, and whatever else a run depends on."""
    digest = hashlib.sha256(repr(settings).encode())
    for node in model.graph:
        digest.update(f"{node.op_type} {[value and value.name for value in node.inputs]}".encode())
    for name, value in model.graph.initializers.items():
        digest.update(name.encode())
        if value.const_value is not None:
            digest.update(
                np.ascontiguousarray(value.const_value.numpy()).view(np.uint8).data if value.const_value.size else b""
            )
    return digest.hexdigest()
