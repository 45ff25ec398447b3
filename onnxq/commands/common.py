"""What commands share: their common options, progress, and how numbers are written and shown."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnxq.config import Settings
    from onnxq.progress import Progress

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model.", show_default=False)]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the numbers as JSON; `-`: to standard output.", show_default=False
    ),
]
ReportPath = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write a self-contained HTML report.", show_default=False),
]
Quiet = Annotated[
    bool | None,
    typer.Option(
        "--quiet/--verbose",
        "-q/-v",
        help="Print nothing but errors, or how long every stage takes.",
        show_default=False,
    ),
]
DataPath = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="An .npz keyed by input name (rows along the first axis), a folder of such files, a folder of images, "
        "or a .txt file with --tokenizer. "
        "100 to 500 samples of what the model will see are plenty.",
        show_default=False,
    ),
]

Scheduler = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="For denoisers: diffusers' scheduler_config.json, the folder of a pipeline, or the README's flow "
        "matching. Without it: the model's metadata, else MODEL.scheduler.json beside it, else the pipeline that the "
        "model lies in, else the usual one is assumed, which is said.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="For denoisers: steps of the sampler.", show_default="50; 4 of LCM and TCD")
]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="W",
        help="For denoisers: weight of guidance. Networks that read it (FLUX dev, LCM) are told it and run once.",
        show_default="1: none; where it is read, 3.5, or 8.5 as waves",
    ),
]
Conditions = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="For denoisers: a .txt with a prompt a line, encoded by the text encoders of the pipeline that the model "
        "lies in; or an .npz of rows for inputs that are not class labels (embeddings), keyed by input name. There, "
        "NAME.unconditional is one row for guidance, SAMPLE.behind (or .before) are channels beside the noisy ones, "
        "and prompts are texts for the inputs without rows. Of more rows or prompts than samples, so many are taken, "
        "evenly spaced.",
        show_default=False,
    ),
]

CustomOps = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="A library of custom ops that onnxruntime is told of; repeatable. Without one, what depends on such ops "
        "(plugins of TensorRT, say) stays as it is and is not run.",
        show_default=False,
    ),
]
WorkerCount = Annotated[
    int | None,
    typer.Option("--workers", help="Processes that share the work; the result is the same.", show_default="1"),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Share the work over a Ray cluster: HOST:PORT, auto, or local.",
        show_default=False,
    ),
]

Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="For text files as --data: a tokenizer.json, the folder of a tokenizer (onnxq[prompts]), or a .bin of "
        "llama2.c.",
        show_default=False,
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(help="For text files: tokens in a sample, where the model does not fix it.", show_default="256"),
]

Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shapes",
        metavar="NAME:SHAPE",
        help="Size of an input that the model leaves free, such as x:1x3x640x640, for what is made and for images; "
        "repeatable. The result keeps its free sizes.",
        show_default=False,
    ),
]

StatisticsPath = Annotated[
    Path | None,
    typer.Option(
        "--statistics",
        metavar="NPZ",
        help="Statistics of the model's data, for a model without BatchNormalization (`onnxq statistics` records them "
        "where the data is).",
        show_default=False,
    ),
]


def sizes_of(shapes: Sequence[str] | None) -> dict[str, tuple[int, ...]] | None:
    """What ``--shapes`` says, as a setting."""
    from onnxq.calibration.sizes import parse_shapes

    return parse_shapes(shapes) if shapes else None


def data_settings(
    config: Path | None, shapes: Sequence[str] | None, tokenizer: Path | None, sequence_length: int | None
) -> Settings:
    """What commands that only read data are told of it; options win over the file."""
    from onnxq.config import make_settings, read_yaml, with_text

    entries = (read_yaml(config) if config else {}) | ({"shapes": sizes_of(shapes)} if shapes else {})
    return make_settings(with_text(entries, tokenizer, sequence_length))


STDOUT = Path("-")  # what --json takes for standard output


def progress(quiet: bool | None) -> Progress:
    """What is being done, unless nothing is to be said; every stage of it with ``--verbose`` (``False``)."""
    from onnxq.progress import Progress

    return Progress(enabled=not quiet, verbose=quiet is False)


def check_destinations(inputs: Sequence[Path | None], *outputs: Path | None) -> None:
    """Fail before the work rather than after it, and never write over what is read.

    Args:
        inputs: Files that the command reads.
        *outputs: Files that it will write.
    """
    from onnxq.errors import OnnxqError
    from onnxq.writing import check_writable

    given = [path for path in outputs if path is not None and path != STDOUT]
    for index, path in enumerate(given):
        check_writable(path)
        if any(other is not None and path.exists() and other.exists() and path.samefile(other) for other in inputs):
            raise OnnxqError(
                f"expected an output beside what is read, found one of the inputs: {path}", hint="choose another name"
            )
        if path.resolve() in [other.resolve() for other in given[:index]]:
            raise OnnxqError(
                f"expected a file for each output, found {path} twice", hint="choose another name for one of them"
            )


def write_json(path: Path | None, numbers: Mapping[str, Any]) -> None:
    """Write the numbers where ``--json`` says, if it does."""
    if path is None:
        return
    import json

    from onnxq.report.metrics import json_safe
    from onnxq.writing import write_text

    text = json.dumps(json_safe(numbers), indent=2) + "\n"
    if path != STDOUT:
        write_text(path, text)
        return
    sys.stdout.write(text)
    sys.stdout.flush()
    sys.stdout = sys.stderr  # standard output is the JSON alone; what else is said goes here


def write_report(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write the HTML report, with the command and the versions that made it."""
    import platform
    from importlib import metadata

    import onnxq
    from onnxq.report.html import render_html
    from onnxq.report.metrics import json_safe
    from onnxq.writing import write_text

    versions = {"onnxq": onnxq.__version__, "python": platform.python_version()}
    for package in ("onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    command = shlex.join(["onnxq", *sys.argv[1:]])
    write_text(path, render_html(json_safe({**numbers, "command": command, "versions": versions})))


def show(numbers: Mapping[str, Any], quiet: bool | None) -> None:
    """Print the closing table on a terminal, plain lines elsewhere."""
    if quiet:
        return
    from onnxq.report import table
    from onnxq.report.metrics import json_safe

    numbers = json_safe(numbers)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table.closing_table(numbers))
    else:
        for line in table.plain_lines(numbers):
            typer.echo(line)
