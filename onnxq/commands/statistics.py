"""A side-car file with the statistics of a model's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.common import (
    CustomOps,
    JsonPath,
    ModelPath,
    Quiet,
    SequenceLength,
    Shapes,
    Tokenizer,
    check_destinations,
    data_settings,
    progress,
    write_json,
)


def statistics(
    model: ModelPath,
    data: Annotated[
        Path, typer.Option("--data", metavar="PATH", help="Samples, as for `quantize --data`.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="NPZ", help="Where to write.", show_default=False)],
    samples: Annotated[int | None, typer.Option("--samples", "-n", min=1, help="Use so many samples.")] = None,
    shapes: Shapes = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with the preprocessing of images, as for `quantize`.")
    ] = None,
    tokenizer: Tokenizer = None,
    sequence_length: SequenceLength = None,
    custom_ops: CustomOps = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Record the mean and the deviation of every channel inside MODEL, for who quantizes it without the data.

    Models whose BatchNormalization was folded away remember nothing of their data. This file says it in its place and
    holds no sample: `onnxq quantize --statistics FILE` makes calibration inputs from it.

    Example: `onnxq statistics model.onnx --data calibration.npz -o model.statistics.npz`
    """
    import time

    from onnxq import model as models
    from onnxq.calibration import side_car, sizes
    from onnxq.calibration.data import Preprocessing, input_specs, open_source
    from onnxq.custom_ops import use
    from onnxq.writing import write_arrays

    check_destinations([model, data, tokenizer, config], output, json_path)
    use(custom_ops or ())
    settings = data_settings(config, shapes, tokenizer, sequence_length)
    loaded = models.load(model)
    sizes.choose(loaded, settings.shapes)
    source = open_source(data, input_specs(loaded), Preprocessing(**settings.preprocess.model_dump()))
    total = min(len(source), samples or len(source))
    started = time.perf_counter()
    with progress(quiet).stage("record", "Recording statistics", total) as advance:
        arrays = side_car.record(loaded, source, samples=samples, on_batch=advance)
    write_arrays(output, arrays)
    numbers = {
        "output": str(output),
        "samples": total,
        "values": len(arrays) // 2,
        "seconds": time.perf_counter() - started,
    }
    write_json(json_path, numbers)
    if not quiet:
        typer.echo(f"{output}: statistics of {len(arrays) // 2} values over {total} samples")
