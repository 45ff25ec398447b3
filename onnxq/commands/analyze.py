"""What each layer would cost."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxq.commands.common import (
    Conditions,
    CustomOps,
    DataPath,
    Guidance,
    JsonPath,
    ModelPath,
    Quiet,
    RayAddress,
    ReportPath,
    Scheduler,
    Shapes,
    Steps,
    WorkerCount,
    check_destinations,
    progress,
    sizes_of,
    write_json,
    write_report,
)

SHOWN = 12


def analyze(
    model: ModelPath,
    data: DataPath = None,
    target: Annotated[str, typer.Option(help="tensorrt or cpu.")] = "tensorrt",
    weights: Annotated[str | None, typer.Option(metavar="FORMAT", help="As for quantize.", show_default=False)] = None,
    activations: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="As for quantize.", show_default=False)
    ] = None,
    narrow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT", help="Try each weight alone in this format too; repeatable.", show_default="int4"
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", "-n", help="Use so many samples of the data.")] = None,
    shapes: Shapes = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    conditions: Conditions = None,
    device: Annotated[str | None, typer.Option(show_default="cpu", help="cpu or cuda.")] = None,
    custom_ops: CustomOps = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    report: ReportPath = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Measure what each layer of a float MODEL costs when it alone is quantized, and suggest what to leave in float.

    SQNR is that of the model's output with one layer quantized; for a denoiser also in the sampler step in which the
    layer costs most. Then the most sensitive layers are left out one after the other. Nothing is written.
    """
    from onnxq import analysis
    from onnxq.config import make_settings
    from onnxq.report.sections import sensitivity_tables
    from onnxq.report.table import decibels

    check_destinations([model, data, scheduler, conditions], json_path, report)
    settings = make_settings(
        {
            "target": target,
            "weights": weights,
            "activations": activations,
            "samples": samples,
            "shapes": sizes_of(shapes),
            "scheduler": None if scheduler is None else str(scheduler),
            "steps": steps,
            "guidance": guidance,
            "conditions": None if conditions is None else str(conditions),
            "device": device,
            "custom_ops": tuple(map(str, custom_ops)) if custom_ops else None,
            "workers": workers,
            "ray": ray,
        }
    )
    found = analysis.analyze(
        model, data, settings=settings, narrow=narrow if narrow is not None else ["int4"], progress=progress(quiet)
    )
    write_json(json_path, found.to_json())
    if report is not None:
        numbers = {"model": str(model), "samples": found.samples, "warnings": found.warnings}
        write_report(report, numbers | {"next_steps": found.suggestions, "tables": sensitivity_tables(found)})
    if quiet:
        return
    typer.echo(
        f"{model}, {found.target}, {found.samples} samples: {len(found.layers)} layers, the most sensitive first"
    )
    for layer in found.layers[:SHOWN]:
        text = f"{layer.name} ({layer.op} {'×'.join(map(str, layer.weight_shape))}): {decibels(layer.sqnr_db)} alone"
        if layer.worst_step is not None:
            text += f", {decibels(layer.worst_step_db)} in step {layer.worst_step}"
        for name, ratio in layer.narrow_db.items():
            text += f", weight in {name} {decibels(ratio)}"
        typer.echo(f"  {text}; input {layer.low:.3g} … {layer.high:.3g}")
    if len(found.layers) > SHOWN:
        typer.echo(f"  … and {len(found.layers) - SHOWN} more (--json has them all)")
    curve = ", ".join(f"{count}: {ratio:.1f}" for count, ratio in enumerate(found.cumulative))
    typer.echo(f"dB with so many of them in float: {curve}")
    for name, reasons in found.left_float.items():
        counted = {reason: list(reasons.values()).count(reason) for reason in dict.fromkeys(reasons.values())}
        listed = "; ".join(f"{count} because {reason}" for reason, count in counted.items())
        typer.echo(f"{name} leaves {len(reasons)} layers in float{': ' + listed if listed else ''}")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}")
    for suggestion in found.suggestions:
        typer.echo(f"try: {suggestion}")
