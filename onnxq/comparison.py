"""Compare a quantized model with its float original: quality, worst layers, latency and size.

What is deployed (onnxruntime's optimised session) gives the headline numbers. The literal session, where every
Q/DQ node really runs, gives the layers and ``sqnr_db_literal``; the two may differ where a fused integer kernel
does not compute what the graph says, and then a warning tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import model as models
from onnxq.calibration import data as inputs
from onnxq.errors import OnnxqError
from onnxq.report.layers import common_layers, measure
from onnxq.report.metrics import json_safe
from onnxq.report.quality import Quality
from onnxq.runtime import IN_MEMORY_LIMIT_BYTES, Array, Session, latency_ms

Model = ir.Model | str | os.PathLike[str]
Progress = Callable[[str, int, int], None]  # stage, samples done, samples in all

BATCH_SIZE = 4  # small: both models' activations are in memory at once
SUSPICIOUS_DIFFERENCE_DB = 3.0  # float rounding alone moves an SQNR by hundredths of a dB


@dataclass
class Comparison:
    """What :func:`compare` found. ``None`` means that it does not apply (no labels, say).

    Attributes:
        samples: Samples compared.
        sqnr_db: Over all float outputs together, optimised sessions, all samples.
        sqnr_db_literal: The same with no optimisation, on the first samples only.
        outputs: SQNR of each float output in dB, where there are several.
        mean_error: Mean of quantized minus float over all float outputs.
        agreement: Fraction of samples (or tokens) where both models name the same class.
        top1_float: Fraction of labels that the float model names first; the others likewise.
        perplexity_float: Of the next token, for models from tokens to logits.
        latency_ms_float: Median milliseconds of a run on one sample (or on the model's fixed batch).
        float_bytes: Size of the model with its external data.
        layers: Worst first; each has ``name``, ``op``, ``value`` and ``sqnr_db``.
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
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A dict of what applies, ready for strict JSON (an infinite SQNR is the string ``"inf"``)."""
        found: dict[str, Any] = json_safe({key: value for key, value in asdict(self).items() if value is not None})
        if not self.outputs:
            del found["outputs"]
        return found


def compare(
    float_model: Model,
    quantized_model: Model,
    data: str | os.PathLike[str] | Iterable[Mapping[str, Array]],
    *,
    preprocessing: inputs.Preprocessing | None = None,
    samples: int | None = None,
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
        quantized_model: Its quantized version, with the same inputs and outputs.
        data: An ``.npz`` keyed by input name (and ``labels``), a folder of images, or an iterable of dicts.
        preprocessing: How image files become inputs, for a folder of images.
        samples: How many samples to use; all if ``None``.
        device: ``cpu`` or ``cuda``.
        layers: Whether to measure layer by layer.
        layer_samples: Samples for the layers and for the literal session.
        latency: Whether to time both models.
        threads: Threads of the timed runs.
        progress: Called with the stage, the samples done and the samples in all.

    Raises:
        OnnxqError: the models' inputs or outputs differ, or the data does not fit them.
    """
    original, quantized = _opened(float_model), _opened(quantized_model)
    specs = _common_inputs(original, quantized)
    _check_outputs(original, quantized)
    source = inputs.open_source(data, specs, preprocessing)

    def feeds(limit: int | None, stage: str) -> Iterator[tuple[dict[str, Array], Array | None]]:
        total = len(source) if limit is None else min(limit, len(source))
        done = 0
        for batch in inputs.batches(source, specs, batch_size=BATCH_SIZE, samples=limit):
            labels = batch.get("labels")
            feed = inputs.inputs_of(batch, specs)
            yield feed, labels if "labels" not in feed else None
            done = min(total, done + _rows(feed))
            if progress is not None:
                progress(stage, done, total)

    float8 = graphs.holds_float8(quantized.graph)  # its latency here would be that of a simulation
    large = models.initializer_bytes(original) > IN_MEMORY_LIMIT_BYTES
    if large:  # both run in parts, and the quantized one literally: optimised, all of it would be in memory unpacked
        models.infer_types(original)
        models.infer_types(quantized)
    with _blaming("float"):
        float_session = Session(original if large else float_model, device=device)
    with _blaming("quantized"):
        quantized_session = Session(
            quantized if large else quantized_model, device=device, optimize=not (float8 or large)
        )
    quality = Quality(float_session.output_names)
    first = Quality(float_session.output_names)  # what the literal session will see, so that the two compare
    count = 0
    for feed, labels in feeds(samples, "compare"):
        expected, found = float_session.run(feed), quantized_session.run(feed, float_session.output_names)
        quality.update(feed, expected, found, labels)
        if count < layer_samples:
            first.update(feed, expected, found)
        count += _rows(feed)
    del float_session, quantized_session
    result = Comparison(
        samples=min(count, len(source)),  # a fixed batch may have been filled by repeating
        float_bytes=_size_bytes(float_model),
        quantized_bytes=_size_bytes(quantized_model),
        **quality.summary(),
    )

    if latency and large:
        result.warnings.append("not timed: a model over 512 MiB runs in parts here, and whole where it is deployed")
    if latency and not float8 and not large:
        feed = next(inputs.batches(source, specs, batch_size=1, samples=1))
        sessions = {
            "float": Session(float_model, device=device, threads=threads, spin=True),
            "quantized": Session(quantized_model, device=device, threads=threads, spin=True),
        }
        times = latency_ms(sessions, {spec.name: feed[spec.name] for spec in specs})
        result.latency_ms_float, result.latency_ms_quantized = times["float"], times["quantized"]
        del sessions

    if layer_samples > 0:
        limit = layer_samples if samples is None else min(samples, layer_samples)
        runs = (feed for feed, _ in feeds(limit, "layers"))
        named = _named(float_model, original)
        inner = common_layers(named, quantized) if layers else []
        literal, result.layers = measure(named, quantized, runs, inner, device=device)
        result.sqnr_db_literal = literal.value
        _warn_about_optimiser(first.sqnr.value, literal.value, result.warnings)
    return result


def _rows(feed: Mapping[str, Array]) -> int:
    first = next(iter(feed.values()))
    return len(first) if first.ndim else 1


def _opened(model: Model) -> ir.Model:
    return model if isinstance(model, ir.Model) else models.read(model)


def _named(model: Model, opened: ir.Model) -> ir.Model:
    """The float model as the quantizer sees it: normalised, so that nodes and values have the same names."""
    if isinstance(model, ir.Model):
        return model
    try:
        return models.load(model)
    except OnnxqError:
        return opened  # made by another tool from a model that onnxq itself would refuse


def _size_bytes(model: Model) -> int:
    return models.initializer_bytes(model) if isinstance(model, ir.Model) else models.file_bytes(model)


class _blaming:  # noqa: N801  reads as a phrase: with _blaming("float")
    """Say which of the two models onnxruntime refuses."""

    def __init__(self, which: str) -> None:
        self.which = which

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OnnxqError):
            raise OnnxqError(f"{self.which} model: {error.message}", hint=error.hint) from error


def _common_inputs(original: ir.Model, quantized: ir.Model) -> list[inputs.InputSpec]:
    """The inputs of both models; an axis that one of them fixes is fixed."""
    expected = inputs.input_specs(original)
    found = {spec.name: spec for spec in inputs.input_specs(quantized)}
    _check_names("inputs", [spec.name for spec in expected], list(found))
    common = []
    for spec in expected:
        other = found[spec.name]
        if spec.dtype != other.dtype:
            raise OnnxqError(
                f"expected input {spec.name!r} to be {spec.dtype} in both models, found {other.dtype} "
                "in the quantized one",
                hint="quantize with float inputs and outputs, or compare models of one interface",
            )
        _check_shapes("input", spec.name, spec.shape, other.shape)
        fixed = tuple(a if a is not None else b for a, b in zip(spec.shape, other.shape, strict=True))
        common.append(inputs.InputSpec(spec.name, spec.dtype, fixed))
    return common


def _check_outputs(original: ir.Model, quantized: ir.Model) -> None:
    expected = {value.name or "": value for value in original.graph.outputs}
    found = {value.name or "": value for value in quantized.graph.outputs}
    _check_names("outputs", list(expected), list(found))
    for name, value in expected.items():
        if value.shape is not None and found[name].shape is not None:
            _check_shapes("output", name, _dimensions(value), _dimensions(found[name]))


def _dimensions(value: ir.Value) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape or ())


def _check_names(kind: str, expected: Sequence[str], found: Sequence[str]) -> None:
    if set(expected) != set(found):
        raise OnnxqError(
            f"expected the same {kind} in both models, found {', '.join(expected)} in the float one "
            f"and {', '.join(found)} in the quantized one",
            hint="compare a quantized model with the float model that it was made from",
        )


def _check_shapes(kind: str, name: str, expected: Sequence[int | None], found: Sequence[int | None]) -> None:
    same = len(expected) == len(found) and all(
        a is None or b is None or a == b for a, b in zip(expected, found, strict=True)
    )
    if not same:
        shapes = [["any" if size is None else size for size in shape] for shape in (expected, found)]
        raise OnnxqError(
            f"expected {kind} {name!r} to have the shape {shapes[0]} of the float model, found {shapes[1]}",
            hint="compare a quantized model with the float model that it was made from",
        )


def _warn_about_optimiser(optimised_db: float | None, literal_db: float | None, warnings: list[str]) -> None:
    if optimised_db is None or literal_db is None or optimised_db == literal_db:
        return
    if not abs(optimised_db - literal_db) <= SUSPICIOUS_DIFFERENCE_DB:
        warnings.append(
            f"onnxruntime's optimised session ({optimised_db:.1f} dB) does not compute what the graph says "
            f"({literal_db:.1f} dB run literally): fused kernels differ; judge it on the device that will run it"
        )
