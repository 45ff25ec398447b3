"""The main job from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    SequenceLength,
    Shapes,
    StatisticsPath,
    Steps,
    Tokenizer,
    WorkerCount,
    check_destinations,
    progress,
    show,
    sizes_of,
    write_json,
    write_report,
)


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
        typer.Option(
            metavar="FORMAT", help="int8, int4, int4:128 (blocks), int6, fp8, fp4, float, …", show_default=False
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="int8, uint8, fp8, int6, int16, float, dynamic (ranges found while the model runs, for cpu), …",
            show_default=False,
        ),
    ] = None,
    first_last: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="The first and the last layers get this format instead: int8 beside 4-bit ones, or float.",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Tables that tokens are looked up in: float, int8 with a scale for each row, or int4 with one for "
            "each 32 numbers (--target cpu).",
            show_default="int8 on a cpu",
        ),
    ] = None,
    packed_blocks: Annotated[
        bool,
        typer.Option(
            "--packed-blocks",
            help="Write products with weights in blocks as MatMulNBits, onnxruntime's own op, which browsers (WebGPU) "
            "and onnxruntime-genai read (--target cpu).",
        ),
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(
            help="For older runtimes: the opset of the result at most, from 13 on. Ops that came later are written as "
            "those before them.",
            show_default="20, or what the codes need",
        ),
    ] = None,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate",
            help="Transformers: turn the residual stream and the heads' values so that no channel is an outlier, "
            "before any recipe. Adds no node; a stream that cannot be turned is refused with the node.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="What a float32 model computes in between its codes: float32, or for TensorRT float16 or "
            "bfloat16 (inputs and outputs stay float32).",
            show_default="float32",
        ),
    ] = None,
    low_rank: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            help="Beside every MatMul and Gemm with quantized weights, a thin product of this rank (16 or 32, say) "
            "that takes back part of the error: two small products more. For weights of 4 bits and fewer.",
            show_default="none",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="Use so many samples of the data (all of them if not given).")
    ] = None,
    shapes: Shapes = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Node names or ops to keep in float (`*` matches anything); repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Layers to quantize, by node name or op: all others stay float; repeatable."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default="0", help="The same seed gives the same bytes.")] = None,
    synthesis: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Without --data: how inputs are made from the model's BatchNormalization (`onnxq synthesize --help`), "
            "or noise.",
            show_default="auto",
        ),
    ] = None,
    statistics: StatisticsPath = None,
    budget: Annotated[
        str | None,
        typer.Option(
            show_default="default",
            help="quick, default or paper: how many steps recipes that learn take (200, 1000 or 20000 for each block).",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Find the narrowest widths that lose at most so many points of top-1 on labelled data, or change so "
            "many percent of the answers where there are no labels (recipe `mixed`).",
            show_default=False,
        ),
    ] = None,
    budget_mib: Annotated[
        float | None,
        typer.Option(
            metavar="MIB",
            help="Find the widths that lose least in a file whose weights take at most so much (recipe `mixed`; below "
            "8 bits the file shrinks only with --activations float).",
            show_default=False,
        ),
    ] = None,
    budget_speedup: Annotated[
        float | None,
        typer.Option(
            metavar="TIMES",
            help="Keep in float what quantization harms most, as long as the whole is so many times faster than the "
            "float model in onnxruntime here, one thread (recipe `mixed`, --target cpu).",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(show_default="cpu", help="Where calibration and learning run: cpu or cuda.")
    ] = None,
    custom_ops: CustomOps = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    conditions: Conditions = None,
    tokenizer: Tokenizer = None,
    sequence_length: SequenceLength = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings as YAML, under the names of these options; options win."),
    ] = None,
    report: ReportPath = None,
    json_path: JsonPath = None,
    quiet: Quiet = None,
) -> None:
    """Quantize MODEL and check the result against it.

    The float model runs once over the data; ranges of activations and weights become scales; weights are stored as
    integers; the result is linted for its target and run in onnxruntime beside the float model before it is written.

    Example: `onnxq quantize model.onnx --data calibration.npz --target cpu -o model.int8.onnx`
    """
    from onnxq import pipeline
    from onnxq.config import make_settings, parse_assignments, read_yaml, with_text

    given = {
        "target": target,
        "recipe": recipe,
        "weights": weights,
        "activations": activations,
        "first_last": first_last,
        "embeddings": embeddings,
        "packed_blocks": packed_blocks or None,
        "opset": opset,
        "base": base,
        "rotate": rotate or None,
        "low_rank": low_rank,
        "samples": samples,
        "shapes": sizes_of(shapes),
        "exclude": tuple(exclude) if exclude else None,
        "only": tuple(only) if only else None,
        "seed": seed,
        "synthesis": synthesis,
        "statistics": None if statistics is None else str(statistics),
        "budget": budget,
        "device": device,
        "custom_ops": tuple(map(str, custom_ops)) if custom_ops else None,
        "workers": workers,
        "ray": ray,
        "scheduler": None if scheduler is None else str(scheduler),
        "steps": steps,
        "guidance": guidance,
        "conditions": None if conditions is None else str(conditions),
        "knobs": parse_assignments(knobs) if knobs else None,
    }
    entries = read_yaml(config) if config else {}
    entries |= {key: value for key, value in given.items() if value is not None}
    goals = {"max_drop": max_drop, "budget_mib": budget_mib, "budget_speedup": budget_speedup}
    reached = {key: value for key, value in goals.items() if value is not None}
    if reached:
        entries.setdefault("recipe", "mixed")
        entries["knobs"] = {**(entries.get("knobs") or {}), **reached}
    settings = make_settings(with_text(entries, tokenizer, sequence_length))
    destination = output or model.with_name(f"{model.stem}.{_suffix(settings)}.onnx")
    inputs = [model, data, statistics, scheduler, conditions, tokenizer, config]
    check_destinations(inputs, destination, json_path, report)
    result = pipeline.quantize(model, data, output=destination, settings=settings, progress=progress(quiet))
    numbers = result.numbers
    write_json(json_path, numbers)
    if report is not None:
        write_report(report, numbers | {"tensors": result.tensors})
    show(numbers, quiet)


def _suffix(settings: Any) -> str:
    """The formats that stand in the name of the result: what the user or the recipe says, or int8."""
    from onnxq import recipes as registry

    entry = registry.get(settings.recipe)
    for spec in (settings.weights or entry.weights, settings.activations or entry.activations):
        if spec and spec != "float":
            return str(spec).replace(":", "_")
    return "int8"
