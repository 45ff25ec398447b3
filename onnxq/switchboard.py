"""A model in which the quantization of every layer can be switched on and off between two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.calibration import calibrate
from onnxq.calibration.observers import Observer, Statistics
from onnxq.calibration.weight_ranges import Search
from onnxq.parallel import SharedModel, Workers
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.passes.lower_weights import LowerWeights
from onnxq.runtime import Session
from onnxq.scheme import Scheme, Spec
from onnxq.serialized import serialize
from onnxq.targets import Site

Array = np.ndarray[Any, Any]

SWITCH = "onnxq_switch_"


@dataclass(frozen=True)
class Layer:
    """A layer, and the formats of what it reads.

    Attributes:
        name: The node's name.
        scheme: Formats of its weight and of its activations.
    """

    name: str
    scheme: Scheme


class Switchboard:
    """A model in which the quantization of every layer has a switch.

    Each layer reads quantized and float values through a Where of its own, so that one session answers what any set
    of layers costs.

    Args:
        model: A float model after the target's rewrites; it is not changed.
        layers: The layers that get a switch.
        statistics: Of every activation in :func:`activations_of`, by name.
        observer: How a range follows from the statistics of an activation.
        search: How a range follows from the weights; ``None``: their extremes.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        model: ir.Model,
        layers: Sequence[Layer],
        statistics: dict[str, Statistics],
        *,
        observer: Observer,
        search: Search | None = None,
        device: str = "cpu",
    ) -> None:
        self.layers = [layer.name for layer in layers]
        copy = model.clone()
        sites = _sites(copy.graph, layers)
        InsertQDQ(sites)(copy)
        calibrate.set_activation_scales(copy, statistics, observer)
        calibrate.set_weight_scales(copy, search)
        self._switches = _add_switches(copy.graph, sites)
        LowerWeights()(copy)
        self._optimize, self._device = not graphs.holds_narrow_floats(copy.graph), device
        self._model = copy
        self._session: Session | None = None
        self._shared: SharedBoard | None = None

    def run(self, feed: Mapping[str, Array], on: Iterable[str]) -> list[Array]:
        """The model's outputs when the named layers are quantized."""
        if self._session is None:
            self._session = Session(self._model, optimize=self._optimize, device=self._device)
        return _run(self._session, self._switches, feed, on)

    def share(self, workers: Workers) -> SharedBoard:
        """The same board for all workers, the same of them every time."""
        if self._shared is None:
            serialized = serialize(self._model, by_path=False)
            shared = workers.share(serialized, self._device, optimize=self._optimize)
            self._shared = SharedBoard(shared, self._switches)
        return self._shared


@dataclass(frozen=True)
class SharedBoard:
    """A :class:`Switchboard` whose session every worker makes for itself.

    Attributes:
        model: The model.
        switches: Names of the switches by names of layers.
    """

    model: SharedModel
    switches: Mapping[str, str]

    def run(self, feed: Mapping[str, Array], on: Iterable[str]) -> list[Array]:
        """The model's outputs when the named layers are quantized, in a worker."""
        return _run(self.model.session(), self.switches, feed, on)


def _run(session: Session, switches: Mapping[str, str], feed: Mapping[str, Array], on: Iterable[str]) -> list[Array]:
    chosen = {switches[name] for name in on if name in switches}
    return session.run({**feed, **{switch: np.asarray(switch in chosen) for switch in switches.values()}})


def activations_of(graph: ir.Graph, layers: Sequence[Layer]) -> list[str]:
    """Names of the activations that the layers read, whose statistics a :class:`Switchboard` needs."""
    return sorted({site.value.name or "" for site in _sites(graph, layers) if not graphs.is_constant(site.value)})


def layers_of(graph: ir.Graph, scheme_of: Callable[[ir.Node], Scheme], left_float: Mapping[str, str]) -> list[Layer]:
    """The layers that a target would quantize: products whose name is not among those left in float."""
    return [
        Layer(item.node.name or "", scheme_of(item.node))
        for item in layer_nodes.weighted_nodes(graph)
        if (item.node.name or "") not in left_float
    ]


def _sites(graph: ir.Graph, layers: Sequence[Layer]) -> list[Site]:
    schemes = {layer.name: layer.scheme for layer in layers}
    sites = []
    for item in layer_nodes.weighted_nodes(graph):
        scheme = schemes.get(item.node.name or "")
        if scheme is None:
            continue
        for index, value in enumerate(item.node.inputs[:2]):
            if value is None or not graphs.is_float(value):
                continue
            if graphs.is_constant(value):
                axes = {"tensor": None, "channel": item.channel_axis, "block": item.reduction_axis}
                sites += _site(item.node, index, value, scheme.weights, axes[scheme.weights.granularity])
            else:
                sites += _site(item.node, index, value, scheme.activations, None)
    return sites


def _site(node: ir.Node, index: int, value: ir.Value, spec: Spec, axis: int | None) -> list[Site]:
    return [Site(value, ((node, index),), spec, axis)] if spec.enabled else []


def _add_switches(graph: ir.Graph, sites: Sequence[Site]) -> dict[str, str]:
    """Put a Where behind each pair; the names of the switches by the names of the layers."""
    switches: dict[str, ir.Value] = {}
    for site in sites:
        node, index = site.uses[0]
        name = node.name or ""
        if name not in switches:
            switch = ir.Value(name=f"{SWITCH}{len(switches)}", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.BOOL))
            graph.inputs.append(switch)
            switches[name] = switch
        dequantized = node.inputs[index]
        assert dequantized is not None
        tape = ir.tape.Tape()
        chosen = tape.op("Where", [switches[name], dequantized, site.value])
        chosen.name, chosen.type, chosen.shape = f"{dequantized.name}_or_not", site.value.type, site.value.shape
        tape.nodes[0].name = f"{dequantized.name}_where"
        graph.insert_before(node, tape.nodes)
        node.replace_input_with(index, chosen)
    return {name: switch.name or "" for name, switch in switches.items()}
