"""Plugins that full TensorRT is told of before it reads a graph: its own, and those of shared libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxq.engines.runtimes import Runtime
from onnxq.errors import OnnxqError

MISSING = "Plugin not found"  # what the parser says
FULL_ALONE = "TensorRT-RTX takes no plugins; full TensorRT does, on the GPU that it builds for: --runtime tensorrt"


def hint(runtime: Runtime) -> str:
    """What to do about an op that the parser looks for among plugins."""
    return "name the shared library that has it: --plugin FILE" if runtime.name == "tensorrt" else FULL_ALONE


def load(runtime: Runtime, logger: Any, files: Sequence[Path]) -> None:
    """Register the plugins that come with full TensorRT, and those of some shared libraries.

    Raises:
        OnnxqError: the compiler takes no plugins, or a file holds none for it.
    """
    if runtime.name != "tensorrt":
        if files:
            raise OnnxqError(f"expected full TensorRT for {files[0].name}, found {runtime.name}", hint=FULL_ALONE)
        return
    runtime.module.init_libnvinfer_plugins(logger, "")
    for file in files:
        before = len(logger.errors)
        if not file.is_file() or runtime.module.get_plugin_registry().load_library(str(file)) is None:
            reason = " ".join("".join(logger.errors[before : before + 1]).split()) or "none"
            raise OnnxqError(
                f"expected plugins in {file}, found {reason}",
                hint=f"it has to be a shared library made for TensorRT {runtime.version}",
            )
