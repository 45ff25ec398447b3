"""Level the channels of x·g(x) where g is no line: HardSwish and SiLU with a scale for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import Change, array_of, fold, multiply, new_initializer
from onnxq.passes.smooth_activations import Group, groups, take_back

Array = np.ndarray[Any, Any]

GATED = "onnxq.gated"  # on the Mul that gives the gate its argument back


def gate_of(reader: ir.Node) -> ir.Node | None:
    """The node that reads a gate's argument: a reader of the source itself, or what is behind the Mul that levels."""
    return graphs.only_reader(reader.outputs[0]) if GATED in reader.metadata_props else reader


@dataclass(frozen=True)
class Gate:
    """HardSwish or SiLU before layers that alone read it, or read it scaled and shifted by constants.

    Attributes:
        group: The value that the layers read, and the layers.
        source: What the gate reads.
        nodes: HardSwish; or the Sigmoid, then the product.
        shifts: The Adds of a constant behind it, and at which input that is.
    """

    group: Group
    source: ir.Value
    nodes: tuple[ir.Node, ...]
    shifts: tuple[tuple[ir.Node, int], ...]

    @property
    def result(self) -> ir.Value:
        """What the gate makes."""
        return self.nodes[-1].outputs[0]

    @property
    def is_read_directly(self) -> bool:
        """Whether nothing stands between it and the layers."""
        return self.result is self.group.value

    def along(self, numbers: Array) -> Array:
        """Numbers of channels in a shape that broadcasts over places."""
        kernel = array_of(self.group.layers[0].weight)
        return numbers.reshape(-1, *[1] * (kernel.ndim - 2))

    def changes(self, scale: Array) -> list[Change] | None:
        """What divides the source and the shifts by ``scale``, ``None`` if that is not possible."""
        changes = fold(self.source, self.group.axis, 1 / scale)
        if changes is None:
            return None
        return changes + [Change(node, index, self.along(1 / scale)) for node, index in self.shifts]


def gates(graph: ir.Graph) -> list[Gate]:
    """The gates before convolutions whose argument can be divided without a node more."""
    found = []
    for group in groups(graph, convolutions=True):
        gate = _gate(group)
        if gate is not None and gate.changes(np.ones(group.channels)) is not None:
            found.append(gate)
    return found


def _gate(group: Group) -> Gate | None:
    readers = {(layer.node, layer.activation_index) for layer in group.layers}
    if set(graphs.consumers(group.value)) != readers or group.value.is_graph_output():
        return None
    shifts: list[tuple[ir.Node, int]] = []
    node = group.value.producer()
    while node is not None and (index := _constant_index(node)) is not None:
        if node.op_type == "Add":
            shifts.append((node, index))
        behind = node.inputs[1 - index]
        if behind is None or graphs.only_reader(behind) is None:
            return None
        node = behind.producer()
    source = None if node is None else node.inputs[0]
    if node is None or source is None or group.axis != 1:
        return None
    nodes: tuple[ir.Node, ...] = (node,)
    if graphs.is_op(node, "Mul"):
        for index in (0, 1):
            sigmoid = None if node.inputs[index] is None else node.inputs[index].producer()  # type: ignore[union-attr]
            source = node.inputs[1 - index]
            if sigmoid is not None and graphs.is_op(sigmoid, "Sigmoid") and sigmoid.inputs[0] is source:
                nodes = (sigmoid, node)
                break
        else:
            return None
    elif not graphs.is_op(node, "HardSwish"):
        return None
    if source is None or source.is_graph_output() or {reader for reader, _ in graphs.consumers(source)} != set(nodes):
        return None
    if len(nodes) > 1 and len(graphs.consumers(nodes[0].outputs[0])) != 1:
        return None
    return Gate(group, source, nodes, tuple(shifts))


def _constant_index(node: ir.Node) -> int | None:
    """Which input of a Mul or an Add is a constant that spreads over places; ``None`` for other nodes."""
    if not graphs.is_op(node, "Mul", "Add"):
        return None
    constants = [index for index, value in enumerate(node.inputs) if value is not None and graphs.is_constant(value)]
    if len(constants) != 1:
        return None
    value, other = node.inputs[constants[0]], node.inputs[1 - constants[0]]
    sizes, dimensions = array_of(value).shape, None if other is None else graphs.rank(other)
    if dimensions is None or len(sizes) > dimensions:
        return None
    padded = [1] * (dimensions - len(sizes)) + list(sizes)
    return constants[0] if all(size == 1 for axis, size in enumerate(padded) if axis != 1) else None


class LevelGates(InPlacePass):
    """Divide each channel of some gates' arguments and results by a number; the function stays.

    Before::

        x ─► HardSwish ─► Conv(W)

    After::

        x / s ─┬─► Mul(s) ─► HardSigmoid ─► Mul ─► Conv(s · W)
               └────────────────────────────►

    x·g(x) / s = (x / s)·g(s · (x / s)): the gate gets its argument back, and both what it reads and what it makes are
    level, which SmoothActivations cannot do because x·g(x) is no line. x / s costs nothing, as there.

    Args:
        scales: What to divide by, per channel, by the name of the gate's result; positive.

    Attributes:
        levelled: Names of the results that were.
    """

    def __init__(self, scales: Mapping[str, Array]) -> None:
        super().__init__()
        self.scales = {name: np.asarray(scale, np.float64) for name, scale in scales.items()}
        self.levelled: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        """Level every gate that has a scale."""
        for gate in gates(model.graph):
            scale = self.scales.get(gate.group.name)
            changes = None if scale is None else gate.changes(scale)
            if scale is None or changes is None or np.all(scale == 1):
                continue
            for change in changes:
                multiply(model.graph, change)
            _give_back(model.graph, gate, scale)
            self.levelled.append(gate.group.name)
            take_back(model.graph, gate.group, scale, changes)
        return PassResult(model, bool(self.levelled))


def _give_back(graph: ir.Graph, gate: Gate, scale: Array) -> None:
    """The Mul before the gate; HardSwish is written as its gate and the product."""
    value, source = gate.result, gate.source
    dtype = source.dtype or ir.DataType.FLOAT
    factor = new_initializer(graph, f"{value.name}_level", gate.along(scale).astype(dtype.numpy()), dtype)
    tape = ir.tape.Tape()
    argument = tape.op("Mul", [source, factor])
    tape.nodes[0].metadata_props[GATED] = "1"
    first = gate.nodes[0]
    made = [(argument, "argument")]
    if len(gate.nodes) == 2:
        first.replace_input_with(0, argument)
    else:
        opened = tape.op("HardSigmoid", [argument], {"alpha": 1 / 6, "beta": 0.5})
        product = tape.op("Mul", [source, opened])
        made += [(opened, "gate"), (product, "levelled")]
    for result, suffix in made:
        result.name, result.type, result.shape = f"{value.name}_{suffix}", source.type, source.shape
        producer = result.producer()
        assert producer is not None
        producer.name = f"{first.name}_{suffix}"
    graph.insert_before(first, tape.nodes)
    if len(gate.nodes) == 1:
        ir.convenience.replace_all_uses_with(value, product)
        graph.remove(first, safe=True)
        product.name, product.producer().name = value.name, first.name  # type: ignore[union-attr]
