"""Compare a quantized model with its float original: quality, worst layers, latency and size.

What is deployed (onnxruntime's optimised session) gives the headline numbers. The literal session, where every
Q/DQ node really runs, gives the layers and ``sqnr_db_literal``; the two may differ where a fused integer kernel
does not compute what the graph says, and then a warning tells. A denoiser with one graph for each group of sampler
steps is compared graph by graph, each on the samples of its steps: one of them is in memory at a time.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import model as models
from onnxq.calibration import data as inputs
from onnxq.calibration import sizes
from onnxq.diffusion.router import Router
from onnxq.diffusion.subgraphs import is_index
from onnxq.interfaces import check_outputs, common_inputs
from onnxq.report.metrics import json_safe
from onnxq.report.quality import Quality
from onnxq.runtime import Array
from onnxq.side_by_side import Bench, Model, Part, opened, parts_of

Progress = Callable[[str, int, int], None]  # stage, samples done, samples in all

SUSPICIOUS_DIFFERENCE_DB = 3.0  # float rounding alone moves an SQNR by hundredths of a dB


@dataclass
class Comparison:
    """What :func:`compare` found. ``None`` means that it does not apply (no labels, say).

    Attributes:
        samples: Samples compared.
        sqnr_db: Over all float outputs, each in its own size, optimised sessions, all samples.
        sqnr_db_literal: The same with no optimisation, on the first samples only.
        outputs: SQNR of each float output in dB, where there are several.
        mean_error: Mean of quantized minus float over all float outputs.
        agreement: Fraction of samples (or tokens) where both models name the same class.
        top1_float: Fraction of labels that the float model names first; the others likewise.
        perplexity_float: Of the next token, for models from tokens to logits.
        latency_ms_float: Median milliseconds of a run on one sample (or on the model's fixed batch).
        float_bytes: Size of the model with its external data.
        layers: Worst first; each has ``name``, ``op``, ``value`` and ``sqnr_db``.
        step_sqnr_db: Of a denoiser, by sampler step, where the data holds steps as ``onnxq trajectories`` writes them.
        timestep_sqnr_db: Of a denoiser, by the timestep that it was given.
        groups: Of a denoiser with one graph for each group of steps: ``file``, ``samples`` and ``sqnr_db`` of each.
        warnings: What a reader must know before trusting the numbers.
    """

    samples: int = 0
    sqnr_db: float | None = None
    sqnr_db_literal: float | None = None
    outputs: dict[str, float | None] = field(default_factory=dict)
    mean_error: float | None = None
    agreement: float | None = None
    top1_float: float | None = None
    top1_quantized: float | None = None
    top5_float: float | None = None
    top5_quantized: float | None = None
    perplexity_float: float | None = None
    perplexity_quantized: float | None = None
    latency_ms_float: float | None = None
    latency_ms_quantized: float | None = None
    float_bytes: int = 0
    quantized_bytes: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    step_sqnr_db: dict[int, float | None] = field(default_factory=dict)
    timestep_sqnr_db: dict[float, float | None] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A dict of what applies, ready for strict JSON (an infinite SQNR is the string ``"inf"``)."""
        found: dict[str, Any] = json_safe({key: value for key, value in asdict(self).items() if value is not None})
        for key in ("outputs", "step_sqnr_db", "timestep_sqnr_db", "groups"):
            if not found[key]:
                del found[key]
        return found


def compare(
    float_model: Model,
    quantized_model: Model,
    data: str | os.PathLike[str] | Iterable[Mapping[str, Array]],
    *,
    preprocessing: inputs.Preprocessing | None = None,
    samples: int | None = None,
    shapes: Mapping[str, Sequence[int]] = MappingProxyType({}),
    device: str = "cpu",
    layers: bool = True,
    layer_samples: int = 16,
    latency: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models on the same data and measure what quantization cost and gained.

    Args:
        float_model: The original, by path or in memory.
        quantized_model: Its quantized version, with the same inputs and outputs; or the ``.groups.json`` of a
            denoiser with one graph for each group of steps.
        data: An ``.npz`` keyed by input name (and ``labels``), a folder of images, or an iterable of dicts.
        preprocessing: How image files become inputs, for a folder of images.
        samples: How many samples to use; all if ``None``.
        shapes: Sizes of inputs that the models leave free, for a folder of images.
        device: ``cpu`` or ``cuda``.
        layers: Whether to measure layer by layer.
        layer_samples: Samples for the layers and for the literal session.
        latency: Whether to time both models.
        threads: Threads of the timed runs.
        progress: Called with the stage, the samples done and the samples in all.

    Raises:
        OnnxqError: the models' inputs or outputs differ, or the data does not fit them.
    """
    router = Router(os.fspath(quantized_model), device) if is_index(quantized_model) else None  # type: ignore[arg-type]
    original, first = opened(float_model), opened(quantized_model if router is None else router.files[0])
    sizes.choose(original, shapes)
    specs = common_inputs(original, first)
    source = inputs.open_source(data, specs, preprocessing)
    if router is None:
        parts = [Part(quantized_model, source, samples, read=first)]
    else:
        parts = parts_of(router, first, source, samples)
    for part in parts:
        common_inputs(original, part.graph)
        check_outputs(original, part.graph)
    total, done = sum(part.samples for part in parts), Counter[str]()

    def say(stage: str, count: int) -> None:
        done[stage] += count
        if progress is not None:
            progress(stage, min(done[stage], total), total)

    bench = Bench(float_model, original, specs, device, say)
    share = -(-layer_samples // max(1, len(parts)))
    found, seen = bench.outputs(parts, share)
    quality = functools.reduce(Quality.merged, found)
    result = Comparison(
        samples=min(done["compare"], total),  # a fixed batch may have been filled by repeating, or cut short
        float_bytes=_size_bytes(float_model),
        quantized_bytes=_size_bytes(quantized_model) if router is None else models.bytes_of_files(router.files),
        **quality.summary(),
    )
    if router is not None:
        result.groups = [
            {"file": Path(str(part.model)).name, "samples": part.samples, "sqnr_db": mine.sqnr.value}
            for part, mine in zip(parts, found, strict=True)
        ]
    float8 = any(graphs.holds_narrow_floats(part.graph.graph) for part in parts)  # a simulation's latency
    if latency and bench.large:
        result.warnings.append("not timed: a model over 512 MiB runs in parts here, and whole where it is deployed")
    elif latency and any(graphs.is_bfloat16(model) for model in (bench.original, *(part.graph for part in parts))):
        result.warnings.append("not timed: onnxruntime has no kernels of bfloat16, and float32 stands for it here")
    elif latency and not float8:
        times = bench.latency_ms(parts, threads)
        result.latency_ms_float, result.latency_ms_quantized = times["float"], times["quantized"]
        if device == "cuda":
            result.warnings.append(
                "onnxruntime has no integer kernels in CUDA: the quantized model's time is that of a simulation; "
                "onnxq build makes an engine, which has them"
            )
    if layer_samples > 0:
        literal, result.layers = bench.layers(parts, share, inner=layers)
        result.sqnr_db_literal = literal.value
        _warn_about_optimiser(seen.sqnr.value, literal.value, result.warnings)
    return result


def _size_bytes(model: Model) -> int:
    return models.initializer_bytes(model) if isinstance(model, ir.Model) else models.file_bytes(model)


def _warn_about_optimiser(optimised_db: float | None, literal_db: float | None, warnings: list[str]) -> None:
    if optimised_db is None or literal_db is None or optimised_db == literal_db:
        return
    if not abs(optimised_db - literal_db) <= SUSPICIOUS_DIFFERENCE_DB:
        warnings.append(
            f"onnxruntime's optimised session ({optimised_db:.1f} dB) does not compute what the graph says "
            f"({literal_db:.1f} dB run literally): fused kernels differ; judge it on the device that will run it"
        )
