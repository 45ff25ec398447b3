"""Activations kept between two blocks: on the GPU or in memory as long as they fit, in files after that."""

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


class _Stored:
    """An array in a file. It is not mapped: pages of a mapped file count as memory of the process."""

    device = torch.device("cpu")  # where its rows come from and go to

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self.file = os.open(path, os.O_RDWR)

    def __getitem__(self, index: Array | slice) -> Array:
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.shape[0])
            return self._read(start, stop - start)
        return np.concatenate([self._read(int(row), 1) for row in index])

    def __setitem__(self, index: slice, rows: Tensor) -> None:
        start, _, _ = index.indices(self.shape[0])
        data = np.ascontiguousarray(rows.numpy(), self.dtype).reshape(-1).view(np.uint8).data
        offset = start * self.row_bytes
        while data:
            written = os.pwrite(self.file, data, offset)
            data, offset = data[written:], offset + written

    def close(self) -> None:
        """Give the space back."""
        os.close(self.file)
        os.unlink(self.path)

    def _read(self, start: int, count: int) -> Array:
        array = np.empty((count, *self.shape[1:]), self.dtype)
        view, offset = array.reshape(-1).view(np.uint8).data, start * self.row_bytes
        while view:
            read = os.preadv(self.file, [view], offset)
            if not read:
                raise OnnxqError(
                    f"expected activations in {self.path}, found the file cut short",
                    hint="leave the folder for temporary files alone while a recipe learns",
                )
            view, offset = view[read:], offset + read
        return array


class ActivationCache:
    """Arrays by name, one row for each sample.

    Args:
        memory_bytes: How much may lie in memory; what is more lies in files that are read row by row.
        folder: Where the files go; ``None``: the system's folder for temporary files.
        device: Where the network learns. Floats stay on a GPU while they fit into half of what is free there: what
            a step of learning reads need not travel.
    """

    def __init__(self, memory_bytes: int, folder: str | None = None, device: torch.device | str = "cpu") -> None:
        self.memory_bytes = memory_bytes
        self.used_bytes = 0
        self.device = torch.device(device)
        self._parent = folder
        self._folder: str | None = None
        self._arrays: dict[str, Tensor | _Stored] = {}
        self._counter = 0

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._arrays):
            self.free(name)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Make room for an array, which :meth:`write` fills.

        Raises:
            OnnxqError: the disk is full.
        """
        size = max(1, math.prod(shape)) * dtype.itemsize
        if self._fits_on_gpu(size, dtype):
            self._arrays[name] = torch.empty(shape, dtype=dtype, device=self.device)
        elif self.used_bytes + size <= self.memory_bytes:
            self._arrays[name] = torch.empty(shape, dtype=dtype)
            self.used_bytes += size
        else:
            self._arrays[name] = self._in_file(shape, dtype, size)

    def alias(self, name: str, existing: str) -> None:
        """Another name for an array that is there."""
        self._arrays[name] = self._arrays[existing]

    def write(self, name: str, index: slice, rows: Tensor) -> None:
        """Fill some samples of an array."""
        array = self._arrays[name]
        array[index] = rows.to(array.device)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array."""
        return tuple(self._arrays[name].shape)

    def rows(self, name: str, index: Array | slice, area: tuple[slice, slice] | None = None) -> Tensor:
        """Some samples of an array, as a tensor of its own, where the array is.

        Args:
            name: The array.
            index: Which samples.
            area: Rows and columns, the last two axes, of which alone is wanted; ``None``: all.
        """
        array = self._arrays[name]
        if isinstance(array, _Stored):
            found = torch.from_numpy(array[index])
            return found if area is None else found[..., area[0], area[1]]
        if area is not None:
            array = array[..., area[0], area[1]]
        return array[index].clone() if isinstance(index, slice) else array[torch.from_numpy(index).to(array.device)]

    def free(self, name: str) -> None:
        """Drop an array; its memory or file goes with the last name it has."""
        array = self._arrays.pop(name)
        if any(other is array for other in self._arrays.values()):
            return
        if isinstance(array, _Stored):
            array.close()
        elif array.device.type == "cpu":
            self.used_bytes -= max(1, array.numel()) * array.itemsize

    def _fits_on_gpu(self, size: int, dtype: torch.dtype) -> bool:
        if self.device.type != "cuda" or not dtype.is_floating_point:
            return False
        free, _ = torch.cuda.mem_get_info(self.device)
        return size <= free // 2

    def _in_file(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> _Stored:
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
        return _Stored(path, shape, torch.empty(0, dtype=dtype).numpy().dtype)
