"""Scale the channels of activations down and the weights that read them up, without a node more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import Change, along_reads, array_of, fold, multiply, new_initializer, rename_rescaled

Array = np.ndarray[Any, Any]

SMOOTHED = "onnxq.smoothed"  # on the layers whose weights have taken a scale: a second one would undo the first


@dataclass(frozen=True)
class Group:
    """A value and the layers that read it: what one scale per channel is for.

    Attributes:
        value: The activation.
        layers: The Conv, Gemm and MatMul nodes with a constant weight that read it.
        axis: The value's axis of channels, counted from the front (or −1, −2 where its rank is unknown).
        channels: How many there are.
    """

    value: ir.Value
    layers: tuple[layer_nodes.WeightedNode, ...]
    axis: int
    channels: int

    @property
    def name(self) -> str:
        """The value's name."""
        return self.value.name or ""

    def kernel(self, layer: layer_nodes.WeightedNode) -> Array:
        """The layer's weight as [output channels, channels that each reads, taps of the kernel]."""
        weight = array_of(layer.weight)
        if layer.node.op_type == "Conv":
            return weight.reshape(*weight.shape[:2], -1)
        moved: Array = np.moveaxis(weight, layer.reduction_axis, -1)
        return moved.reshape(-1, self.channels, 1)

    def channels_read(self, layer: layer_nodes.WeightedNode, outputs: int) -> Array:
        """Which of the value's channels each output channel reads, [output channels, channels that each reads]."""
        count = layer.node.attributes.get_int("group", 1) if layer.node.op_type == "Conv" else 1
        by_group = np.arange(self.channels).reshape(count, -1)
        read: Array = np.repeat(by_group, outputs // count, axis=0)
        return read

    def matrix(self, layer: layer_nodes.WeightedNode) -> Array:
        """The layer's weight as [output channels, channels of the value]; a kernel as its largest magnitudes."""
        kernel = self.kernel(layer)
        if layer.node.op_type != "Conv":
            return kernel[:, :, 0]
        largest = np.abs(kernel).max(axis=2)  # [out, in / groups]
        by_group = largest.reshape(self.channels // kernel.shape[1], -1, kernel.shape[1])
        spread: Array = by_group.transpose(1, 0, 2).reshape(-1, self.channels)
        return spread


def groups(graph: ir.Graph, convolutions: bool = False) -> list[Group]:
    """Values that are read by layers with constant weights, with all of those layers.

    Args:
        graph: A float graph.
        convolutions: Whether convolutions count as layers.
    """
    found: dict[tuple[int, int], list[layer_nodes.WeightedNode]] = {}
    for item in layer_nodes.weighted_nodes(graph):
        if item.node.op_type == "ConvTranspose" or (item.node.op_type == "Conv" and not convolutions):
            continue
        if item.weight is None or not graphs.is_constant(item.weight) or item.weight.const_value is None:
            continue
        if graphs.is_float(item.weight) and SMOOTHED not in item.node.metadata_props:
            found.setdefault((id(item.activation), _channel_axis(item)), []).append(item)
    result = []
    for (_, axis), layers in found.items():
        first = layers[0]
        shape = array_of(first.weight).shape
        channels = shape[first.reduction_axis]
        if first.node.op_type == "Conv":
            channels *= first.node.attributes.get_int("group", 1)
        result.append(Group(first.activation, tuple(layers), axis, int(channels)))
    return result


def _channel_axis(item: layer_nodes.WeightedNode) -> int:
    rank = graphs.rank(item.activation)
    if item.node.op_type == "Conv":
        return 1
    transposed = item.node.op_type == "Gemm" and bool(item.node.attributes.get_int("transA", 0))
    axis = -2 if transposed or item.activation_index == 1 else -1
    return axis if rank is None else axis + rank


class SmoothActivations(InPlacePass):
    """Divide each channel of some values by a number, and multiply the weights that read it; the function stays.

    Before::

        x ─► LayerNormalization(g, b) ─► y ─► MatMul(W)

    After::

        x ─► LayerNormalization(g / s, b / s) ─► y / s ─► MatMul(s · W)

    A value can be divided where its producer is LayerNormalization, RMSNormalization, BatchNormalization, a Mul, Div
    or Add with a constant (as norms that an exporter took apart end in), a Conv, Gemm or MatMul with a constant
    weight, or one of these behind Relu, LeakyRelu, PRelu, pooling, Transpose, or one factor of a product; and where
    nothing but the given layers reads the value. Initializers that others read too are copied first.

    Args:
        scales: What to divide by, per channel, by the name of a :class:`Group`'s value; positive.
        insert: Where a value cannot be divided offline, divide it by one Mul before the layers; ``False`` leaves it.
        convolutions: Whether convolutions count as layers.

    Attributes:
        folded: Names of the values whose scale went into initializers.
        inserted: Names of those that got a Mul.
    """

    def __init__(self, scales: Mapping[str, Array], *, insert: bool = False, convolutions: bool = False) -> None:
        super().__init__()
        self.scales = {name: np.asarray(scale, np.float64) for name, scale in scales.items()}
        self.insert, self.convolutions = insert, convolutions
        self.folded: list[str] = []
        self.inserted: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        """Apply every scale once."""
        for group in groups(model.graph, self.convolutions):
            scale = self.scales.get(group.name)
            if scale is None or scale.shape != (group.channels,) or np.all(scale == 1):
                continue
            changes = divided(group, scale)
            if changes is not None:
                for change in changes:
                    multiply(model.graph, change)
                self.folded.append(group.name)
                take_back(model.graph, group, scale, changes)
            elif self.insert:
                _insert_mul(model.graph, group, scale)
                self.inserted.append(group.name)
                take_back(model.graph, group, scale)
        return PassResult(model, bool(self.folded or self.inserted))


def is_foldable(group: Group) -> bool:
    """Whether the group's value can be divided without a node more."""
    return divided(group, np.ones(group.channels)) is not None


def divided(group: Group, scale: Array) -> list[Change] | None:
    """The changes that divide the group's value by ``scale`` along its channels, ``None`` if that is not possible."""
    readers = {(layer.node, layer.activation_index) for layer in group.layers}
    uses = {use for use in graphs.consumers(group.value) if not graphs.is_op(use[0], "Shape", "Size")}
    if uses != readers or group.value.is_graph_output():
        return None
    return fold(group.value, group.axis, 1 / scale)


def take_back(graph: ir.Graph, group: Group, scale: Array, changes: Sequence[Change] = ()) -> None:
    """Let the layers of a group take back what its value was divided by.

    Args:
        graph: The graph.
        group: The value and its layers, which are marked as having taken a scale.
        scale: What the value was divided by, per channel.
        changes: What divided it, where constants did; values from there to the layers get other names.
    """
    _scale_weights(graph, group, scale)
    for layer in group.layers:
        layer.node.metadata_props[SMOOTHED] = "1"
    rename_rescaled(graph, (change.node for change in changes), {layer.node for layer in group.layers})


def _scale_weights(graph: ir.Graph, group: Group, scale: Array) -> None:
    """Multiply the weights of all layers; a weight that only these layers read is written once and stays shared."""
    written: dict[ir.Value, ir.Value] = {}
    for layer in group.layers:
        node, weight, index = layer.node, layer.weight, layer.weight_index
        assert weight is not None and index is not None
        if weight in written and layer.node.op_type != "Conv":
            node.replace_input_with(index, written[weight])
            continue
        array = array_of(weight)
        factor = along_reads(layer, scale, array.shape)
        if layer.node.op_type != "Conv" and _same_axis(group, weight):
            assert weight.dtype is not None
            product = (array.astype(np.float64) * factor).astype(weight.dtype.numpy())
            new = new_initializer(graph, f"{weight.name}_smoothed", product, weight.dtype)
            written[weight] = new
            node.replace_input_with(index, new)
        else:
            multiply(graph, Change(node, index, factor))


def _same_axis(group: Group, weight: ir.Value) -> bool:
    """Whether several layers of the group read this weight, all along the same axis."""
    axes = [layer.reduction_axis for layer in group.layers if layer.weight is weight]
    return len(axes) > 1 and len(set(axes)) == 1


def _insert_mul(graph: ir.Graph, group: Group, scale: Array) -> None:
    """One Mul between the value and the layers of the group; other readers keep the value as it is."""
    value = group.value
    axis = group.axis if group.axis < 0 else group.axis - (graphs.rank(value) or 0)
    array = (1 / scale).reshape(-1, *[1] * (-axis - 1))
    dtype = value.dtype or ir.DataType.FLOAT
    factor = new_initializer(graph, f"{value.name}_smoothing", array.astype(dtype.numpy()), dtype)
    tape = ir.tape.Tape()
    smoothed = tape.op("Mul", [value, factor])
    smoothed.name, smoothed.type, smoothed.shape = f"{value.name}_smoothed", value.type, value.shape
    tape.nodes[0].name = f"{value.name}_smooth"
    first = next(node for node in graph if any(node is layer.node for layer in group.layers))
    graph.insert_before(first, tape.nodes)
    for layer in group.layers:
        layer.node.replace_input_with(layer.activation_index, smoothed)
