"""Files are written whole or not at all, and a writer that was killed leaves nothing for long."""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import OnnxqError

fcntl: Any = None
with contextlib.suppress(ModuleNotFoundError):  # Windows: what a killed writer left stays until somebody removes it
    fcntl = importlib.import_module("fcntl")


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write in before renaming; gone afterwards, whatever happens.

    A process that is killed cannot remove its folder; the next writer of the same target does.

    Raises:
        OnnxqError: the folder of ``target`` does not exist or cannot be written, or the disk is full.
    """
    check_writable(target)
    try:
        _remove_abandoned(target)
        folder, lock = _locked_folder(target)
    except OSError as error:
        raise _not_written(target, error) from error
    try:
        yield folder
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def check_writable(target: Path) -> None:
    """Raise before the work is done if ``target`` cannot be written afterwards."""
    parent = target.parent
    if not parent.is_dir():
        raise OnnxqError(f"expected a folder at {parent} to write {target.name} in, found none", hint="create it first")
    if target.is_dir():
        raise OnnxqError(f"expected a file name for the output, found a folder: {target}", hint="name a file in it")
    if not os.access(parent, os.W_OK):
        raise OnnxqError(f"expected a writable folder, found one that is not: {parent}", hint="choose another -o")


def write_text(target: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_folder(target) as folder:
        temporary = folder / target.name
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)


def write_arrays(target: Path, arrays: Mapping[str, Any]) -> None:
    """Write an ``.npz`` whole or not at all."""
    with atomic_folder(target) as folder:
        np.savez(folder / "arrays.npz", **arrays)
        os.replace(folder / "arrays.npz", target)


def _prefix(target: Path) -> str:
    return f".{target.name}.unfinished-"


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder, and the lock that says its writer lives: the kernel lets go of it when the process dies."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        try:
            lock = _lock(folder, wait=True)
        except FileNotFoundError:
            continue
        if folder.exists():  # another writer may have taken it for abandoned before it was locked
            return folder, lock
        _unlock(lock)


def _remove_abandoned(target: Path) -> None:
    """Remove the folders of writers of ``target`` that died."""
    if fcntl is None:
        return
    for folder in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        with contextlib.suppress(OSError):  # it is locked, or gone, or another user's
            lock = _lock(folder, wait=False)
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        os.close(descriptor)
        if not wait:
            raise
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _not_written(target: Path, error: OSError) -> OnnxqError:
    return OnnxqError(
        f"expected to write {target}, found: {error.strerror or error}",
        hint="free some space or choose another -o; nothing was left behind",
    )
