"""Images from a denoiser, beside those of the float one."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.common import (
    Conditions,
    Guidance,
    JsonPath,
    ModelPath,
    Quiet,
    Scheduler,
    Shapes,
    Steps,
    check_destinations,
    progress,
    sizes_of,
    write_json,
    write_report,
)

SHOWN = 64  # samples in a grid
REPORTED_BYTES = 1 << 20  # of pictures in a report; base64 makes a third more of it


def sample(
    model: ModelPath,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PNG|NPZ",
            help="Where the grid of images goes. An .npz takes all samples of MODEL, latents as their decoder reads "
            "them: what to calibrate it on.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FLOAT",
            help="The float denoiser: its images from the same noise stand on the left.",
            show_default=False,
        ),
    ] = None,
    shapes: Shapes = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    conditions: Conditions = None,
    decoder: Annotated[
        Path | None,
        typer.Option(
            metavar="ONNX",
            help="Draws latents: the decoder of the autoencoder. Without it, vae_decoder/model.onnx of the pipeline "
            "that the denoiser lies in.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many samples.")] = 64,
    seed: Annotated[int, typer.Option(help="Sample i starts from noise that depends on the seed and i alone.")] = 0,
    features: Annotated[
        Path | None,
        typer.Option(metavar="ONNX", help="A network that makes feature vectors of images, for the Fréchet distance."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="NPZ", help="`mean` and `covariance` of real images' features, or `images`."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_path: JsonPath = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a self-contained HTML report: samples, error of each step.", show_default=False
        ),
    ] = None,
    quiet: Quiet = None,
) -> None:
    """Sample images from the (quantized) denoiser MODEL, and measure how far they are from the float model's.

    Of a denoiser with one graph for each group of steps, MODEL is the `.groups.json`.

    Per step: SQNR of the prediction on the float model's trajectory. Per trajectory: SQNR of what both arrive at from
    the same noise. Fréchet distances compare only at equal numbers of samples.

    Example: `onnxq sample unet.int8.onnx --against unet.onnx --scheduler scheduler_config.json -o grid.png`
    """
    from onnxq import model as models
    from onnxq.config import make_settings
    from onnxq.diffusion import comparison
    from onnxq.diffusion.denoiser import Runnable
    from onnxq.diffusion.latents import find_decoder
    from onnxq.diffusion.noise_correction import correct_noise
    from onnxq.diffusion.router import Router, read_index
    from onnxq.diffusion.schedule_file import pipeline_folders
    from onnxq.diffusion.source import check_timesteps, open_sampler
    from onnxq.diffusion.trajectory import Sampler
    from onnxq.errors import OnnxqError
    from onnxq.report.pictures import report_pictures, write_grid
    from onnxq.runtime import Session
    from onnxq.writing import write_arrays

    check_destinations([model, against, scheduler, conditions, decoder, features, reference], output, json_path, report)
    if (features is None) != (reference is None):
        raise OnnxqError(
            "expected --features and --reference together, found one of them",
            hint="the first is the network, the second the features of real images",
        )
    settings = make_settings(
        {
            "scheduler": None if scheduler is None else str(scheduler),
            "steps": steps,
            "guidance": guidance,
            "conditions": None if conditions is None else str(conditions),
            "seed": seed,
            "shapes": sizes_of(shapes),
            "device": device,
        }
    )
    index = model if model.suffix == ".json" else None
    first = model if index is None else index.parent / read_index(index)[0]["file"]
    # The schedule lies beside the float model, or in its metadata.
    source = against or first
    stages = progress(quiet)
    sampler, origin = open_sampler(models.load(source), source, settings, samples, stages)
    network = None if features is None or reference is None else comparison.FeatureNetwork(features, reference)
    # What is made for TensorRT is judged literally: onnxruntime's optimiser changes FP8 graphs.
    metadata = models.get_metadata(models.read(first))
    literal = metadata.get("target", "cpu") != "cpu"
    check_timesteps(metadata, sampler.schedule.timesteps)
    # The float model keeps the noise that its sampler means it to have: it gets a sampler of its own.
    own = dataclasses.replace(sampler, schedule=copy.deepcopy(sampler.schedule))
    factors = correct_noise(own, metadata["noise_correction"]) if "noise_correction" in metadata else {}
    judged = (Session if index is None else Router)(model, device=device, optimize=not literal)
    samplers: dict[str, tuple[Sampler, Runnable]] = {"quantized": (own, judged)}
    if against is not None:
        samplers["float"] = (sampler, Session(against, device=device))
    is_grid = output is not None and output.suffix != ".npz"
    around = pipeline_folders(scheduler, source)
    needs_decoder = bool(output or report or network or decoder)
    drawing = find_decoder(decoder, around, sampler, device) if needs_decoder else None
    is_drawn = is_grid or report is not None or network is not None
    shown, keeps_all = min(samples, SHOWN), output is not None and not is_grid
    with stages.stage("sample", "Sampling", samples) as advance:
        used = drawing if is_drawn else None
        found = comparison.sample(samplers, samples, shown, network, advance, used, keeps_all)
    made = found.samples
    if output is not None and is_grid:
        write_grid(output, found.images, found.picture_range)
    elif output is not None and made is not None:
        read = {sampler.denoiser.sample.name: made} if drawing is None else {drawing.spec.name: drawing.scaled(made)}
        write_arrays(output, read)
    numbers = {"model": str(model), "against": None if against is None else str(against), **found.numbers}
    if factors:
        numbers["noise_factors"] = factors
    write_json(json_path, numbers)
    if report is not None:
        pictures = report_pictures(found.images, found.picture_range, REPORTED_BYTES)
        write_report(report, numbers | {"pictures": pictures})
    if quiet:
        return
    typer.echo(f"{samples} samples, {numbers['steps']} steps ({origin})")
    if against is not None:
        ratios = numbers["trajectory_sqnr_db"]
        worst = min(range(len(ratios)), key=lambda step: ratios[step])
        typer.echo(
            f"prediction in each step: {ratios[worst]:.1f} dB at worst (step {worst}), {max(ratios):.1f} at best"
        )
        typer.echo(f"images from the same noise: {numbers['same_seed_image_sqnr_db']:.1f} dB")
    if factors:
        typer.echo(
            f"the sampler's noise is {min(factors.values()):.4f} of its own at least, for what quantization adds"
        )
    for kind in ("float", "quantized"):
        if f"frechet_distance_{kind}" in numbers:
            typer.echo(f"Fréchet distance, {kind}: {numbers[f'frechet_distance_{kind}']:.2f}")
    if output is not None:
        typer.echo(f"{output}: {'float left, quantized right' if against is not None and is_grid else 'the samples'}")
