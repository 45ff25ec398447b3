"""The graph in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxq.commands.common import ModelPath


def view(
    model: ModelPath,
    port: Annotated[int, typer.Option(help="Where to serve on this machine.")] = 8080,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Look at MODEL's graph in Netron, offline."""
    from onnxq.diffusion.router import files_of
    from onnxq.diffusion.subgraphs import is_index
    from onnxq.errors import OnnxqError

    if not model.is_file():
        raise OnnxqError(f"expected an ONNX file at {model}, found nothing", hint="check the path")
    if is_index(model):
        names = ", ".join(file.name for file in files_of(model))
        raise OnnxqError(f"expected one graph to look at, found an index of {names}", hint="name one of them")
    try:
        import netron
    except ImportError as error:
        raise OnnxqError("expected Netron, found it not installed", hint="pip install 'onnxq[view]'") from error
    address = netron.start(str(model), address=("localhost", port), browse=browser)
    typer.echo(f"serving {model} at http://{address[0]}:{address[1]} (Ctrl-C ends it)")
    netron.wait()
