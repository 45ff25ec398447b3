"""onnxruntime: sessions on a chosen device, values tapped without keeping them, and the nodes it really runs."""

from __future__ import annotations

import collections
import itertools
import json
import os
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from onnxq import cuda, custom_ops, machine
from onnxq import graph as graphs
from onnxq.condensed import condensed
from onnxq.errors import LESS_MEMORY, OnnxqError, ran_out_of_memory
from onnxq.parts import Parts
from onnxq.serialized import Serialized, serialize

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
Batch = dict[str, Array]
Run = tuple[Batch, list[Array]]  # and its outputs

PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [(cuda.PROVIDER, cuda.OPTIONS), "CPUExecutionProvider"],
}
PATIENCE_SECONDS, FEWEST_RUNS = 10.0, 3  # of timing, and what it takes then in any case
SPINNING = "session.intra_op.allow_spinning"
# What onnxruntime says where its layout for convolutions lost a value that is an output too, as taps are.
LOST_OUTPUT = "Failed to find node output"
UNKNOWN_OP = ("is not a registered function/op", "No Op registered for")
UNKNOWN_FORMAT = ("an implementation for DequantizeLinear", "find kernel for DequantizeLinear")  # FP4
BFLOAT16 = "bfloat16"  # in the type of an input or output, which numpy does not have
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"

# What onnxruntime calls integer kernels: they read codes and never see a float activation.
INTEGER_OPS = frozenset(
    {
        "QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool",
        "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearWhere",
        "QLinearReduceMean", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "ConvInteger", "MatMulNBits", "DynamicQuantizeLSTM",
    }
)  # fmt: skip


class Session:
    """An onnxruntime session over a model in memory or on disk; one of over 512 MiB of weights runs in parts.

    Args:
        model: A model, the path of one, or its bytes.
        taps: Names of inner values to return after the model's own outputs.
        condense: Which of these are reduced where they are made, to :class:`Condensed` ones.
        optimize: ``False`` runs every node literally (the reference for Q/DQ), ``True`` runs what is deployed.
        device: ``cpu`` or ``cuda``.
        threads: Threads inside an op; 0 lets onnxruntime choose.
        at_once: Runs that :meth:`run_each` keeps going, which share the threads. An op seldom keeps all cores busy, so
            that two runs take less than twice the time of one. 1 on a GPU, and for a model that runs in parts.
        optimized_path: Where to write the optimised graph, for looking at its nodes.
        arena: Whether freed memory is kept for the next run; ``False`` is slower and leaner.
        spin: Whether idle threads spin until the next run, as they do by default in deployment: for what is timed or
            deployed. Elsewhere they sleep, because between two runs numpy works, and wants the cores.
        profile_prefix: Where :meth:`profile` writes; ``None`` times nothing.

    Raises:
        OnnxqError: onnxruntime refuses the model, or the device is not there.
    """

    def __init__(
        self,
        model: ir.Model | Serialized | str | os.PathLike[str],
        *,
        taps: Sequence[str] = (),
        condense: Collection[str] = (),
        optimize: bool = True,
        device: str = "cpu",
        threads: int = 0,
        at_once: int = 1,
        optimized_path: str | None = None,
        arena: bool = True,
        spin: bool = False,
        profile_prefix: str | None = None,
    ) -> None:
        options = _new_options()
        if profile_prefix is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile_prefix
        in_parts = isinstance(model, Serialized) and model.is_large
        self._at_once = 1 if in_parts or device != "cpu" else at_once
        # A run's own thread works too, so that this many threads for all runs together fill the cores.
        options.intra_op_num_threads = max(1, machine.cores() - self._at_once + 1) if self._at_once > 1 else threads
        options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
        if optimized_path is not None:
            options.optimized_model_filepath = optimized_path
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        # x86 kernels take signed int8 activations only on request (symmetric Q/DQ made for TensorRT).
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        options.add_session_config_entry(SPINNING, "1" if spin else "0")
        _check_device(device)
        self._keep_alive: list[Array] = []
        self._appended = 0
        self._condensed: dict[str, tuple[list[str], list[int]]] = {}
        self.in_parts = self.emulates_bfloat16 = False
        try:
            self._session = self._opened(model, taps, condense, options, device)
        except OnnxqError:
            raise
        except Exception as error:
            hint = "check the model in onnxruntime alone; its op or opset may be unsupported here"
            if _says(error, UNKNOWN_OP):
                hint = "name the library of custom ops that has it: --custom-ops FILE"
            raise OnnxqError(
                f"expected a model that onnxruntime runs, found one that it refuses ({_one_line(error)})", hint=hint
            ) from error
        self.input_names = [value.name for value in self._session.get_inputs()]
        found = self._session.get_outputs()
        tensors = {value.name for value in found if value.type.startswith("tensor")}
        self._leaves_out = len(tensors) < len(found)
        self.output_names = [value.name for value in found if value.name in tensors]
        own = found[: len(found) - self._appended]
        self.own_output_names = [value.name for value in own if value.name in tensors]
        if self._condensed:
            results = {name for names, _ in self._condensed.values() for name in names}
            kept = [name for name in self.output_names if name not in results]
            self.output_names = [*kept, *self._condensed]

    def _opened(
        self,
        model: ir.Model | Serialized | str | os.PathLike[str],
        taps: Sequence[str],
        condense: Collection[str],
        options: onnxruntime.SessionOptions,
        device: str,
    ) -> Any:
        if not isinstance(model, ir.Model | Serialized):
            from onnxq import shapes
            from onnxq.model import is_large, read

            large, opened = is_large(model), None
            if not taps and (not large or options.optimized_model_filepath):
                try:
                    session = _inference_session(os.fspath(model), options, device)
                    if not any(BFLOAT16 in value.type for value in (*session.get_inputs(), *session.get_outputs())):
                        return session
                except Exception as error:
                    opened = read(model)
                    if not _says(error, UNKNOWN_OP + UNKNOWN_FORMAT) and not graphs.is_bfloat16(opened):
                        raise
            model = opened or read(model)  # which may run without its plugins, with FP8 for FP4, float32 for bfloat16
            if large or graphs.is_bfloat16(model):
                shapes.infer(model)
        serialized = serialize(model, taps, condense=condense) if isinstance(model, ir.Model) else model
        self.emulates_bfloat16 = serialized.emulates_bfloat16
        self._appended, self._condensed = serialized.appended, serialized.condensed
        if self._condensed:  # else what only reduces comes last, and all values wait for it
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        if serialized.folder:
            options.add_session_config_entry(EXTERNAL_FOLDER, serialized.folder)
        self._keep_alive = list(serialized.large.values())
        if not serialized.is_large or options.optimized_model_filepath:
            if serialized.large:
                options.add_external_initializers(*_named_values(serialized.large, serialized.large))
            return _inference_session(serialized.model.SerializeToString(), options, device)
        self.in_parts = True

        levels = onnxruntime.GraphOptimizationLevel
        level = options.graph_optimization_level
        if level == levels.ORT_ENABLE_ALL:  # would re-order weights: too much for a session that lives for one run
            level = levels.ORT_ENABLE_EXTENDED

        def open_part(data: bytes, initializers: Sequence[str]) -> Any:
            lean = _new_options()
            lean.intra_op_num_threads = options.intra_op_num_threads
            lean.enable_cpu_mem_arena = lean.enable_mem_pattern = False
            lean.graph_optimization_level = level
            lean.add_session_config_entry("session.disable_prepacking", "1")
            lean.add_session_config_entry(SPINNING, "0")
            if serialized.folder:
                lean.add_session_config_entry(EXTERNAL_FOLDER, serialized.folder)
            read = [name for name in initializers if name in serialized.large]
            if read:
                lean.add_external_initializers(*_named_values(serialized.large, read))
            return _inference_session(data, lean, device)

        return Parts(serialized.model, open_part)

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Any]:
        """Run one batch and return the named outputs (all, taps last, if none are named).

        Arrays; of condensed taps :class:`Condensed` ones. Outputs that are no tensors, as sequences, are left out.
        """
        results = self._results_of(outputs)
        if results is not None and not results:  # onnxruntime would return all
            return []
        try:
            result: list[Any] = self._session.run(results, dict(feed))
        except Exception as error:
            sizes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feed.items())
            hint = "check that the data has the shapes that the model was exported for"
            raise OnnxqError(
                f"expected the model to run on {sizes}, found an error in onnxruntime ({_one_line(error)})",
                hint=LESS_MEMORY if ran_out_of_memory(error) else hint,
            ) from error
        return self._packed(outputs, result) if self._condensed else result

    def _results_of(self, outputs: Sequence[str] | None) -> Sequence[str] | None:
        """The outputs that hold the named ones."""
        if not self._condensed:
            return self.output_names if outputs is None and self._leaves_out else outputs
        names = self.output_names if outputs is None else outputs
        return [result for name in names for result in self._condensed.get(name, ([name], []))[0]]

    def _packed(self, outputs: Sequence[str] | None, results: Iterable[Array]) -> list[Any]:
        """What was found as the outputs that were named."""
        following = iter(results)
        packed: list[Any] = []
        for name in self.output_names if outputs is None else outputs:
            if name in self._condensed:
                names, axes = self._condensed[name]
                packed.append(condensed(list(itertools.islice(following, len(names))), axes))
            else:
                packed.append(next(following))
        return packed

    def run_each(self, batches: Iterable[Batch], outputs: Sequence[str] | None = None) -> Iterator[Run]:
        """Every batch with the named outputs for it, in order, while the next ones are run.

        What of a batch is no input of the model is left alone. Besides what the caller holds, as many batches are in
        memory as runs go on at once.
        """

        def run(batch: Batch) -> list[Array]:
            return self.run({name: batch[name] for name in self.input_names}, outputs)

        if self._at_once == 1:
            for batch in batches:
                yield batch, run(batch)
            return

        def finished(batch: Batch, future: Future[list[Array]]) -> Run:
            return batch, future.result()  # a variable of the generator would hold on to it

        waiting: collections.deque[tuple[Batch, Future[list[Array]]]] = collections.deque()
        with ThreadPoolExecutor(self._at_once) as pool:
            for batch in batches:
                waiting.append((batch, pool.submit(run, batch)))
                if len(waiting) > self._at_once:
                    yield finished(*waiting.popleft())
            while waiting:
                yield finished(*waiting.popleft())

    def profile(self) -> list[dict[str, Any]]:
        """What onnxruntime timed since the session was opened, in order; nothing is timed afterwards."""
        found: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return found


def _new_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions
    for library in custom_ops.list_libraries():
        options.register_custom_ops_library(library)
    return options


def _says(error: BaseException, phrases: Sequence[str]) -> bool:
    return any(phrase in str(error) for phrase in phrases)


def _inference_session(source: bytes | str, options: onnxruntime.SessionOptions, device: str) -> Any:
    def opened() -> Any:
        return onnxruntime.InferenceSession(source, options, providers=PROVIDERS[device], enable_fallback=0)

    levels = onnxruntime.GraphOptimizationLevel
    try:
        session = opened()
    except RuntimeError as error:
        if LOST_OUTPUT not in str(error) or options.graph_optimization_level != levels.ORT_ENABLE_ALL:
            raise
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        session = opened()
    session._model_bytes = None  # kept only to start over on another provider, which we never do
    if device == "cuda":
        cuda.require_on_gpu(session)
    return session


def _named_values(arrays: Mapping[str, Array], names: Iterable[str]) -> tuple[list[str], list[Any]]:
    chosen = list(names)
    return chosen, [_named_value(arrays[name]) for name in chosen]


def _named_value(array: Array) -> Any:
    if array.dtype.isbuiltin == 1:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    dtype = ir.DataType.from_numpy(array.dtype)  # FP8 and bfloat16, which onnxruntime reads as plain bits
    bits = array.view(f"u{array.dtype.itemsize}")
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(dtype))


def optimized_session(
    model: ir.Model | str | os.PathLike[str], *, threads: int = 0
) -> tuple[Session, collections.Counter[str]]:
    """A session on the CPU provider, and how many nodes of each op it runs after its own optimisations."""
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        path = str(Path(folder) / "optimized.onnx")
        session = Session(model, optimized_path=path, threads=threads, spin=True)
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
    """Median latency of each session in milliseconds, runs interleaved so that drift hits all alike.

    Slow ones are run fewer times than asked for, but a few times.
    """
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(feed)
    start = time.perf_counter()
    for done in itertools.count():
        taken = time.perf_counter() - start
        if taken >= seconds and done >= (minimum_runs if taken < PATIENCE_SECONDS else FEWEST_RUNS):
            break
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
        cuda.require_provider()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
