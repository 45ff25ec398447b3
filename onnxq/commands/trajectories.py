"""Calibration inputs of a denoiser, recorded along its sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.common import (
    Conditions,
    Guidance,
    JsonPath,
    ModelPath,
    Quiet,
    RayAddress,
    Scheduler,
    Shapes,
    Steps,
    WorkerCount,
    check_destinations,
    progress,
    sizes_of,
    write_json,
)


def trajectories(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="NPZ", help="Where to write.", show_default=False)],
    shapes: Shapes = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    conditions: Conditions = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many trajectories.")] = 16,
    select: Annotated[
        str,
        typer.Option(
            help="Which steps are kept. **uniform**: evenly spaced, staggered between trajectories. **all**. **ndtc**: "
            "drawn from a normal distribution around the less noisy part (PTQ4DM)."
        ),
    ] = "uniform",
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Steps kept of each trajectory.", show_default="16, or 1 for ndtc", metavar="N"),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: WorkerCount = None,
    ray: RayAddress = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Record what the denoiser MODEL is given along its sampler: sample, timestep and condition of chosen steps.

    The file feeds `onnxq quantize --data`; an array `step` says which step of the sampler each row is from (0 is the
    noisiest). With guidance both inputs are kept. `quantize` without `--data` does this by itself.

    Example: `onnxq trajectories unet.onnx --scheduler scheduler_config.json -o calibration.npz`
    """
    import time

    from onnxq import model as models
    from onnxq.config import make_settings
    from onnxq.diffusion.selection import select as choose
    from onnxq.diffusion.source import open_sampler
    from onnxq.diffusion.trajectory import record
    from onnxq.parallel import open_workers
    from onnxq.runtime import Session

    check_destinations([model, scheduler, conditions], output, json_path)
    settings = make_settings(
        {
            "scheduler": None if scheduler is None else str(scheduler),
            "steps": steps,
            "guidance": guidance,
            "conditions": None if conditions is None else str(conditions),
            "seed": seed,
            "shapes": sizes_of(shapes),
            "device": device,
            "workers": workers,
            "ray": ray,
        }
    )
    shown = progress(quiet)
    sampler, origin = open_sampler(models.load(model), model, settings, samples, shown)
    times = sampler.schedule.timesteps
    chosen = choose(select, samples, times, keep or (1 if select == "ndtc" else min(16, len(times))), seed)
    started = time.perf_counter()
    with (
        shown.stage("trajectories", "Sampling trajectories", samples * len(times), "steps") as advance,
        open_workers(settings.workers, settings.ray) as sharing,
    ):
        session = Session(model, device=device)
        shared = None if sharing is None else sharing.share_file(model, device)
        count = record(sampler, session, chosen, output, advance, sharing, shared)
    numbers = {
        "output": str(output),
        "inputs": count,
        "trajectories": samples,
        "steps": len(times),
        "inputs_by_step": [int(kept) * sampler.rows(step) for step, kept in enumerate(chosen.sum(axis=0))],
        "seconds": time.perf_counter() - started,
    }
    write_json(json_path, numbers)
    if not quiet:
        typer.echo(f"{output}: {count} inputs from {samples} trajectories of {len(times)} steps ({origin})")
