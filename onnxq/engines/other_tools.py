"""The same engine with other tools: command lines to paste."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxq.engines.shapes import Profile, resolve

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def command_lines(
    model: ir.Model, path: Path, engine: Path, shapes: Shapes | None = None, plugins: Sequence[Path] = ()
) -> dict[str, str]:
    """How trtexec builds the engine, Polygraphy compares it with onnxruntime, and onnxruntime runs the model in it.

    Graphs with Q/DQ are strongly typed: precisions are those of the graph, and flags such as ``--int8`` do not apply.

    Args:
        model: The model, for the shapes of its inputs.
        path: Its file.
        engine: Where the engine goes.
        shapes: As for :func:`onnxq.engines.build`.
        plugins: The same.

    Returns:
        A command by the name of the tool: ``trtexec``, ``polygraphy``, ``onnxruntime``.
    """
    inputs, symbols = {}, {}
    for value in model.graph.inputs:
        if not value.is_initializer() and value.name:
            sizes = list(value.shape or ())
            inputs[value.name] = [size if isinstance(size, int) else -1 for size in sizes]
            symbols[value.name] = ["" if isinstance(size, int) else str(size.value or "") for size in sizes]
    profiles = resolve(inputs, shapes, symbols)
    trtexec = ["trtexec", f"--onnx={path}", "--stronglyTyped", f"--saveEngine={engine}"]
    polygraphy = ["polygraphy", "run", str(path), "--trt", "--onnxrt", "--strongly-typed"]
    trtexec += [f"--dynamicPlugins={file}" for file in plugins]
    polygraphy += ["--plugins", *map(str, plugins)] if plugins else []
    for kind, pick in (("min", "minimum"), ("opt", "usual"), ("max", "maximum")):
        if profiles:
            trtexec.append(f"--{kind}Shapes=" + ",".join(_spelled(profiles, pick, ":", "x")))
            polygraphy += [f"--trt-{kind}-shapes", *_spelled(profiles, pick, ":[", ",", "]")]
    if profiles:
        polygraphy += ["--input-shapes", *_spelled(profiles, "usual", ":[", ",", "]")]
    providers = "['TensorrtExecutionProvider', 'CUDAExecutionProvider']"
    return {
        "trtexec": shlex.join(trtexec),
        "polygraphy": shlex.join(polygraphy),
        "onnxruntime": f"onnxruntime.InferenceSession({str(path)!r}, providers={providers})",
    }


def _spelled(profiles: Mapping[str, Profile], pick: str, before: str, between: str, behind: str = "") -> list[str]:
    return [
        f"{name}{before}{between.join(map(str, getattr(profile, pick)))}{behind}" for name, profile in profiles.items()
    ]
