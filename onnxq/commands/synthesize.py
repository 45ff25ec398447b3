"""Calibration inputs made from the model itself."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxq.commands.common import (
    JsonPath,
    ModelPath,
    Quiet,
    ReportPath,
    Shapes,
    StatisticsPath,
    check_destinations,
    progress,
    sizes_of,
    write_json,
    write_report,
)

if TYPE_CHECKING:
    from onnxq.synthesis.synthesize import Synthesised

IMAGE_RANK = 4
PICTURE_BYTES = 1 << 20  # in a report; base64 makes a third more of it


def synthesize(
    model: ModelPath,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="NPZ", help="Where to write.", show_default=False)
    ] = Path("synthesised.npz"),
    method: Annotated[
        str,
        typer.Option(
            help="**pixels**: a batch whose statistics match BatchNormalization's as a whole. **zeroq**: every sample "
            "by itself. **dsg**: the same with slack, and a layer of its own for each sample. **genie**: from a "
            "generator learned for each batch, with swing convolutions. **hast**: images of drawn classes, hard ones "
            "weighing more. **texq**: images of drawn classes with rich textures. **psaq-vit**: images whose patches "
            "a transformer tells apart; needs no BatchNormalization."
        ),
    ] = "pixels",
    statistics: StatisticsPath = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", min=1, help="How many; 64, 32 large ones, 4 to 32 above 224².")
    ] = None,
    budget: Annotated[str, typer.Option(help="quick, default or paper: how many steps each batch takes.")] = "default",
    steps: Annotated[int, typer.Option(min=0, help="Steps for each batch instead.")] = 0,
    shapes: Shapes = None,
    grid: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the images too.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same inputs.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    report: ReportPath = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Make calibration inputs for MODEL from the statistics that its BatchNormalization nodes remember.

    No data is needed. The file is what `quantize --data` takes; it says that its inputs were made, and what range rule
    suits them. An interrupted run goes on with its next batch.
    """
    import numpy as np

    from onnxq import model as models
    from onnxq.calibration import side_car, sizes
    from onnxq.calibration.data import RANGE_RULE_KEY, input_specs
    from onnxq.config import make_settings
    from onnxq.inputs import default_count
    from onnxq.pipeline import checkpoint_folder
    from onnxq.report.pictures import write_grid
    from onnxq.synthesis.methods import get
    from onnxq.writing import write_arrays

    check_destinations([model, statistics], output, grid, report, json_path)
    settings = make_settings({"budget": budget, "seed": seed, "device": device, "shapes": sizes_of(shapes)})
    get(method)
    loaded = models.load(model)
    sizes.choose(loaded, settings.shapes)
    if statistics is not None:
        side_car.attach(loaded, statistics)
    started = time.perf_counter()
    made = _load()(
        loaded,
        method,
        count=samples or default_count(input_specs(loaded)),
        budget=settings.budget,
        steps=steps,
        seed=seed,
        device=device,
        checkpoint=checkpoint_folder(output),
        progress=progress(quiet),
    )
    write_arrays(output, {**made.arrays(), RANGE_RULE_KEY: np.array(made.observer)})
    shutil.rmtree(checkpoint_folder(output), ignore_errors=True)
    low, high = np.percentile(made.inputs, [1, 99]).tolist()
    if grid is not None:
        write_grid(grid, {"made": made.inputs}, (low, high))
    numbers = {
        "output": str(output),
        "samples": len(made),
        "method": method,
        "distance": made.distance,
        "noise_distance": made.noise_distance,
        "entropy": made.entropy,
        "noise_entropy": made.noise_entropy,
        "losses": made.losses,
        "seconds": time.perf_counter() - started,
    }
    write_json(json_path, numbers)
    if report is not None:
        from onnxq.report.pictures import small_grid_png
        from onnxq.report.sections import loss_table

        pictures = []
        if made.inputs.ndim == IMAGE_RANK:
            png = small_grid_png({"made": made.inputs}, (low, high), PICTURE_BYTES)
            pictures = [{"png": png, "caption": f"{method}: {made.description}"}]
        shown = {"model": str(model), "output": str(output), "samples": len(made), "pictures": pictures}
        write_report(report, shown | {"tables": [loss_table(made.losses)]})
    if not quiet:
        typer.echo(f"{output}: {len(made)} inputs, {made.description}")


def _load() -> Callable[..., Synthesised]:
    from onnxq.errors import OnnxqError

    try:
        from onnxq.synthesis.synthesize import synthesise
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise OnnxqError(
            "expected torch, with which inputs are made, found it not installed", hint="pip install 'onnxq[learn]'"
        ) from error
    return synthesise
