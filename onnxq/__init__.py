"""onnxq: graph-level quantization of ONNX models for TensorRT and onnxruntime.

    import onnxq
    result = onnxq.quantize("model.onnx", "calibration.npz", target="cpu", output="model.int8.onnx")
    print(result.numbers["sqnr_db"])

Everything is imported on first use, so that ``import onnxq`` costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Torch's threads wait for one another after every small op. By default they spin, and where another program has a core
# the one that is waited for does not run meanwhile: made inputs took 10 times as long. Read when OpenMP is loaded,
# so it has to be set before torch is imported; what the user has set stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

if TYPE_CHECKING:
    from onnxq.comparison import Comparison, compare
    from onnxq.config import Settings
    from onnxq.engines import EngineBuild, build
    from onnxq.errors import OnnxqError
    from onnxq.model import load, save
    from onnxq.pipeline import Result, quantize

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "EngineBuild",
    "OnnxqError",
    "Result",
    "Settings",
    "build",
    "compare",
    "load",
    "quantize",
    "save",
]

_HOMES = {
    "Comparison": "onnxq.comparison",
    "EngineBuild": "onnxq.engines",
    "OnnxqError": "onnxq.errors",
    "Result": "onnxq.pipeline",
    "Settings": "onnxq.config",
    "build": "onnxq.engines",
    "compare": "onnxq.comparison",
    "load": "onnxq.model",
    "quantize": "onnxq.pipeline",
    "save": "onnxq.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
