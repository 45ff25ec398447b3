"""Two models on the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.common import (
    CustomOps,
    JsonPath,
    Quiet,
    ReportPath,
    SequenceLength,
    Shapes,
    Tokenizer,
    check_destinations,
    data_settings,
    progress,
    show,
    write_json,
    write_report,
)


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
    shapes: Shapes = None,
    layers: Annotated[bool, typer.Option(help="Measure the error of each layer too.")] = True,
    latency: Annotated[bool, typer.Option(help="Time both models, batch 1, interleaved.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime while timing.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    custom_ops: CustomOps = None,
    tokenizer: Tokenizer = None,
    sequence_length: SequenceLength = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings as YAML, for `preprocess` of image folders; as for quantize."),
    ] = None,
    report: ReportPath = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Measure a quantized model against its float one: SQNR, accuracy, agreement, worst layers, latency, size.

    Both run in onnxruntime on the same samples. SQNR is 10·log10 of signal over error power of the outputs: 20 dB is
    an error of a tenth, 40 dB of a hundredth; several outputs count alike, each in its own size. Any two models with
    the same inputs and outputs can be compared.

    Denoisers are judged step by step, on data that `onnxq trajectories` recorded, or timestep by timestep on any other.
    Of a denoiser with one graph for each group of steps, QUANTIZED is the `.groups.json`.
    """
    from onnxq import comparison
    from onnxq.calibration.data import Preprocessing
    from onnxq.custom_ops import use
    from onnxq.report.sections import groups_table

    use(custom_ops or ())
    settings = data_settings(config, shapes, tokenizer, sequence_length)
    check_destinations([float_model, quantized_model, data, tokenizer, config], json_path, report)
    shown = progress(quiet)
    with shown.stage("compare", "Comparing"):
        found = comparison.compare(
            float_model,
            quantized_model,
            data,
            preprocessing=Preprocessing(**settings.preprocess.model_dump()),
            samples=samples,
            shapes=settings.shapes,
            device=device,
            layers=layers,
            latency=latency,
            threads=threads,
        )
    numbers = {"model": str(float_model), "output": str(quantized_model)} | found.to_json()
    write_json(json_path, numbers)
    if report is not None:
        tables = [groups_table(found.groups)] if found.groups else []
        write_report(report, numbers | {"tables": tables})
    show(numbers, quiet)
