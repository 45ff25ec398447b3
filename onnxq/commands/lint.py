"""The rules of a target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from onnxq.commands.common import CHECK_FAILED, JsonPath, ModelPath, Quiet, check_destinations, write_json


def lint(
    model: ModelPath,
    target: Annotated[str, typer.Option(help="tensorrt or cpu.")] = "tensorrt",
    sm: Annotated[int | None, typer.Option(help="Compute capability, such as 89, for rules that depend on it.")] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Write the model with its Q/DQ where the target wants them, and the ranges that it has: biases become "
            "float, unsigned codes signed for TensorRT, weight scales run along output channels, integer operators "
            "Q/DQ (MatMulNBits too).",
            show_default=False,
        ),
    ] = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Name every rule of the target that MODEL's Q/DQ breaks, with the node.

    Errors are refused by the target or silently read as something else or run in float; warnings cost speed or
    accuracy. Works on Q/DQ models of any tool. Of a `.groups.json` every graph is looked at. Exit code 1 if there are
    errors, unless `--fix` mends them.
    """
    from onnxq import graph as graphs
    from onnxq import model as models
    from onnxq import targets
    from onnxq.diffusion.router import files_of
    from onnxq.diffusion.subgraphs import is_index
    from onnxq.errors import OnnxqError

    check_destinations([model], fix, json_path)
    chosen = targets.get(target)
    several = is_index(model)
    if several and fix is not None:
        raise OnnxqError(
            f"expected one model to fix, found an index of several: {model}",
            hint=f"quantize the denoiser with --target {target}, or fix the graphs that it names one by one",
        )
    found: list[dict[str, Any]] = []
    holds_qdq = False
    for file in files_of(model) if several else [model]:
        opened = models.read(file)
        of = {"file": file.name} if several else {}
        found += [of | {"severity": item.severity} | item.to_json() for item in chosen.lint(opened, sm)]
        holds_qdq |= any(graphs.is_op(node, *graphs.QDQ, "DynamicQuantizeLinear") for node in opened.graph.all_nodes())
    errors = [item for item in found if item["severity"] == "error"]
    warnings = [item for item in found if item["severity"] != "error"]
    write_json(json_path, {"errors": errors, "warnings": warnings})
    if not quiet:
        for item in errors + warnings:
            where = f"{item['file']}: " if several else ""
            typer.echo(f"{item['severity']} {item['rule']} {where}{item['node']}: {item['message']}")
        empty = "" if holds_qdq else ": it holds no Q/DQ"
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
        if fixed.lost_ranges:
            typer.echo(
                "weights alone have codes: the file finds ranges while it runs; for codes of activations too: "
                f"onnxq strip {model} -o float.onnx, onnxq quantize float.onnx --target {target}"
            )
        typer.echo(f"see what changed: onnxq compare {model} {output} --data FILE")
