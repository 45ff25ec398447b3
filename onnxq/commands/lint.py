"""The rules of a target."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxq.commands.common import CHECK_FAILED, JsonPath, ModelPath, Quiet, write_json


def lint(
    model: ModelPath,
    target: Annotated[str, typer.Option(help="tensorrt or cpu.")] = "tensorrt",
    sm: Annotated[int | None, typer.Option(help="Compute capability, such as 89, for rules that depend on it.")] = None,
    json_path: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """Name every rule of the target that MODEL's Q/DQ breaks, with the node.

    Errors are refused by the target or silently read as something else or run in float; warnings cost speed or
    accuracy. Works on Q/DQ models of any tool. Exit code 1 if there are errors.
    """
    from onnxq import model as models
    from onnxq import targets

    chosen = targets.get(target)
    findings = chosen.lint(models.read(model), sm)
    errors = [item for item in findings if item.severity == "error"]
    warnings = [item for item in findings if item.severity != "error"]
    write_json(
        json_path, {"errors": [item.to_json() for item in errors], "warnings": [item.to_json() for item in warnings]}
    )
    if not quiet:
        for item in errors + warnings:
            typer.echo(f"{item.severity} {item.rule} {item.node}: {item.message}")
        typer.echo(f"{len(errors)} errors, {len(warnings)} warnings for {target}")
    if errors:
        raise typer.Exit(CHECK_FAILED)
