"""One width out of a model that holds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.common import ModelPath, Quiet, check_destinations


def export(
    model: ModelPath,
    bits: Annotated[int, typer.Option(help="Width of the weights, from 2 to 8.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where to write; MODEL.intN.onnx if not given."),
    ] = None,
    quiet: Quiet = None,
) -> None:
    """Write the model of one width from a MODEL that the recipe multiquant made.

    Codes keep their 8-bit containers, so that the same integer kernels run and the file has the size of int8.
    """
    from onnxq import model as models
    from onnxq.weights.masters import export_width

    destination = output or model.with_name(f"{model.stem}.int{bits}.onnx")
    check_destinations([model], destination)
    opened = models.read(model)
    models.check_valid(opened, model.name)
    count = export_width(opened, bits)
    models.check_valid(opened, f"{model.name} at {bits} bits")  # a damaged master may name scales that it lacks
    models.set_metadata(opened, bits=str(bits))
    models.save(opened, destination)
    if not quiet:
        typer.echo(f"{destination}: {count} weights of {bits} bits")
