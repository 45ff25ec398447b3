"""What is installed."""

from __future__ import annotations

import typer

from onnxq.commands.common import CHECK_FAILED, JsonPath, write_json


def doctor(json_path: JsonPath = None) -> None:
    """Say what is installed, what is missing for which command and how to get it, and which GPU there is.

    Exit code 1 if something that is installed cannot work.
    """
    import onnxq
    from onnxq import doctor as checks

    found = checks.packages()
    capability, has_cuda = checks.gpu()
    machine = checks.machine()
    write_json(
        json_path,
        {
            "onnxq": onnxq.__version__,
            "machine": machine,
            "packages": {item.need.module: item.version for item in found},
            "problems": [item.problem for item in found if item.problem],
            "gpu_sm": capability,
            "cuda_libraries": has_cuda,
        },
    )
    typer.echo(f"onnxq {onnxq.__version__}, " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    for item in found:
        state = item.version or f"not installed: {item.need.install}"
        typer.echo(f"  {item.need.module:13} {state}  ({item.need.serves})")
        if item.problem:
            typer.echo(f"  {'':13} problem: {item.problem}")
    if capability is None:
        typer.echo("  GPU           none seen: everything runs on the CPU; `build --sm 89` builds for one elsewhere")
    else:
        typer.echo(f"  GPU           SM {capability}, CUDA libraries {'found' if has_cuda else 'not found'}")
    if any(item.problem for item in found):
        raise typer.Exit(CHECK_FAILED)
