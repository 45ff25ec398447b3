"""Compile an ONNX file to a TensorRT engine and say which nodes run in low precision.

One call for full TensorRT and for TensorRT-RTX. The compiler runs in a child process (:mod:`onnxq.engines.worker`),
because a graph that breaks it ends the process that it runs in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq import model as models
from onnxq.engines.inspect import CompiledLayer, Proof, parse_layers, prove, wishes
from onnxq.engines.runtimes import LINT_HINT
from onnxq.errors import OnnxqError
from onnxq.writing import atomic_folder

DEFAULT_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class EngineBuild:
    """A compiled engine and the proof of what is in it.

    Attributes:
        engine_path: The engine file.
        engine_bytes: Its size.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
        runtime_version: The version that built it; full TensorRT engines run on the same version only.
        sm: Compute capabilities that it runs on. One list of layers holds for all of them, so the oldest decides.
        seconds: Time to read and compile the model.
        layers: The compiled layers; empty if the runtime did not list them, and then nothing is proven.
        low_precision_nodes: Conv, ConvTranspose, Gemm and MatMul nodes whose product runs in INT8, FP8, INT4 or FP4.
        weight_only_nodes: Those with float arithmetic on a weight held in low precision, as the graph asks.
        float_nodes: All other ones.
        promised_but_float: Of the float nodes, those that the graph wanted quantized: Q/DQ on both inputs, or on
            the weight.
    """

    engine_path: Path
    engine_bytes: int
    runtime: str
    runtime_version: str
    sm: tuple[str, ...]
    seconds: float
    layers: tuple[CompiledLayer, ...]
    low_precision_nodes: tuple[str, ...]
    weight_only_nodes: tuple[str, ...]
    float_nodes: tuple[str, ...]
    promised_but_float: tuple[str, ...]

    @property
    def is_proven(self) -> bool:
        """Whether the runtime listed its layers, so that the lists of nodes mean something."""
        return bool(self.layers)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; nodes are lists of names."""
        return {
            "engine_path": str(self.engine_path),
            "engine_bytes": self.engine_bytes,
            "runtime": self.runtime,
            "runtime_version": self.runtime_version,
            "sm": list(self.sm),
            "seconds": self.seconds,
            "proven": self.is_proven,
            "low_precision_nodes": list(self.low_precision_nodes),
            "weight_only_nodes": list(self.weight_only_nodes),
            "float_nodes": list(self.float_nodes),
            "promised_but_float": list(self.promised_but_float),
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "input_types": list(layer.input_types),
                    "weight_types": list(layer.weight_types),
                    "output_types": list(layer.output_types),
                    "nodes": list(layer.nodes),
                }
                for layer in self.layers
            ],
        }


def build(
    model_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    runtime: str = "auto",
    sm: Sequence[str] | None = None,
    shapes: Mapping[str, Sequence[Sequence[int]]] | None = None,
    plugins: Sequence[str | os.PathLike[str]] = (),
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    progress: Callable[[str], None] | None = None,
) -> EngineBuild:
    """Compile ``model_path`` and write the engine to ``output_path``, whole or not at all.

    Args:
        model_path: An ONNX file, its external data beside it if it has any.
        output_path: Where the engine goes.
        runtime: ``tensorrt``, ``tensorrt-rtx``, or ``auto``: full TensorRT if it is installed and this machine's GPU
            is what to build for, else TensorRT-RTX.
        sm: Compute capabilities to build for, such as ``("89", "120")``; ``None`` for this machine's GPU, or 89
            where there is none (or none that TensorRT-RTX knows).
        shapes: ``{input: (smallest, usual, largest)}`` for dynamic inputs. Where only the first dimension is open
            and nothing is given, it is a batch of 1 to 32, optimised for 8.
        plugins: Shared libraries of plugins that the graph needs beside those of full TensorRT.
        timeout_seconds: The compiler is ended after this time.
        progress: Told in one line what happens now.

    Raises:
        OnnxqError: the model cannot be read or compiled, the runtime is missing, or the output cannot be written.
    """
    source, target = Path(model_path), Path(output_path)
    asked = wishes(models.read(source))
    request = {
        "model": str(source.resolve()),
        "shown_model": str(source),
        "runtime": runtime,
        "sm": None if sm is None else [str(capability) for capability in sm],
        "shapes": None
        if shapes is None
        else {name: [list(shape) for shape in given] for name, given in shapes.items()},
        "plugins": [str(Path(file).resolve()) for file in plugins],
    }
    with atomic_folder(target) as folder:
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        if progress is not None:
            progress(f"compiling {source.name}")
        result = _run_worker(folder, source, timeout_seconds)
        engine_bytes = (folder / "engine").stat().st_size
        os.replace(folder / "engine", target)
    layers = parse_layers(result["log"])
    proof = prove(asked, layers) if layers else Proof((), (), (), ())
    return EngineBuild(
        engine_path=target,
        engine_bytes=engine_bytes,
        runtime=result["runtime"],
        runtime_version=result["version"],
        sm=tuple(result["sm"]),
        seconds=result["seconds"],
        layers=tuple(layers),
        low_precision_nodes=proof.low_precision_nodes,
        weight_only_nodes=proof.weight_only_nodes,
        float_nodes=proof.float_nodes,
        promised_but_float=proof.promised_but_float,
    )


def _run_worker(folder: Path, source: Path, timeout_seconds: float) -> dict[str, Any]:
    """Compile in a child process; the child never outlives this call."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            # -P: a file in the user's folder must not stand in for a module of ours.
            [sys.executable, "-P", "-m", "onnxq.engines.worker", str(folder)],
            stdin=subprocess.PIPE,  # held open: the child ends when it closes
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise OnnxqError(
                f"expected to compile {source.name} in {timeout_seconds:g} seconds, found the compiler still at work",
                hint="give it more time, or build for fewer or smaller shapes",
            ) from None
        finally:
            process.kill()
            process.communicate()
    result_file = folder / "result.json"
    if code != 0 or not result_file.is_file():
        how = _ending(code, folder / "output")
        raise OnnxqError(
            f"expected the compiler to finish {source.name}, found that it crashed ({how})",
            hint=LINT_HINT.format(model=source),
        )
    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    if "error" in result:
        raise OnnxqError(result["error"], hint=result["hint"])
    return result


def _ending(code: int, output: Path) -> str:
    """How the child ended, with the last line that it wrote, if any."""
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {lines[-1][:200]}" if lines else how
