"""Arrays of ``.npz`` files: as a source of samples, or all at once where they are small. Nothing is unpickled."""

from __future__ import annotations

import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnxq.calibration.data import LABEL_KEYS, RANGE_RULE_KEY, STEP_KEY, Array, InputSpec, Sample, single_rows
from onnxq.errors import OnnxqError

LONGEST_TEXT = 64  # characters
# What zipfile raises at files that are none, are cut off, or hold what it cannot read: encrypted or of another version.
# And numpy at headers that are none, which it takes for Python's literals.
DAMAGED_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, RuntimeError, OSError, ValueError, EOFError,
    SyntaxError, tokenize.TokenError, TypeError, OverflowError,
)  # fmt: skip


def read_arrays(path: Path, *, what: str, hint: str) -> dict[str, Array]:
    """All arrays of a small ``.npz``, by name; nothing in it is unpickled.

    Args:
        path: The file.
        what: What it should be, for the error.
        hint: How it is made.

    Raises:
        OnnxqError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (*DAMAGED_ARCHIVE, AttributeError) as error:  # the last: a single array is no archive
        reason = " ".join(str(error).split())[:120]
        raise OnnxqError(f"expected {what} at {path}, found {reason}", hint=hint) from error


class Npz:
    """Rows of an ``.npz`` file, read array by array in step, never as a whole and never unpickled.

    An input that has no batch axis may have one array of its own shape, for all samples, instead of a row for each; an
    input of which the model reads one row may have one.

    Attributes:
        path: The file.
        is_made_up: Whether `onnxq synthesize` made the rows.
        observer: The range rule that suits them then, as the file says; else ``None``.
    """

    def __init__(self, path: Path, specs: Sequence[InputSpec]) -> None:
        self.path = path
        names = [spec.name for spec in specs]
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
                headers = {}
                for key, member in members.items():
                    if key in (*names, *LABEL_KEYS, STEP_KEY):
                        with archive.open(member) as stream:
                            headers[key] = _read_header(stream, key, path)
                rule = _read_text(archive, members[RANGE_RULE_KEY], path) if RANGE_RULE_KEY in members else None
        except DAMAGED_ARCHIVE as error:
            raise OnnxqError(
                f"expected an .npz file, found one that cannot be read: {path} ({error})",
                hint="write it with np.savez, keyed by the model's input names",
            ) from error
        missing = [name for name in names if name not in headers]
        if missing:
            found = ", ".join(sorted(members)) or "nothing"
            raise OnnxqError(
                f"expected arrays {', '.join(missing)} in {path}, found {found}",
                hint="key the arrays by the model's input names",
            )
        axes = {spec.name: len(spec.shape) for spec in specs if spec.is_whole}
        self._constant = {key for key, (shape, _) in headers.items() if len(shape) == axes.get(key)}
        lengths = {key: shape[0] if shape else 0 for key, (shape, _) in headers.items() if key not in self._constant}
        self._single = single_rows(lengths, specs)
        for key in self._single:
            del lengths[key]
        if len(set(lengths.values())) != 1 or min(lengths.values()) == 0:
            raise OnnxqError(
                f"expected the same number of rows (at least one) for every array in {path}, found {lengths}",
                hint="one row per sample along the first axis of every array",
            )
        self._members = {key: members[key] for key in headers}
        self._headers = headers
        self._length = next(iter(lengths.values()))
        self.is_made_up, self.observer = rule is not None, rule

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        with zipfile.ZipFile(self.path) as archive:
            streams: dict[str, IO[bytes]] = {}
            try:
                for key, member in self._members.items():
                    streams[key] = archive.open(member)
                    _read_header(streams[key], key, self.path)
                constant = {key: self._read_all(streams.pop(key), key) for key in sorted(self._constant)}
                constant |= {key: self._read_all(streams.pop(key), key)[0] for key in sorted(self._single)}
                for row in range(self._length):
                    yield constant | {key: self._read_row(streams[key], key, row) for key in streams}
            except DAMAGED_ARCHIVE as error:
                raise OnnxqError(
                    f"expected {self._length} rows in {self.path}, found a damaged file ({error})",
                    hint="write the file again",
                ) from error
            finally:
                for stream in streams.values():
                    stream.close()

    def _read_row(self, stream: IO[bytes], key: str, row: int) -> Array:
        shape, dtype = self._headers[key]
        return self._read(stream, shape[1:], dtype, f"{shape[0]} rows of {key}", f"only {row}")

    def _read_all(self, stream: IO[bytes], key: str) -> Array:
        with stream:
            return self._read(stream, *self._headers[key], f"all of {key}", "less")

    def _read(
        self, stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], expected: str, found: str
    ) -> Array:
        count = int(np.prod(shape, dtype=np.int64))
        size = count * dtype.itemsize
        chunk = stream.read(size)
        if len(chunk) != size:
            raise OnnxqError(
                f"expected {expected} in {self.path}, found {found}", hint="the file is truncated; write it again"
            )
        return np.frombuffer(chunk, dtype, count).reshape(shape)


def _read_text(archive: zipfile.ZipFile, member: str, path: Path) -> str:
    with archive.open(member) as stream:
        shape, dtype = _read_header(stream, member, path)
        if shape or dtype.kind != "U" or dtype.itemsize > 4 * LONGEST_TEXT:
            raise OnnxqError(
                f"expected a short text in {member} of {path}, found {dtype}{list(shape)}", hint="write the file again"
            )
        return str(np.frombuffer(stream.read(dtype.itemsize), dtype, 1)[0])


def _read_header(stream: IO[bytes], key: str, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_order, dtype = read(stream)
    if dtype.hasobject:
        raise OnnxqError(
            f"expected numbers in {key} of {path}, found Python objects",
            hint="onnxq never unpickles; save a plain array",
        )
    if column_order and len(shape) > 1:
        raise OnnxqError(
            f"expected row-major arrays in {path}, found {key} in column-major order",
            hint="save np.ascontiguousarray(array)",
        )
    if not all(0 <= length <= sys.maxsize for length in shape):
        raise OnnxqError(f"expected sizes of an array in {key} of {path}, found {shape}", hint="write the file again")
    return shape, dtype
