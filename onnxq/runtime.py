"""onnxruntime: sessions on a chosen device, values tapped without keeping them, and the nodes it really runs."""

from __future__ import annotations

import collections
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
LARGE_TENSOR_BYTES = 1 << 20  # kept out of the serialised model, which protobuf limits to 2 GiB
IN_MEMORY_LIMIT_BYTES = 1 << 30

# What onnxruntime calls integer kernels: they read codes and never see a float activation.
INTEGER_OPS = frozenset(
    {
        "QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool",
        "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearWhere",
        "QLinearReduceMean", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "ConvInteger", "MatMulNBits",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Serialized:
    """A model as bytes (see :func:`serialize`).

    Attributes:
        data: The model.
        large: The initializers that are not in it, by name.
        appended: How many of its outputs, at the end, are taps.
    """

    data: bytes
    large: dict[str, Array]
    appended: int


class Session:
    """An onnxruntime session over a model in memory or on disk.

    Args:
        model: A model, the path of one, or its bytes.
        taps: Names of inner values to return after the model's own outputs.
        optimize: ``False`` runs every node literally (the reference for Q/DQ), ``True`` runs what is deployed.
        device: ``cpu`` or ``cuda``.
        threads: Threads inside an op; 0 lets onnxruntime choose.
        optimized_path: Where to write the optimised graph, for looking at its nodes.
        arena: Whether freed memory is kept for the next run; ``False`` is slower and leaner.

    Raises:
        OnnxqError: onnxruntime refuses the model, or the device is not there.
    """

    def __init__(
        self,
        model: ir.Model | Serialized | str | os.PathLike[str],
        *,
        taps: Sequence[str] = (),
        optimize: bool = True,
        device: str = "cpu",
        threads: int = 0,
        optimized_path: str | None = None,
        arena: bool = True,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come back as exceptions
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
        if optimized_path is not None:
            options.optimized_model_filepath = optimized_path
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        # x86 kernels take signed int8 activations only on request (symmetric Q/DQ made for TensorRT).
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        _check_device(device)
        self._keep_alive: list[Array] = []
        self._appended = 0
        try:
            source = self._source(model, taps, options)
            self._session = onnxruntime.InferenceSession(source, options, providers=PROVIDERS[device])
            self._session._model_bytes = None  # kept only to start over on another provider, which we never do
        except OnnxqError:
            raise
        except Exception as error:
            raise OnnxqError(
                f"expected a model that onnxruntime runs, found one that it refuses ({_one_line(error)})",
                hint="check the model in onnxruntime alone; its op or opset may be unsupported here",
            ) from error
        self.input_names = [value.name for value in self._session.get_inputs()]
        self.output_names = [value.name for value in self._session.get_outputs()]
        self.own_output_names = self.output_names[: len(self.output_names) - self._appended]

    def _source(
        self,
        model: ir.Model | Serialized | str | os.PathLike[str],
        taps: Sequence[str],
        options: onnxruntime.SessionOptions,
    ) -> bytes | str:
        if not isinstance(model, ir.Model | Serialized):
            if not taps:
                return os.fspath(model)
            from onnxq.model import read

            model = read(model)
        serialized = serialize(model, taps) if isinstance(model, ir.Model) else model
        self._appended = serialized.appended
        if serialized.large:
            self._keep_alive = list(serialized.large.values())
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._keep_alive]
            options.add_external_initializers(list(serialized.large), values)
        return serialized.data

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        """Run one batch and return the named outputs (all, taps last, if none are named)."""
        try:
            result: list[Array] = self._session.run(outputs, dict(feed))
        except Exception as error:
            shapes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feed.items())
            raise OnnxqError(
                f"expected the model to run on {shapes}, found an error in onnxruntime ({_one_line(error)})",
                hint="check that the data has the shapes that the model was exported for",
            ) from error
        return result


def serialize(model: ir.Model, taps: Sequence[str] = ()) -> Serialized:
    """The model as bytes, with ``taps`` as further outputs, and the large initializers left out of them.

    Models below 1 GiB keep everything in the bytes but what lies outside their file. Larger ones reference their large
    initializers as external data that the caller hands to onnxruntime as (memory-mapped) arrays, so nothing is copied.
    """
    from onnxq.graph import values as named_values

    graph = model.graph
    own = {value.name for value in graph.outputs}
    wanted = [name for name in taps if name not in own]
    if wanted:
        known = named_values(graph)
        graph.outputs.extend(known[name] for name in wanted)
    large: dict[str, Array] = {}
    kept: dict[str, ir.TensorProtocol] = {}
    try:
        tensors = {name: value.const_value for name, value in graph.initializers.items()}
        too_large = sum(item.nbytes for item in tensors.values() if item is not None) > IN_MEMORY_LIMIT_BYTES
        for name, tensor in tensors.items():
            # A path to external data means nothing beside bytes, so that such tensors come along in any case.
            is_external = isinstance(tensor, ir.ExternalTensor)
            if tensor is None or not (is_external or (too_large and tensor.nbytes >= LARGE_TENSOR_BYTES)):
                continue
            kept[name] = tensor
            if tensor.nbytes < LARGE_TENSOR_BYTES:
                inner: ir.TensorProtocol = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
            else:
                large[name] = tensor.numpy()
                shape = ir.Shape(large[name].shape)
                inner = ir.ExternalTensor(
                    "in-memory", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=""
                )
            graph.initializers[name].const_value = inner
        data = ir.to_proto(model).SerializeToString()
    finally:
        for name, tensor in kept.items():
            graph.initializers[name].const_value = tensor
        if wanted:
            for _ in wanted:
                graph.outputs.pop()  # one by one: deleting a slice would leave the values marked as outputs
    return Serialized(data, large, len(wanted))


def optimized_session(
    model: ir.Model | str | os.PathLike[str], *, threads: int = 0
) -> tuple[Session, collections.Counter[str]]:
    """A session on the CPU provider, and how many nodes of each op it runs after its own optimisations."""
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        path = str(Path(folder) / "optimized.onnx")
        session = Session(model, optimized_path=path, threads=threads)
        return session, collections.Counter(node.op_type for node in ir.load(path).graph.all_nodes())


def optimized_nodes(model: ir.Model | str | os.PathLike[str]) -> collections.Counter[str]:
    """How many nodes of each op onnxruntime's CPU provider runs after its own optimisations."""
    return optimized_session(model)[1]


def integer_kernels(nodes: Mapping[str, int]) -> int:
    """How many of the optimised nodes are integer kernels."""
    return sum(count for op, count in nodes.items() if op in INTEGER_OPS)


def latency_ms(
    sessions: Mapping[str, Session], feed: Feed, *, seconds: float = 2.0, minimum_runs: int = 10
) -> dict[str, float]:
    """Median latency of each session in milliseconds, runs interleaved so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(feed)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < minimum_runs:
        for name, session in sessions.items():
            before = time.perf_counter()
            session.run(feed)
            times[name].append(time.perf_counter() - before)
    return {name: float(np.median(series) * 1000) for name, series in times.items()}


def run_all(session: Session, feeds: Iterable[Feed]) -> list[Array]:
    """The first output for every feed."""
    return [session.run(feed, [session.output_names[0]])[0] for feed in feeds]


def _check_device(device: str) -> None:
    if device not in PROVIDERS:
        raise OnnxqError(f"expected a device of {', '.join(PROVIDERS)}, found {device!r}", hint="use --device cpu")
    if device == "cuda":
        try:
            import ctypes

            ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise OnnxqError(
                "expected an NVIDIA driver for --device cuda, found none (libcuda.so.1 does not load)",
                hint="use --device cpu; every command works without a GPU",
            ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
