"""The command line. Imports stay inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxq.progress import Progress

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="onnxq",
    help="Quantize ONNX models for TensorRT (INT8, FP8, INT4 weights) and onnxruntime, on the graph alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model.", show_default=False)]
JsonPath = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers as JSON.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
DataPath = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="An .npz keyed by input name (rows along the first axis), a folder of such files, or a folder of images. "
        "100 to 500 samples of what the model will see are plenty.",
        show_default=False,
    ),
]


@app.command()
def quantize(
    model: ModelPath,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where to write; MODEL.int8.onnx if not given."),
    ] = None,
    data: DataPath = None,
    target: Annotated[
        str | None,
        typer.Option(
            show_default="tensorrt",
            help="**tensorrt**: symmetric int8 (or fp8) at the inputs of Conv, Gemm and MatMul, as its fusions want. "
            "**cpu**: uint8 activations around every op with an integer kernel in onnxruntime.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(show_default="int8", help="How scales and codes are found; `onnxq recipes` lists them."),
    ] = None,
    knobs: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the recipe; may be repeated.", show_default=False),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="int8, int4, int4:128 (blocks), int6, fp8, float, …", show_default=False),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="int8, uint8, fp8, int6, int16, float, …", show_default=False),
    ] = None,
    first_last: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="The first and the last layers get this format instead: int8 beside 4-bit ones, or float.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="Use so many samples of the data (all of them if not given).")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Node names or ops to keep in float (`*` matches anything); repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default="0", help="The same seed gives the same bytes.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            show_default="default",
            help="quick, default or paper: how many steps recipes that learn take (200, 1000 or 20000 for each block).",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(show_default="cpu", help="Where calibration and learning run: cpu or cuda.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings as YAML, under the names of these options; options win."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a self-contained HTML report.", show_default=False)
    ] = None,
    json_path: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL and check the result against it.

    The float model runs once over the data; ranges of activations and weights become scales; weights are stored as
    integers; the result is linted for its target and run in onnxruntime beside the float model before it is written.

    Example: `onnxq quantize model.onnx --data calibration.npz --target cpu -o model.int8.onnx`
    """
    from onnxq import pipeline
    from onnxq.config import make_settings, parse_assignments, read_yaml

    given = {
        "target": target,
        "recipe": recipe,
        "weights": weights,
        "activations": activations,
        "first_last": first_last,
        "samples": samples,
        "exclude": tuple(exclude) if exclude else None,
        "seed": seed,
        "budget": budget,
        "device": device,
        "knobs": parse_assignments(knobs) if knobs else None,
    }
    entries = read_yaml(config) if config else {}
    entries |= {key: value for key, value in given.items() if value is not None}
    settings = make_settings(entries)
    destination = output or model.with_name(f"{model.stem}.{_suffix(settings)}.onnx")
    _check_destinations(model, destination, json_path, report)
    result = pipeline.quantize(model, data, output=destination, settings=settings, progress=_progress(quiet))
    numbers = result.numbers
    _write_json(json_path, numbers)
    if report is not None:
        _write_report(report, numbers | {"tensors": result.tensors})
    _show(numbers, quiet)


@app.command()
def compare(
    float_model: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model.", show_default=False)],
    quantized_model: Annotated[
        Path, typer.Argument(metavar="QUANTIZED", help="The quantized model.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="PATH", help="As for quantize; an array `labels` gives accuracy.", show_default=False
        ),
    ],
    samples: Annotated[int | None, typer.Option("--samples", "-n", help="Use so many samples.")] = None,
    layers: Annotated[bool, typer.Option(help="Measure the error of each layer too.")] = True,
    latency: Annotated[bool, typer.Option(help="Time both models, batch 1, interleaved.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime while timing.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a self-contained HTML report.", show_default=False)
    ] = None,
    json_path: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """Measure a quantized model against its float one: SQNR, accuracy, agreement, worst layers, latency, size.

    Both run in onnxruntime on the same samples. SQNR is 10·log10 of signal over error power of the outputs: 20 dB is
    an error of a tenth, 40 dB of a hundredth. Any two models with the same inputs and outputs can be compared.
    """
    from onnxq import comparison

    _check_destinations(None, None, json_path, report)
    progress = _progress(quiet)
    with progress.stage("compare", "Comparing"):
        found = comparison.compare(
            float_model,
            quantized_model,
            data,
            samples=samples,
            device=device,
            layers=layers,
            latency=latency,
            threads=threads,
        )
    numbers = {"model": str(float_model), "output": str(quantized_model)} | found.to_json()
    _write_json(json_path, numbers)
    if report is not None:
        _write_report(report, numbers)
    _show(numbers, quiet)


@app.command()
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
    _write_json(
        json_path, {"errors": [item.to_json() for item in errors], "warnings": [item.to_json() for item in warnings]}
    )
    if not quiet:
        for item in errors + warnings:
            typer.echo(f"{item.severity} {item.rule} {item.node}: {item.message}")
        typer.echo(f"{len(errors)} errors, {len(warnings)} warnings for {target}")
    if errors:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def build(
    model: ModelPath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ENGINE", help="Where to write; MODEL.engine if not given.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="tensorrt, tensorrt-rtx, or auto: what is installed.")] = "auto",
    sm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM", help="Compute capability, such as 89; repeatable. TensorRT-RTX needs no GPU for it."
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MIN[,OPT,MAX]",
            help="Sizes of an input with free dimensions, such as x:1x3x224x224,8x3x224x224,16x3x224x224; repeatable.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds before the compiler is stopped.")] = 1800.0,
    json_path: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """Compile MODEL into an engine, and prove which nodes run in INT8, FP8 or INT4 and which stayed float.

    The compiler runs in a process of its own, because a graph that it does not expect can crash it. The proof is
    read from the compiled layers. Exit code 1 if a node with Q/DQ was compiled as float.
    """
    from onnxq import engines

    destination = output or model.with_suffix(".engine")
    _check_destinations(model, destination, json_path, None)
    profiles: dict[str, Any] = {}
    for text in shapes or ():
        profiles |= engines.parse_shapes(text)
    progress = _progress(quiet)
    with progress.stage("build", "Compiling"):
        built = engines.build(
            model, destination, runtime=runtime, sm=sm or None, shapes=profiles or None, timeout_seconds=timeout
        )
    numbers = built.to_json()
    _write_json(json_path, numbers)
    if not quiet:
        typer.echo(
            f"{destination}: {built.engine_bytes / 1e6:.1f} MB, {built.runtime} {built.runtime_version}, "
            f"SM {', '.join(built.sm) or 'of this GPU'}, {built.seconds:.1f} s"
        )
        typer.echo(
            f"low precision: {len(built.low_precision_nodes)} nodes; weights only: {len(built.weight_only_nodes)}; "
            f"float: {len(built.float_nodes)}"
        )
        for name in built.promised_but_float:
            typer.echo(f"promised but float: {name}")
    if built.promised_but_float:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="One recipe, in full.", show_default=False)] = None,
    json_path: JsonPath = None,
) -> None:
    """List the recipes; with a NAME, its paper, its algorithm and its knobs with their defaults."""
    import dataclasses
    import inspect

    from onnxq import recipes as registry

    if name is None:
        _write_json(json_path, {key: entry.line for key, entry in registry.RECIPES.items()})
        for key, entry in registry.RECIPES.items():
            formats = f" [{entry.weights or 'any'}/{entry.activations or 'any'}]"
            typer.echo(f"{key:14} {entry.line}{formats if entry.weights or entry.activations else ''}")
        typer.echo("In brackets: the formats of weights and activations that a recipe brings.")
        return
    entry = registry.get(name)
    recipe: Any = entry.load()
    knobs = {field.name: entry.knobs.get(field.name, field.default) for field in dataclasses.fields(recipe)}
    formats_given = {"weights": entry.weights, "activations": entry.activations}
    _write_json(json_path, {"recipe": registry.canonical(name), **formats_given, "knobs": knobs})
    typer.echo(inspect.getdoc(recipe) or "")
    typer.echo("\nFormats (--weights, --activations):")
    for what, given in formats_given.items():
        typer.echo(f"  {what} = {given or 'the default of the target'}")
    typer.echo("\nKnobs (--set name=value):")
    for key, value in knobs.items():
        typer.echo(f"  {key} = {value!r}")


@app.command()
def view(
    model: ModelPath,
    port: Annotated[int, typer.Option(help="Where to serve on this machine.")] = 8080,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Look at MODEL's graph in Netron, offline."""
    from onnxq.errors import OnnxqError

    if not model.is_file():
        raise OnnxqError(f"expected an ONNX file at {model}, found nothing", hint="check the path")
    try:
        import netron
    except ImportError as error:
        raise OnnxqError("expected Netron, found it not installed", hint="pip install 'onnxq[view]'") from error
    address = netron.start(str(model), address=("localhost", port), browse=browser)
    typer.echo(f"serving {model} at http://{address[0]}:{address[1]} (Ctrl-C ends it)")
    netron.wait()


def _version(show: bool) -> None:
    if show:
        import onnxq

        typer.echo(f"onnxq {onnxq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _suffix(settings: Any) -> str:
    """The formats that stand in the name of the result: what the user or the recipe says, or int8."""
    from onnxq import recipes as registry

    entry = registry.get(settings.recipe)
    for spec in (settings.weights or entry.weights, settings.activations or entry.activations):
        if spec and spec != "float":
            return str(spec).replace(":", "_")
    return "int8"


def _progress(quiet: bool) -> Progress:
    from onnxq.progress import Progress

    return Progress(enabled=not quiet)


def _check_destinations(model: Path | None, *outputs: Path | None) -> None:
    """Fail before the work rather than after it."""
    from onnxq import model as models
    from onnxq.errors import OnnxqError

    for path in outputs:
        if path is None:
            continue
        models.check_writable(path)
        if model is not None and path.exists() and model.exists() and path.samefile(model):
            raise OnnxqError(f"expected an output beside the model, found the model itself: {path}", hint="choose -o")


def _write_json(path: Path | None, numbers: Mapping[str, Any]) -> None:
    if path is not None:
        import json

        from onnxq import model as models
        from onnxq.report.metrics import json_safe

        models.write_text(path, json.dumps(json_safe(numbers), indent=2) + "\n")


def _write_report(path: Path, numbers: Mapping[str, Any]) -> None:
    import platform
    from importlib import metadata

    import onnxq
    from onnxq import model as models
    from onnxq.report.html import render_html
    from onnxq.report.metrics import json_safe

    versions = {"onnxq": onnxq.__version__, "python": platform.python_version()}
    for package in ("onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    command = shlex.join(["onnxq", *sys.argv[1:]])
    models.write_text(path, render_html(json_safe({**numbers, "command": command, "versions": versions})))


def _show(numbers: Mapping[str, Any], quiet: bool) -> None:
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


def main() -> None:
    """Entry point: two lines and an exit code instead of a traceback."""
    from onnxq.errors import CheckError, OnnxqError

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app(standalone_mode=True)
    except OnnxqError as error:
        _fail(error.message, error.hint, CHECK_FAILED if isinstance(error, CheckError) else BAD_INPUT)
    except _Interrupted:
        _fail(
            "interrupted",
            "no output was written; the same command goes on after the last block that a recipe has learned",
            INTERRUPTED,
        )
    except MemoryError:
        _fail("out of memory", "use fewer or smaller samples, or a machine with more memory", BAD_INPUT)
    except OSError as error:
        _fail(
            f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), "check the path and the disk", BAD_INPUT
        )


class _Interrupted(BaseException):
    """Ctrl-C or a polite kill. Not KeyboardInterrupt, which the command-line library swallows with a message."""


def _interrupt(number: int, frame: object) -> None:
    raise _Interrupted


def _fail(message: str, hint: str, code: int) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    if hint:
        sys.stderr.write(f"  tip: {' '.join(hint.split())}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
