"""An engine and its proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxq.commands.common import (
    CHECK_FAILED,
    JsonPath,
    ModelPath,
    Quiet,
    ReportPath,
    check_destinations,
    progress,
    write_json,
    write_report,
)

if TYPE_CHECKING:
    from onnxq.engines import EngineBuild
    from onnxq.progress import Progress


def build(
    model: ModelPath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ENGINE", help="Where to write; MODEL.engine if not given.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="tensorrt, tensorrt-rtx, or auto: what is installed.")] = "auto",
    sm: Annotated[
        list[str] | None,
        typer.Option(
            "--sm", metavar="SM", help="Compute capability, such as 89; repeatable. TensorRT-RTX needs no GPU for it."
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MIN[,OPT,MAX]",
            help="Sizes of an input with free dimensions, such as x:1x3x224x224,8x3x224x224,16x3x224x224; repeatable.",
        ),
    ] = None,
    plugins: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE",
            help="A shared library of plugins that the graph needs beside full TensorRT's own; repeatable. "
            "TensorRT-RTX takes none.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds before the compiler is stopped.")] = 1800.0,
    report: ReportPath = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Compile MODEL into an engine, and prove which nodes run in INT8, FP8 or INT4 and which stayed float.

    MODEL may be a `.groups.json`, the index of a denoiser with one graph for each group of sampler steps: then OUT is
    a folder that gets an engine for each and their index.

    The compiler runs in a process of its own, because a graph that it does not expect can crash it. The proof is
    read from the compiled layers. Exit code 1 if a node with Q/DQ was compiled as float.
    """
    from onnxq import engines
    from onnxq import model as models
    from onnxq.diffusion.subgraphs import is_index
    from onnxq.engines.other_tools import command_lines
    from onnxq.report.sections import engine_table

    profiles: dict[str, Any] = {}
    for text in shapes or ():
        profiles |= engines.parse_shapes(text)
    shown = progress(quiet)
    options: dict[str, Any] = {
        "runtime": runtime,
        "sm": sm or None,
        "shapes": profiles or None,
        "plugins": plugins or (),
    }
    if is_index(model):
        folder = output or model.with_name(model.name.replace(".groups.json", ".engines"))
        _build_groups(model, folder, shown, json_path, report, quiet, options | {"timeout_seconds": timeout})
        return
    destination = output or model.with_suffix(".engine")
    check_destinations([model], destination, json_path, report)
    with shown.stage("build", "Compiling"):
        built = engines.build(model, destination, **options, timeout_seconds=timeout)
    lines = command_lines(models.read(model), model, destination, profiles or None, plugins or ())
    write_json(json_path, built.to_json() | {"command_lines": lines})
    if report is not None:
        write_report(report, {"model": str(model), "other_tools": list(lines.items()), "tables": [engine_table(built)]})
    if not quiet:
        _show(built)
        for name, line in lines.items():
            typer.echo(f"with {name}: {line}")
    if built.promised_but_float:
        raise typer.Exit(CHECK_FAILED)


def _build_groups(
    index: Path,
    folder: Path,
    shown: Progress,
    json_path: Path | None,
    report: Path | None,
    quiet: bool | None,
    options: dict[str, Any],
) -> None:
    """Engines for all groups of sampler steps, and their index."""
    from onnxq.diffusion.router import read_index
    from onnxq.engines.groups import build_groups
    from onnxq.report.sections import engine_table

    check_destinations([index], json_path, report)
    with shown.stage("build", "Compiling", len(read_index(index)), "engines") as advance:
        built = build_groups(index, folder, advance, **options)
    write_json(json_path, {"engines": [item.to_json() for item in built], "index": str(folder / index.name)})
    if report is not None:
        write_report(report, {"model": str(index), "tables": [engine_table(item) for item in built]})
    if not quiet:
        for item in built:
            _show(item)
        typer.echo(f"{folder / index.name}: which engine serves which steps")
    if any(item.promised_but_float for item in built):
        raise typer.Exit(CHECK_FAILED)


def _show(built: EngineBuild) -> None:
    typer.echo(
        f"{built.engine_path}: {built.engine_bytes / 1e6:.1f} MB, {built.runtime} {built.runtime_version}, "
        f"SM {', '.join(built.sm) or 'of this GPU'}, {built.seconds:.1f} s"
    )
    typer.echo(
        f"low precision: {len(built.low_precision_nodes)} nodes; weights only: {len(built.weight_only_nodes)}; "
        f"float: {len(built.float_nodes)}"
    )
    for name in built.promised_but_float:
        typer.echo(f"promised but float: {name}")
