"""Activations kept between two blocks: in memory as long as they fit into a budget, in files after that."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]


class ActivationCache:
    """Arrays by name, one row for each sample.

    Args:
        memory_bytes: How much may lie in memory; what is more lies in files that are mapped, and read row by row.
        folder: Where the files go; ``None``: the system's folder for temporary files.
    """

    def __init__(self, memory_bytes: int, folder: str | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.used_bytes = 0
        self._parent = folder
        self._folder: str | None = None
        self._arrays: dict[str, Array] = {}
        self._counter = 0

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arrays.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def allocate(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Room for an array; the caller fills it.

        Raises:
            OnnxqError: the disk is full.
        """
        size = max(1, math.prod(shape)) * dtype.itemsize
        if self.used_bytes + size <= self.memory_bytes:
            array = np.empty(shape, dtype)
            self.used_bytes += size
        else:
            array = self._mapped(shape, dtype, size)
        self._arrays[name] = array
        return array

    def alias(self, name: str, existing: str) -> None:
        """Another name for an array that is there."""
        self._arrays[name] = self._arrays[existing]

    def write(self, name: str, index: slice, rows: Array) -> None:
        """Fill some samples of an array."""
        self._arrays[name][index] = rows

    def rows(self, name: str, index: Array | slice) -> Tensor:
        """Some samples of an array, as a tensor of its own."""
        return torch.from_numpy(np.array(self._arrays[name][index]))

    def free(self, name: str) -> None:
        """Drop an array; its memory or file goes with the last name it has."""
        array = self._arrays.pop(name)
        if any(other is array for other in self._arrays.values()):
            return
        if isinstance(array, np.memmap):
            os.unlink(str(array.filename))
        else:
            self.used_bytes -= max(1, array.size) * array.itemsize

    def _mapped(self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> Array:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="onnxq-activations-", dir=self._parent)
        self._counter += 1
        path = os.path.join(self._folder, f"{self._counter}.bin")
        try:
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a crash later
        except OSError as error:
            raise OnnxqError(
                f"expected {size / 1e6:.0f} MB for activations in {self._folder}, found: {error.strerror}",
                hint="free some space, point TMPDIR elsewhere, or use fewer --samples",
            ) from error
        return np.memmap(path, dtype, "r+", shape=shape)
