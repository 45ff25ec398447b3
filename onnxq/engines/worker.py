"""The child process that compiles: a graph that breaks the compiler ends this process, not the user's.

``python -m onnxq.engines.worker FOLDER`` reads ``FOLDER/request.json`` and leaves ``FOLDER/result.json`` and, if all
went well, ``FOLDER/engine``. The result is ``{"error": …, "hint": …}`` or what was built.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from onnxq.engines import plugin_libraries
from onnxq.engines.runtimes import LINT_HINT, Runtime, select
from onnxq.engines.shapes import resolve
from onnxq.errors import OnnxqError


def main(folder: Path) -> None:
    """Do what the request in ``folder`` asks for."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        result = compile_model(request, folder / "engine")
    except OnnxqError as error:
        result = {"error": error.message, "hint": error.hint}
    except OSError as error:
        (folder / "engine").unlink(missing_ok=True)  # a full disk: make room for saying so
        result = {"error": f"expected to write the engine, found: {error.strerror or error}", "hint": "free some space"}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def compile_model(request: dict[str, Any], engine_path: Path) -> dict[str, Any]:
    """Compile the model that ``request`` names and write the engine.

    Returns:
        ``runtime``, ``version``, ``sm``, ``seconds`` and ``log``, the compiler's list of layers.
    """
    runtime = select(request["runtime"], request["sm"])
    start = time.perf_counter()
    trt = runtime.module
    logger = _recorder(trt)
    builder = _builder(runtime, logger)
    plugin_libraries.load(runtime, logger, [Path(file) for file in request["plugins"]])
    network = builder.create_network(runtime.network_flags)
    _parse(runtime, network, logger, request)

    config = builder.create_builder_config()
    runtime.aim(config)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the proof needs the types of every layer
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    profiles = resolve(
        {tensor.name: tuple(tensor.shape) for tensor in inputs},
        request["shapes"],
        {
            tensor.name: [tensor.get_dimension_name(axis) or "" for axis in range(len(tensor.shape))]
            for tensor in inputs
        },
    )
    if profiles:
        profile = builder.create_optimization_profile()
        for name, found in profiles.items():
            profile.set_shape(name, found.minimum, found.usual, found.maximum)
        config.add_optimization_profile(profile)

    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = " ".join(logger.errors[-1].split()) if logger.errors else "no reason given"
        raise OnnxqError(
            f"expected a graph that {runtime.name} compiles for SM {', '.join(runtime.sm)}, found: {reason}",
            hint=LINT_HINT.format(model=request["shown_model"]),
        )
    engine_path.write_bytes(memoryview(engine))
    return {
        "runtime": runtime.name,
        "version": runtime.version,
        "sm": runtime.sm,
        "seconds": time.perf_counter() - start,
        "log": "\n".join(logger.layers),
    }


def _recorder(trt: Any) -> Any:
    """A logger that keeps errors and the list of layers, and nothing of the rest (it is long)."""

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif "Layers:\n" in message:
                self.layers.append(message)

    return Recorder()


def _builder(runtime: Runtime, logger: Any) -> Any:
    try:
        return runtime.module.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the bindings raise TypeError where the library gave no object
        reason = " ".join((logger.errors[-1] if logger.errors else str(error)).split())
        raise OnnxqError(
            f"expected a working {runtime.name} {runtime.version}, found: {reason}",
            hint="check the driver, or build with --runtime tensorrt-rtx, which needs no GPU",
        ) from error


def _parse(runtime: Runtime, network: Any, logger: Any, request: dict[str, Any]) -> None:
    parser = runtime.module.OnnxParser(network, logger)
    if parser.parse_from_file(request["model"]):  # from the file: external data may be larger than a protobuf can be
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if errors:
        found = _spell(errors[0])
        if len(errors) > 1:
            found += f" (and {len(errors) - 1} more)"
    else:
        found = " ".join(logger.errors[-1].split()) if logger.errors else "no reason given"
    hint = LINT_HINT.format(model=request["shown_model"])
    if plugin_libraries.MISSING in found:
        hint = plugin_libraries.hint(runtime)
    raise OnnxqError(f"expected a graph that {runtime.name} reads, found {found}", hint=hint)


def _spell(error: Any) -> str:
    """A parser's error in one line. Its description alone may be no more than ``false``."""
    code = str(error.code()).rpartition(".")[2].replace("_", " ").lower()
    description = " ".join(error.desc().split())
    if not error.node_operator():
        return f"{code}: {description}"
    name = f"{error.node_name()!r}" if error.node_name() else error.node()
    return f"{code} {name} ({error.node_operator()}): {description}"


def _end_with_parent() -> None:
    """Nobody waits for the engine once the parent is gone, which closes our standard input."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(Path(sys.argv[1]))
