"""One quantization, as a recipe sees it: the graph, the target, the data, and the steps between them."""

from __future__ import annotations

import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes, shapes
from onnxq.body_layers import BodyLayers
from onnxq.calibration import bias_correction
from onnxq.calibration.data import InputSpec, Source, batches, input_specs, inputs_of
from onnxq.calibration.observers import Range, Statistics
from onnxq.calibration.recording import KEPT_SAMPLES, MEAN_SAMPLES, Recording, record
from onnxq.calibration.weight_ranges import Search
from onnxq.config import Settings
from onnxq.decoders import attention_in_float
from onnxq.diffusion.subgraphs import Subgraph
from onnxq.errors import OnnxqError
from onnxq.half import to_half
from onnxq.kinds import Kind, kind_of
from onnxq.model import initializer_bytes
from onnxq.parallel import SharedModel, Workers
from onnxq.passes.decompose_attention import DecomposeAttention
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.passes.level_gates import GATED
from onnxq.passes.lower_packed_blocks import LowerPackedBlocks
from onnxq.passes.quantize_experts import QuantizeExperts
from onnxq.passes.quantize_tables import QuantizeTables
from onnxq.passes.rotate_heads import RotateHeads
from onnxq.passes.rotate_streams import RotateStreams
from onnxq.passes.split_matrices import SplitMatrices
from onnxq.progress import Progress
from onnxq.runtime import Session
from onnxq.scheme import Scheme
from onnxq.serialized import IN_MEMORY_LIMIT_BYTES, serialize
from onnxq.targets import Placement, Target, experts_format, scheme_of_ends
from onnxq.targets.placement import excluded, first_and_last, within
from onnxq.value_sizes import elements_in

Array = np.ndarray[Any, Any]

RUNS_AT_ONCE = 2
TAPPED_AT_ONCE = 1 << 24  # numbers in the taps of one sample; where there are more, memory matters more than time


@dataclass
class Job:
    """What a recipe works on.

    Attributes:
        model: The graph; float at first, quantized in place.
        target: What will run it.
        scheme: The formats.
        settings: Everything else the user said.
        source: Calibration samples, or ``None`` for a model whose data is not available.
        progress: Where to say what is being done.
        placement: Set by :meth:`insert`.
        recording: Set by :meth:`record`.
        observed: What :meth:`observe` has seen of the float graph.
        ranges: The range chosen for each activation, by value name.
        warnings: What the user should know.
        exceptions: The schemes of single layers, by the name of the node; a recipe may add some before :meth:`insert`.
        step_sqnr_db: SQNR of a denoiser in each sampler step, on calibration samples; empty where there are no steps.
        reasons: Why a recipe left a layer in float, by the name of the node.
        measurements: What a recipe found out, by the key that it gets in ``--json``.
        subgraphs: A denoiser's graphs for groups of its steps, written beside the model; empty where one serves all.
        path: The float model's file, beside which a denoiser's schedule may lie.
        workers: Who shares the work; ``None``: nobody.
        checkpoint: A folder in which recipes that learn keep finished steps, ``None`` to keep nothing.
        embeddings: The format of tables that tokens are looked up in, ``int8``, ``int4`` or ``float``.
        search: How the range of a weight follows from it, for layers in branches and loops; ``None``: its extremes.
        is_large: Whether the float model is too large for one onnxruntime session (see :mod:`onnxq.parts`).
    """

    model: ir.Model
    target: Target
    scheme: Scheme
    settings: Settings
    source: Source
    progress: Progress
    specs: list[InputSpec] = field(default_factory=list)
    placement: Placement | None = None
    recording: Recording | None = None
    observed: Recording = field(default_factory=lambda: Recording({}))
    ranges: dict[str, Range] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    exceptions: dict[str, Scheme] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    step_sqnr_db: dict[int, float] = field(default_factory=dict)
    measurements: dict[str, Any] = field(default_factory=dict)
    subgraphs: list[Subgraph] = field(default_factory=list)
    path: Path | None = None
    checkpoint: Path | None = None
    workers: Workers | None = None
    embeddings: str = "float"
    search: Search | None = None
    is_large: bool = field(init=False)
    _float_session: Session | None = None
    _taps: list[str] = field(default_factory=list)
    _has_ranges: bool = True  # whether any activation gets codes
    _wants_means: bool = False
    _excluded: Collection[str] = ()  # names of nodes
    _shared: SharedModel | None = None

    def __post_init__(self) -> None:
        self.is_large = initializer_bytes(self.model) > IN_MEMORY_LIMIT_BYTES

    def prepare(self) -> None:
        """Run the target's rewrites, which keep the function."""
        self.specs = input_specs(self.model)
        self.target.prepare(self.model)
        if self.target.multiplies_one_matrix:
            patterns = within(self.model.graph, self.settings.left_out)  # which name the product that it was
            SplitMatrices(excluded(self.model.graph, patterns))(self.model)
        if self.settings.rotate:
            self._rotate()
        if self.settings.first_last is not None:
            ends = scheme_of_ends(self.target, self.scheme, self.settings.first_last)
            self.exceptions |= {name: ends for name in first_and_last(self.model.graph)}
        self._open_attention()
        if self.settings.low_rank:
            from onnxq.low_rank import add_low_rank

            add_low_rank(self, self.settings.low_rank)

    def _open_attention(self) -> None:
        """Leave a decoder's attention in float, and take that of others apart where its products get codes."""
        if not self.scheme.activations.enabled:
            return
        kept: list[str] = []
        if kind_of(self.model) is Kind.LANGUAGE:
            kept = attention_in_float(self.model, self.specs)
            in_float = self.target.scheme("float", "float")
            self.exceptions |= dict.fromkeys(kept, in_float)
            self.reasons |= dict.fromkeys(kept, "attention of a decoder")
        if self.target.quantizes_attention and DecomposeAttention(kept)(self.model).modified:
            shapes.infer(self.model)

    def _rotate(self) -> None:
        """Turn residual streams and the values of attention's heads, which keeps the function too."""
        streams, heads = RotateStreams(self.settings.seed), RotateHeads(self.settings.seed)
        streams(self.model)
        heads(self.model)
        if not streams.rotated and not heads.rotated:
            reason = streams.refused[0] if streams.refused else "no sum behind a layer with a constant matrix"
            raise OnnxqError(
                f"expected a residual stream that can be turned as a whole, found none: {reason}",
                hint="leave --rotate out; streams end in layers, sums and norms whose factors go into layers",
            )
        if streams.refused:
            self.warnings.append(f"not every residual stream was turned: {streams.refused[0]}")
        self.measurements["rotations"] = {"streams": streams.rotated, "heads": len(heads.rotated)}

    def place(self, graph: ir.Graph, further: Mapping[str, Scheme] = MappingProxyType({})) -> Placement:
        """Where Q/DQ go, with the exceptions of user and recipe, and some further ones."""
        placement = self.target.place(graph, self.scheme, self.settings.left_out, self.exceptions | dict(further))
        reasons = {name: self.reasons.get(name, reason) for name, reason in placement.left_float.items()}
        return Placement(placement.sites, reasons)

    def insert(self, means: bool = False) -> None:
        """Insert Q/DQ where the target wants them; a float session that taps the same values is made first.

        Args:
            means: Whether :meth:`record` keeps the means that biases are corrected with. Layers whose weights alone
                get codes read values that nothing would tap otherwise.
        """
        self._wants_means = means
        self.placement = self.place(self.model.graph)
        self._excluded = excluded(self.model.graph, self.settings.left_out)
        if not self.placement.sites and not self._body_layers().count(self.model):
            reasons = "; ".join(sorted(set(self.placement.left_float.values()))) or "it has no Conv, Gemm or MatMul"
            hint = "see `onnxq lint`"
            if "faster in float" in reasons:
                hint = "keep the float model, or store its weights alone in 8 bits: --activations float"
            if "inside the" in reasons:
                hint = "for a CPU, give layers in branches and loops dynamic ranges: --recipe int8-dynamic"
            if self.scheme.activations.dynamic:
                hint = "use --recipe int8, whose ranges are calibrated; dynamic ones are for Gemm, MatMul and LSTM"
            raise OnnxqError(f"expected something to quantize, found nothing ({reasons})", hint=hint)
        roots = self.placement.ranged
        self._has_ranges = bool(roots)
        if means:
            read = bias_correction.read_in_float(self.model.graph, self.placement.sites)
            roots |= {value.name or "" for value in read}
        self._taps = sorted(roots)
        if not self._taps or not set(self._taps) <= self.observed.statistics.keys():
            self._open_float_session(self._taps)
        InsertQDQ(self.placement.sites)(self.model)

    def _body_layers(self) -> BodyLayers:
        return BodyLayers(self.target, self.scheme, self.settings.left_out, self.exceptions)

    def _open_float_session(self, taps: Sequence[str]) -> Session:
        inputs = {spec.name for spec in self.specs}
        tapped = [name for name in taps if name not in inputs]
        first = inputs_of(next(batches(self.source, self.specs, batch_size=1, samples=1)), self.specs)
        elements = elements_in(self.model, tapped, first)
        large = tapped if elements > TAPPED_AT_ONCE else ()
        serialized = serialize(
            self.model, tapped, by_path=self.workers is None, condense=large, means=self._wants_means
        )
        pays = elements <= TAPPED_AT_ONCE and len(self.source) > RUNS_AT_ONCE
        at_once = RUNS_AT_ONCE if pays else 1
        self._float_session = Session(serialized, device=self.settings.device, at_once=at_once)
        if self.workers is not None:
            self._shared = self.workers.share(serialized, self.settings.device)
        return self._float_session

    def observe(self, taps: Collection[str]) -> dict[str, Statistics]:
        """Statistics of values of the float graph, before :meth:`insert`, of which :meth:`record` then needs no run.

        Args:
            taps: Names of values; those that were observed before cost nothing.

        Returns:
            The statistics of all values that were ever observed.
        """
        missing = sorted(set(taps) - self.observed.statistics.keys())
        if missing:
            self.observed.add(self._run_float(missing, bias_correction.channel_axes(self.model.graph)))
        return self.observed.statistics

    def record(self) -> dict[str, Statistics]:
        """Run the float graph once over the calibration inputs and keep statistics of what gets quantized."""
        if self.placement is None:
            raise RuntimeError("insert() comes before record()")
        if self._float_session is None:
            self.recording = self.observed.of(self._taps, graphs.tensor_outputs(self.model.graph))
        else:
            axes = bias_correction.channel_axes(self.model.graph) if self._wants_means else {}
            self.recording = self._run_float(self._taps, axes)
        if getattr(self.source, "is_made_up", False):
            last = layer_nodes.last_sums(self.model.graph)
            short = last | layer_nodes.pooled_features(self.model.graph, last)
            for name in short & self.recording.statistics.keys():
                self.recording.statistics[name].is_short = True
        return self.recording.statistics

    @property
    def channel_means(self) -> Mapping[str, Array]:
        """E[x] of each input channel of layers, by value name; none where :meth:`insert` was not asked for them."""
        return self.recording.channel_means if self.recording is not None and self._wants_means else {}

    def _run_float(self, taps: Sequence[str], channel_axes: Mapping[str, int]) -> Recording:
        session = self._float_session or self._open_float_session(taps)
        total = min(len(self.source), self.settings.samples or len(self.source))
        if not taps:
            total = min(total, KEPT_SAMPLES)  # weights only: a few samples to check the result on
        elif not self._has_ranges:
            total = min(total, MEAN_SAMPLES)
        with self.progress.stage("calibrate", "Calibrating", total) as advance:
            recording = record(
                session,
                taps,
                self.source,
                self.specs,
                channel_axes={name: axis for name, axis in channel_axes.items() if name in taps},
                samples=total,
                on_batch=advance,
                workers=self.workers,
                shared=self._shared,
            )
        self._float_session = self._shared = None
        return recording

    def _to_half(self) -> None:
        assert self.recording is not None
        if not self.target.computes_in_half:
            raise OnnxqError(
                f"expected --base float32 for {self.target.name}, found {self.settings.base}: its integer kernels read "
                "float32",
                hint="leave --base out, or use --target tensorrt",
            )
        dtype = ir.DataType[self.settings.base.upper()]
        to_half(self.model, dtype, [feed for feed, _ in self.recording.kept], self.settings.device)

    def lower(self) -> None:
        """Bring the graph to the form that the target runs, and prove that it breaks no rule of the target."""
        with self.progress.stage("lower", "Writing integers"):
            if self.settings.base != "float32":
                self._to_half()
            self.target.lower(self.model)
            has_tables = self.embeddings != "float"
            has_tables = has_tables and QuantizeTables(self._excluded, self.embeddings)(self.model).modified
            experts = experts_format(self.target, self.scheme)
            if experts != "float":
                QuantizeExperts(self._excluded, experts)(self.model)
            inside = self._body_layers()
            has_tables |= inside.quantize(self.model, self.search, tables=self.embeddings)
            if has_tables:
                self.measurements["embeddings"] = self.embeddings
            if self.settings.packed_blocks:
                LowerPackedBlocks()(self.model)
            if self.placement is not None:
                products = (item for item in layer_nodes.weighted_nodes(self.model.graph) if item.weight_index is None)
                for name in inside.with_codes | {
                    item.node.name or "" for item in products if layer_nodes.reads_codes(item)
                }:
                    self.placement.left_float.pop(name, None)
                self.placement.left_float.update(inside.left_float)
            found = [*self.target.lint(self.model), *inside.findings]
            findings = [item for item in found if item.severity == "error"]
        if findings:
            first = findings[0]
            raise OnnxqError(
                f"expected a graph that passes the lint of {self.target.name}, found {len(findings)} errors, first: "
                f"{first.rule} at {first.node!r}: {first.message}",
                hint="this is a defect of onnxq; --exclude that node for now, and report it",
            )


def quantized_counts(graph: ir.Graph) -> tuple[int, int]:
    """How many Conv, Gemm and MatMul read codes, and how many there are; LSTMs and products on integers count too.

    A layer with float weights reads none, also where what it reads had codes for its neighbours. What scales the
    channels of a gate is no layer of the user's. Layers in branches and loops count where they read codes.
    """
    total = quantized = sum(map(layer_nodes.multiplies_integers, graph.all_nodes()))
    for item in layer_nodes.weighted_nodes(graph):
        if GATED not in item.node.metadata_props:
            total += 1
            quantized += layer_nodes.reads_codes(item)
    inside = (layer_nodes.weighted(node) for node in graph.all_nodes() if node.graph is not graph)
    with_codes = sum(item is not None and layer_nodes.reads_codes(item) for item in inside)
    return quantized + with_codes, total + with_codes


def peak_rss_mib() -> float:
    """The largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
