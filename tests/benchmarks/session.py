"""onnxruntime sessions on the CPU, as all measurements of this folder open them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime


def open_session(
    path: Path, threads: int, optimise: bool = True, optimised_graph: Path | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session; `optimise=False` runs every Q/DQ pair literally."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised_graph:
        options.optimized_model_filepath = str(optimised_graph)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def load_inputs(path: Path, count: int | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs by name, and the labels, which are no input."""
    with np.load(path) as file:
        arrays = {name: file[name][:count] for name in file.files}
    return arrays, arrays.pop("labels")


def run(session: onnxruntime.InferenceSession, arrays: dict[str, np.ndarray], batch: int = 50) -> np.ndarray:
    """The first output for all samples, in batches where the model's batch axis is free and one by one where not."""
    shape = session.get_inputs()[0].shape
    step = shape[0] if isinstance(shape[0], int) else batch
    count = len(next(iter(arrays.values())))
    pieces = [
        session.run(None, {name: array[start : start + step] for name, array in arrays.items()})[0]
        for start in range(0, count, step)
    ]
    return np.concatenate(pieces).astype(np.float64)


def fastest_milliseconds(
    sessions: Sequence[onnxruntime.InferenceSession], arrays: dict[str, np.ndarray], rounds: int
) -> list[float]:
    """The fastest run of each session; they take turns, so that whatever else the machine does hits all alike."""
    fastest = [float("inf")] * len(sessions)
    for _ in range(rounds):
        for index, running in enumerate(sessions):
            start = time.perf_counter()
            running.run(None, arrays)
            fastest[index] = min(fastest[index], time.perf_counter() - start)
    return [1000 * seconds for seconds in fastest]
