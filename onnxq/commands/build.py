"""An engine and its proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from onnxq.commands.common import CHECK_FAILED, JsonPath, ModelPath, Quiet, check_destinations, progress, write_json


def build(
    model: ModelPath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ENGINE", help="Where to write; MODEL.engine if not given.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="tensorrt, tensorrt-rtx, or auto: what is installed.")] = "auto",
    sm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM", help="Compute capability, such as 89; repeatable. TensorRT-RTX needs no GPU for it."
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MIN[,OPT,MAX]",
            help="Sizes of an input with free dimensions, such as x:1x3x224x224,8x3x224x224,16x3x224x224; repeatable.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds before the compiler is stopped.")] = 1800.0,
    json_path: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """Compile MODEL into an engine, and prove which nodes run in INT8, FP8 or INT4 and which stayed float.

    The compiler runs in a process of its own, because a graph that it does not expect can crash it. The proof is
    read from the compiled layers. Exit code 1 if a node with Q/DQ was compiled as float.
    """
    from onnxq import engines

    destination = output or model.with_suffix(".engine")
    check_destinations(model, destination, json_path, None)
    profiles: dict[str, Any] = {}
    for text in shapes or ():
        profiles |= engines.parse_shapes(text)
    shown = progress(quiet)
    with shown.stage("build", "Compiling"):
        built = engines.build(
            model, destination, runtime=runtime, sm=sm or None, shapes=profiles or None, timeout_seconds=timeout
        )
    numbers = built.to_json()
    write_json(json_path, numbers)
    if not quiet:
        typer.echo(
            f"{destination}: {built.engine_bytes / 1e6:.1f} MB, {built.runtime} {built.runtime_version}, "
            f"SM {', '.join(built.sm) or 'of this GPU'}, {built.seconds:.1f} s"
        )
        typer.echo(
            f"low precision: {len(built.low_precision_nodes)} nodes; weights only: {len(built.weight_only_nodes)}; "
            f"float: {len(built.float_nodes)}"
        )
        for name in built.promised_but_float:
            typer.echo(f"promised but float: {name}")
    if built.promised_but_float:
        raise typer.Exit(CHECK_FAILED)
