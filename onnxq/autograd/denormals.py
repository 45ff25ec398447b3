"""Numbers too small for a processor's fast arithmetic count as zero while inputs are made."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

PARALLEL_ELEMENTS = 1 << 18  # more than torch leaves to one thread

_depth = 0


@contextlib.contextmanager
def no_denormals() -> Iterator[None]:
    """Let torch take numbers below 1.2e-38 for zero on the CPU; also a decorator.

    Processors take ten times as long over them, and gradients of channels that are dead, as a quarter of MobileNetV1's
    first ones, are nothing else. Where onnxruntime opens a session it takes the setting back: enter this behind that.
    """
    global _depth
    _start_threads()
    _depth += 1
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            torch.set_flush_denormal(False)


@functools.cache
def _start_threads() -> None:
    """Torch's threads keep the setting of the one that starts them; it does so once, and nobody can set it later."""
    torch.set_flush_denormal(True)
    torch.ones(PARALLEL_ELEMENTS).exp_()
    torch.set_flush_denormal(False)
