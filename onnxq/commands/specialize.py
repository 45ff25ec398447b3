"""One branch of a model, or one size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.common import ModelPath, Quiet, check_destinations, sizes_of


def specialize(
    model: ModelPath,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=VALUE",
            help="Make an input a constant: sr=16000, use_cache_branch=true, scale=0.5,0.5,1; repeatable.",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shapes",
            metavar="NAME:SHAPE",
            help="Fix the size of an input that the model leaves free, such as x:1x3x640x640; repeatable.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where to write; MODEL.special.onnx if not given."),
    ] = None,
    quiet: Quiet = None,
) -> None:
    """Write the float model that MODEL is for one value of an input, or for one size, ready for `onnxq quantize`.

    What depends on these alone is computed once. Where a model decides between networks with If, as those that hold one
    for each sampling rate, or a decoder with its cache and one without, the branch that is taken moves into the main
    graph, where layers can be quantized; inputs that only the other one read are gone.
    """
    from onnxq import model as models
    from onnxq import specialize as specializing
    from onnxq.errors import OnnxqError

    if not inputs and not shapes:
        raise OnnxqError("expected --input or --shapes, found neither", hint="such as --input sr=16000")
    destination = output or model.with_name(f"{model.stem}.special.onnx")
    check_destinations([model], destination)
    loaded = models.load(model)
    values = specializing.parse_values(inputs or ())
    done = specializing.specialize(loaded, values, sizes_of(shapes) or {})
    models.save(loaded, destination)
    if quiet:
        return
    typer.echo(f"{destination}: {models.file_bytes(destination) / 1e6:.1f} MB")
    for value in loaded.graph.inputs:
        typer.echo(f"input: {value.name} {specializing.spell_type(value)}")
    gone = [*values, *done.unread]
    if gone:
        typer.echo(f"no inputs any longer: {', '.join(gone)}")
    if done.inside:
        typer.echo(f"still inside an If or a Loop: {len(done.inside)} layers, first {done.inside[0]}")
