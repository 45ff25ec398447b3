"""Run a compiled engine: TensorRT's or TensorRT-RTX's runtime over memory of the GPU that torch allocates."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.engines.runtimes import PACKAGES, gpu_sm, require_kernels
from onnxq.errors import OnnxqError
from onnxq.runtime import Array, Feed


class EngineSession:
    """An engine on this machine's GPU, with the interface of :class:`onnxq.runtime.Session`.

    Args:
        engine: The file that ``onnxq build`` wrote.
        runtime: What built it, ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        OnnxqError: there is no GPU, the runtime or torch with CUDA is not installed, or the engine does not load.
    """

    def __init__(self, engine: Path, runtime: str) -> None:
        self._torch = torch_with_gpu()
        try:
            self._trt = importlib.import_module(PACKAGES[runtime])
        except (ImportError, OSError) as error:
            raise OnnxqError(
                f"expected the {runtime} package, which built {engine.name}, found none that loads",
                hint="`onnxq doctor` says what is installed",
            ) from error
        require_kernels(runtime, self._trt)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise OnnxqError(
                f"expected an engine for {runtime} {self._trt.__version__} and SM {gpu_sm()}, found {engine.name}",
                hint="build it again with this version, for this GPU",
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.input_names = [name for name in names if modes[name] == self._trt.TensorIOMode.INPUT]
        self.output_names = [name for name in names if name not in self.input_names]

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        """Run one batch and return the named outputs (all if none are named)."""
        torch = self._torch
        kept: dict[str, Any] = {}
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for name in self.input_names:
                wanted = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
                kept[name] = torch.from_numpy(np.ascontiguousarray(feed[name], wanted)).cuda()
                if not self._context.set_input_shape(name, tuple(kept[name].shape)):
                    raise OnnxqError(
                        f"expected {name!r} in a shape that the engine was built for, found {list(feed[name].shape)}",
                        hint="build it with --shapes that hold this one",
                    )
            for name in self.output_names:
                shape = tuple(self._context.get_tensor_shape(name))
                number = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
                kept[name] = torch.from_numpy(np.empty(shape, number)).cuda()
            for name, tensor in kept.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise OnnxqError("expected the engine to run, found that it failed", hint="build it again here")
        stream.synchronize()
        return [kept[name].cpu().numpy() for name in outputs or self.output_names]


def torch_with_gpu() -> Any:
    """torch, where it can hold memory of a GPU that is there.

    Raises:
        OnnxqError: there is no GPU, or no torch for it.
    """
    if gpu_sm() is None:
        raise OnnxqError(
            "expected an NVIDIA GPU to run engines on, found none",
            hint="give the .groups.json or the .onnx that they were built from: onnxruntime runs it anywhere",
        )
    try:
        torch: Any = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise OnnxqError(
            "expected torch, which holds the GPU's memory, found it not installed", hint="pip install torch"
        ) from error
    if not torch.cuda.is_available():
        raise OnnxqError(
            "expected torch with CUDA, found one for the CPU alone", hint="install torch's CUDA build (pytorch.org)"
        )
    return torch
