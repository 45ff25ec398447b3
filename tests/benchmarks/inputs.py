"""Calibration and test inputs of the shared classifiers, written once by the data folder's own script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

MODELS = [
    "efficientnet_lite0",
    "mobilenetv2_bnfolded",
    "squeezenet_v1_1",
    "mobilenet_v1_025_224",
    "resnet20_cifar10",
    "resnet56_cifar10",
    "r20vit_hybrid_cifar10",
    "mlperf_tiny_resnet8_c10",
    "mlperf_tiny_kws_dscnn",
]


def prepare(data: Path, work: Path, model: str, split: str, count: int | None = None) -> Path:
    """An .npz with the inputs of one split, keyed by the model's input name, and `labels`."""
    out = work / "inputs" / f"{model}.{split}{count or ''}.npz"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, data / "prepare.py", model, split, "-o", out]
        subprocess.run([str(part) for part in command + (["-n", count] if count else [])], check=True)
    return out


def repeat(path: Path, count: int) -> Path:
    """Exactly `count` samples, by repetition where there are fewer: for measuring cost only, never quality."""
    out = path.with_suffix(f".repeated{count}.npz")
    if not out.exists():
        with np.load(path) as file:
            np.savez(out, **{name: np.resize(file[name], (count, *file[name].shape[1:])) for name in file.files})
    return out


if __name__ == "__main__":  # a process of its own: the arrays stay out of the process that measures
    repeat(Path(sys.argv[1]), int(sys.argv[2]))
