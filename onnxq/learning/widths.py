"""The layers whose width is to be chosen, the widths there are, and what each costs in bits, MiB and operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.calibration.data import batches, inputs_of, row_count
from onnxq.calibration.observers import Statistics
from onnxq.calibration.recording import record
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.learning.outputs import compared
from onnxq.model import initializer_bytes
from onnxq.runtime import Session
from onnxq.scheme import Scheme, Spec
from onnxq.sensitivity import Probe, judged_samples
from onnxq.switchboard import Layer, activations_of

MIB, GIGA = 1 << 20, 1e9


@dataclass(frozen=True)
class Group:
    """Layers that read one weight, and so have one width.

    Attributes:
        name: The name of the weight.
        nodes: The names of the layers.
        weights: Numbers in the weight.
        scales: Scales that its codes have.
        multiplications: Of one sample, over all the layers.
    """

    name: str
    nodes: tuple[str, ...]
    weights: int
    scales: int
    multiplications: float


class Widths:
    """The layers that get a width, the widths there are, and what each costs.

    Args:
        job: After ``prepare``.
        weight_bits: The widths of weights to choose from.
        activation_bits: Those of activations; empty where all have the format of the job's scheme.

    Attributes:
        groups: What gets one width each.
        schemes: The schemes to choose from, by a label like ``int4/int8``.
        activations_chosen: Whether widths of activations are chosen too.
        fixed_mib: What lies in the file whatever is chosen.

    Raises:
        OnnxqError: the formats are no integers, or there is nothing to choose for.
    """

    def __init__(self, job: Job, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> None:
        weights, activations = job.scheme.weights, job.scheme.activations
        for what, spec in (("weights", weights), ("activations", activations)):
            if spec.enabled and spec.format.is_float:
                raise OnnxqError(
                    f"expected {what} of an integer format for mixed widths, found {spec.format.name}",
                    hint=f"use --{what} int8",
                )
        if not weights.enabled or not weight_bits:
            raise OnnxqError("expected weights to choose widths for, found none", hint="use --weights int8")
        if activation_bits and not activations.enabled:
            raise OnnxqError(
                "expected quantized activations for activation_bits, found --activations float",
                hint="leave out activation_bits, or give --activations int8",
            )
        target = job.target
        self.activations_chosen = bool(activation_bits)
        ending = f":{weights.block_size}" if weights.block_size else {"tensor": ":tensor"}.get(weights.granularity, "")
        names = [f"{_sign(weights)}int{bits}{ending}" for bits in weight_bits]
        others = [f"{_sign(activations)}int{bits}" for bits in activation_bits] or [activations.format.name]
        self._weights_alone = {name: target.scheme(name, "float") for name in names}
        self._activations_alone = {name: target.scheme("float", name) for name in others} if activation_bits else {}
        self.schemes = {f"{name}/{other}": target.scheme(name, other) for name in names for other in others}
        self.groups = _groups(job)
        chosen_bytes = sum(group.weights for group in self.groups) * 4
        self.fixed_mib = max(0, initializer_bytes(job.model) - chosen_bytes) / MIB
        self._all_weights = sum(group.weights for group in self.groups)

    def parts(self) -> dict[str, Scheme]:
        """What is measured: weights of each width, then activations of each width, by label."""
        return self._weights_alone | {f"/{name}": scheme for name, scheme in self._activations_alone.items()}

    def parts_of(self, label: str) -> list[str]:
        """The parts that a label is made of."""
        name, _, other = label.partition("/")
        return [name, f"/{other}"] if self.activations_chosen else [name]

    def measured(self, scheme: Scheme) -> Scheme:
        """The part of a scheme that was chosen."""
        return (
            scheme
            if self.activations_chosen
            else Scheme(scheme.weights, next(iter(self._weights_alone.values())).activations)
        )

    def costs(self, group: Group, label: str) -> dict[str, float]:
        """Mean bits, MiB in the file, and 10⁹ bit operations."""
        weights, activations = self.schemes[label].weights, self.schemes[label].activations
        width = activations.format.bits if activations.enabled else 32
        stored = group.weights * weights.format.storage.bitwidth / 8 + 4 * group.scales
        return {
            "bits": weights.format.bits * group.weights / self._all_weights,
            "mib": stored / MIB,
            "bops": group.multiplications * weights.format.bits * width / GIGA,
        }


def widths_of(text: str) -> list[int]:
    """Widths from ``2,4,8``.

    Raises:
        OnnxqError: one of them is no number from 2 to 8.
    """
    try:
        found = sorted({int(part) for part in text.replace(" ", "").split(",") if part})
    except ValueError:
        found = [0]
    if any(not 2 <= bits <= 8 for bits in found):
        raise OnnxqError(
            f"expected widths of 2 to 8 bits with commas between them, found {text!r}",
            hint="for example --set weight_bits=2,4,8",
        )
    return found


def _sign(spec: Spec) -> str:
    return "u" if spec.enabled and spec.format.name.startswith("u") else ""


def _groups(job: Job) -> list[Group]:
    """The layers that the target quantizes and whose width nobody has fixed."""
    placement = job.place(job.model.graph)
    sites = [site for site in placement.sites if graphs.is_constant(site.value)]
    layers = {item.node: item for item in layer_nodes.weighted_nodes(job.model.graph)}
    found: dict[str, list[ir.Node]] = {}
    weights: dict[str, ir.Value] = {}
    for site in sites:
        nodes = [node for node, _ in site.uses if node in layers and node.name not in job.exceptions]
        if nodes:
            name = site.value.name or ""
            weights[name] = site.value
            found[name] = [*found.get(name, []), *(node for node in nodes if node not in found.get(name, []))]
    if not found:
        reasons = "; ".join(sorted(set(placement.left_float.values()))) or "all widths are fixed"
        raise OnnxqError(f"expected layers to choose widths for, found none ({reasons})", hint="see `onnxq lint`")
    outputs = [node.outputs[0].name or "" for nodes in found.values() for node in nodes]
    sizes = _sizes(job, outputs)
    groups = []
    for name, nodes in found.items():
        weight = weights[name].const_value
        assert weight is not None
        shape = weight.numpy().shape
        count = math.prod(shape)
        channels = shape[layers[nodes[0]].channel_axis]
        block = job.scheme.weights.block_size
        scales = {"tensor": 1, "channel": channels}.get(job.scheme.weights.granularity, count // (block or count))
        products = sum(count / channels * sizes[node.outputs[0].name or ""] for node in nodes)
        groups.append(Group(name, tuple(node.name or "" for node in nodes), count, scales, products))
    return groups


def _sizes(job: Job, names: Sequence[str]) -> dict[str, int]:
    """Numbers in each value for one sample."""
    feed = inputs_of(next(batches(job.source, job.specs, batch_size=1, samples=1)), job.specs)
    rows = row_count(feed, job.specs)
    wanted = list(dict.fromkeys(names))
    session = Session(job.model, taps=wanted, device=job.settings.device)
    return {name: value.size // rows for name, value in zip(wanted, session.run(feed, wanted), strict=True)}


def probe_of(job: Job, widths: Widths, loss: str, observer: Any, search: Any, samples: int) -> Probe:
    """What sensitivities are measured with: samples with the float model's outputs, statistics where they are needed.

    Args:
        job: After ``prepare``.
        widths: The layers and widths.
        loss: ``auto``, ``kl`` or ``mse``.
        observer: How a range follows from the statistics of an activation.
        search: How a range follows from weights.
        samples: How many samples to measure on, at most.
    """
    session = Session(job.model, device=job.settings.device)
    judged = judged_samples(session, job.source, job.specs, min(samples, job.settings.samples or samples))
    statistics: dict[str, Statistics] = {}
    if widths.activations_chosen:
        scheme = next(iter(widths.schemes.values()))
        layers = [Layer(name, scheme) for group in widths.groups for name in group.nodes]
        inputs = {spec.name for spec in job.specs}
        names = activations_of(job.model.graph, layers)
        tapped = Session(job.model, taps=[name for name in names if name not in inputs], device=job.settings.device)
        total = min(len(job.source), job.settings.samples or len(job.source))
        with job.progress.stage("calibrate", "Calibrating", total) as advance:
            statistics = record(tapped, names, job.source, job.specs, samples=total, on_batch=advance).statistics
    return Probe(
        job.model,
        judged,
        statistics,
        job.specs,
        observer,
        search,
        job.settings.device,
        compared(job.model, loss),
        session.own_output_names,
        job.workers,
    )
