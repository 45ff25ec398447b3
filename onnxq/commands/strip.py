"""Q/DQ out of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.common import ModelPath, Quiet, check_destinations


def strip(
    model: ModelPath,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where to write; MODEL.float.onnx if not given."),
    ] = None,
    quiet: Quiet = None,
) -> None:
    """Take QuantizeLinear and DequantizeLinear out of MODEL, of whichever tool; stored codes become floats.

    Integer operators become float ones too: QLinearConv and its like, MatMulInteger, MatMulNBits, GatherBlockQuantized.
    The weights are those of the quantized model, unless it kept the float ones behind QuantizeLinear.
    """
    from onnxq import model as models
    from onnxq import retarget

    destination = output or model.with_name(f"{model.stem}.float.onnx")
    check_destinations([model], destination)
    models.save(retarget.strip(model), destination)
    if not quiet:
        typer.echo(f"{destination}: {models.file_bytes(destination) / 1e6:.1f} MB")
