"""The rules of a target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.common import CHECK_FAILED, JsonPath, ModelPath, Quiet, check_destinations, write_json

QDQ = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def lint(
    model: ModelPath,
    target: Annotated[str, typer.Option(help="tensorrt or cpu.")] = "tensorrt",
    sm: Annotated[int | None, typer.Option(help="Compute capability, such as 89, for rules that depend on it.")] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Write the model with its Q/DQ where the target wants them, and the ranges that it has: biases become "
            "float, unsigned codes signed for TensorRT, weight scales run along output channels.",
            show_default=False,
        ),
    ] = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Name every rule of the target that MODEL's Q/DQ breaks, with the node.

    Errors are refused by the target or silently read as something else or run in float; warnings cost speed or
    accuracy. Works on Q/DQ models of any tool. Exit code 1 if there are errors, unless `--fix` mends them.
    """
    from onnxq import graph as graphs
    from onnxq import model as models
    from onnxq import targets

    check_destinations([model], fix, json_path)
    chosen = targets.get(target)
    opened = models.read(model)
    findings = chosen.lint(opened, sm)
    errors = [item for item in findings if item.severity == "error"]
    warnings = [item for item in findings if item.severity != "error"]
    write_json(
        json_path, {"errors": [item.to_json() for item in errors], "warnings": [item.to_json() for item in warnings]}
    )
    if not quiet:
        for item in errors + warnings:
            typer.echo(f"{item.severity} {item.rule} {item.node}: {item.message}")
        empty = "" if any(graphs.is_op(node, *QDQ) for node in opened.graph.all_nodes()) else ": it holds no Q/DQ"
        typer.echo(f"{len(errors)} errors, {len(warnings)} warnings for {target}{empty}")
    if fix is not None:
        _fix(model, fix, target, quiet)
    elif errors:
        raise typer.Exit(CHECK_FAILED)


def _fix(model: Path, output: Path, target: str, quiet: bool | None) -> None:
    from onnxq import model as models
    from onnxq.retarget import retarget

    fixed = retarget(model, target)
    models.save(fixed.model, output)
    if not quiet:
        typer.echo(f"{output}: {len(fixed.quantized_nodes)} layers on codes, {len(fixed.left_float)} in float")
        for name, reason in fixed.left_float.items():
            typer.echo(f"float: {name} ({reason})")
        typer.echo(f"see what changed: onnxq compare {model} {output} --data FILE")
