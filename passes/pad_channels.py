"""Give depthwise convolutions of codes as many channels as onnxruntime's kernel takes at a time, or a multiple."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import POOLING, array_of, new_initializer
from onnxq.passes.split_shortcuts import ELEMENTWISE
from onnxq.rewriting import dequantize_apart

Array = np.ndarray[Any, Any]

LANES = 16  # channels that the kernel takes at a time; each one left over takes as long as two times sixteen
CODES = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32)
# Not finite where an added channel is zero, or made of several inputs in an order that matters.
UNFIT = ("Div", "Pow")


class PadChannels(InPlacePass):
    """Add channels of zeros around a depthwise convolution of codes, up to a multiple of 16.

    Before::

        x [24] ─► Conv(W [72, 24]) ─► depthwise Conv(W [72, 1]) ─► Conv(W [40, 72]) ─► y [40]

    After::

        x [24] ─► Conv(W [80, 24]) ─► depthwise Conv(W [80, 1]) ─► Conv(W [40, 80]) ─► y [40]

    The function stays the same: the weights that make the added channels are zero, and so are those that read them.
    All that has these channels grows with them, through Q/DQ, elementwise ops, poolings and gates, up to the
    convolutions at the edges. Where that meets anything else, nothing is changed.

    onnxruntime's depthwise kernel takes 16 channels at a time and those left over one by one: with 184 channels a
    layer of 28² takes 200 µs, with 192 it takes 89.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Pad around every depthwise convolution that qualifies."""
        return PassResult(model, any([_pad_around(model.graph, node) for node in list(model.graph)]))


def _pad_around(graph: ir.Graph, node: ir.Node) -> bool:
    """Pad the channels of a node if it is a depthwise convolution that has some left over; whether that was done."""
    channels = layer_nodes.depthwise_channels(node)
    if channels is None or channels % LANES == 0 or not all(map(graphs.is_dequantized, node.inputs[:2])):
        return False
    region = _region(node, channels)
    if region is None:
        return False
    count = -channels % LANES
    for padding in region.paddings:
        padding.write(graph, count)
    for layer in region.depthwise:
        layer.attributes["group"] = ir.AttrInt64("group", channels + count)
    for value in region.values:
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], channels + count, *value.shape[2:]])
    return True


@dataclass(frozen=True)
class _Padding:
    """An input to extend along an axis: by zeros, or by what it ends with."""

    node: ir.Node
    index: int
    axis: int
    by_zeros: bool = True

    def fits(self, channels: int) -> bool:
        """Whether the input is a constant, or codes of one, with so many numbers along the axis."""
        value = self.node.inputs[self.index]
        stored = _stored(value)
        if value is None or stored is None or not -stored.ndim <= self.axis < stored.ndim:
            return False
        return bool(stored.shape[self.axis] == channels)

    def write(self, graph: ir.Graph, count: int) -> None:
        """Extend it, for this reader alone."""
        value = self.node.inputs[self.index]
        assert value is not None
        pair = value.producer()
        if pair is None:
            end = _end(value, self.axis)
            _extend(graph, self.node, self.index, self.axis, count, np.zeros_like(end) if self.by_zeros else end)
            return
        if graphs.only_reader(value) is None:
            pair = dequantize_apart(graph, self.node, self.index, list(pair.inputs), dict(pair.attributes))
            value = pair.outputs[0]
        scales, codes = array_of(pair.inputs[1]), array_of(pair.inputs[0])
        zero_points = array_of(pair.inputs[2]) if len(pair.inputs) > 2 and pair.inputs[2] is not None else None
        axis, along = self.axis % codes.ndim, pair.attributes.get_int("axis", 1) % codes.ndim
        filling: Array = np.zeros(codes.shape, codes.dtype)
        if zero_points is not None:  # the codes of zero
            filling += zero_points.reshape(
                [-1 if zero_points.size > 1 and i == along else 1 for i in range(codes.ndim)]
            )
        _extend(graph, pair, 0, axis, count, np.take(filling, [-1], axis))
        if scales.size > 1 and along == axis:
            for index in range(1, len(pair.inputs)):
                _extend(graph, pair, index, 0, count, _end(pair.inputs[index], 0))
        value.shape = pair.inputs[0].shape if pair.inputs[0] is not None else None


def _stored(value: ir.Value | None) -> Array | None:
    """The numbers of a constant, or the codes that a DequantizeLinear makes it of."""
    if value is None:
        return None
    if graphs.is_constant(value):
        return array_of(value)
    pair = value.producer()
    if pair is None or not graphs.is_dequantize(pair) or not all(map(graphs.is_constant, pair.inputs)):
        return None
    codes = pair.inputs[0]
    if codes is None or codes.dtype not in CODES or pair.attributes.get_int("block_size", 0) != 0:
        return None
    return array_of(codes)


def _end(value: ir.Value | None, axis: int) -> Array:
    """The last slice of a constant along an axis."""
    return np.take(array_of(value), [-1], axis)


def _extend(graph: ir.Graph, node: ir.Node, index: int, axis: int, count: int, slice_: Array) -> None:
    """Write an initializer with a slice so many times behind it, in its place where nobody else reads it."""
    value = node.inputs[index]
    assert value is not None and value.dtype is not None
    longer = np.concatenate([array_of(value), np.repeat(slice_, count, axis)], axis)
    if len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value, value.shape = ir.Tensor(longer, dtype=value.dtype, name=value.name), ir.Shape(longer.shape)
        return
    node.replace_input_with(index, new_initializer(graph, f"{value.name}_padded", longer, value.dtype))


@dataclass
class _Region:
    """The values that have the same channels, and what has to grow with them."""

    values: dict[ir.Value, None] = field(default_factory=dict)
    paddings: dict[_Padding, None] = field(default_factory=dict)
    depthwise: dict[ir.Node, None] = field(default_factory=dict)


def _region(seed: ir.Node, channels: int) -> _Region | None:
    """All that has the channels of a depthwise convolution; ``None`` where part of it cannot grow."""
    region, open_ = _Region(), [seed.outputs[0]]
    while open_:
        value = open_.pop()
        if value in region.values:
            continue
        producer = value.producer()
        if producer is None or value.is_graph_output():
            return None
        region.values[value] = None
        for node in (producer, *(reader for reader, _ in graphs.consumers(value))):
            found = _tied(node, value, channels)
            if found is None:
                return None
            for item in found:
                if isinstance(item, ir.Value):
                    open_.append(item)
                elif item.fits(channels):
                    region.paddings[item] = None
                else:
                    return None
            if layer_nodes.depthwise_channels(node) is not None:
                region.depthwise[node] = None
    return region


def _tied(node: ir.Node, value: ir.Value, channels: int) -> list[ir.Value | _Padding] | None:
    """What has to grow because a node makes or reads a value with the channels; ``None`` where the node forbids it."""
    output = node.outputs[0]
    if graphs.is_op(node, *ELEMENTWISE, "PRelu", "Swish") and not graphs.is_op(node, "Clip", *UNFIT):
        return _tied_elementwise(node, channels)
    if any(operand is value for operand in node.inputs[1:]) or len(node.outputs) > 1:
        return None  # as a weight; or a MaxPool that gives places, too, which count channels
    if graphs.is_op(node, "Conv"):
        return _tied_by_convolution(node, value)
    if graphs.is_quantize(node) or graphs.is_dequantize(node):
        return [*_data(node), *_scales(node)]
    if graphs.is_op(node, *POOLING):
        return _data(node)
    if graphs.is_op(node, "ReduceMean") and node.attributes.get_int("keepdims", 1) != 0 and len(node.inputs) > 1:
        axes = node.inputs[1]
        over = array_of(axes).reshape(-1).tolist() if graphs.is_constant(axes) else [1]
        return _data(node) if over and {1, 1 - (graphs.rank(output) or 1)}.isdisjoint(over) else None
    if graphs.is_op(node, "Resize"):
        scales = node.inputs[2] if len(node.inputs) > 2 else None
        resized = graphs.is_constant(scales) and array_of(scales).size > 1 and array_of(scales)[1] == 1
        return _data(node) if resized and "axes" not in node.attributes else None
    if graphs.is_op(node, "Pad"):
        amounts = node.inputs[1]
        ends = array_of(amounts).reshape(2, -1) if graphs.is_constant(amounts) else np.ones((2, 2))
        return _data(node) if len(node.inputs) < 4 and not ends[:, 1].any() else None
    return _data(node) if graphs.is_op(node, "Clip") else None


def _data(node: ir.Node) -> list[ir.Value | _Padding]:
    """The first input and the output of a node that keeps channels apart."""
    return [value for value in (node.inputs[0], node.outputs[0]) if value is not None]


def _scales(pair: ir.Node) -> Iterable[_Padding]:
    """Scales and zero points of a pair, where there is one for each channel."""
    for index in range(1, len(pair.inputs)):
        value = pair.inputs[index]
        if value is not None and not (graphs.is_constant(value) and array_of(value).size == 1):
            yield _Padding(pair, index, 0, by_zeros=False)


def _tied_by_convolution(node: ir.Node, value: ir.Value) -> list[ir.Value | _Padding] | None:
    """Its weight and bias; of one in groups there would be several places to grow."""
    is_depthwise = layer_nodes.depthwise_channels(node) is not None
    if not is_depthwise and node.attributes.get_int("group", 1) > 1:
        return None
    found = _data(node) if is_depthwise else []
    if is_depthwise or value is node.outputs[0]:
        has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
        found += [_Padding(node, 1, 0), *([_Padding(node, 2, 0)] if has_bias else [])]
    if not is_depthwise and value is node.inputs[0]:
        found.append(_Padding(node, 1, 1))
    return found


def _tied_elementwise(node: ir.Node, channels: int) -> list[ir.Value | _Padding] | None:
    """Both operands, those aside that are the same for each channel."""
    output = node.outputs[0]
    size = graphs.rank(output)
    if size is None or size < 2:
        return None
    found: list[ir.Value | _Padding] = [output]
    for index, operand in enumerate(node.inputs):
        if operand is None:
            continue
        stored = _stored(operand)
        if stored is not None:
            is_for_each = stored.ndim > size - 2 and stored.shape[1 - size] != 1
            found += [_Padding(node, index, 1 - size)] if is_for_each else []
            continue
        shape = operand.shape
        if shape is None or len(shape) != size or shape[1] not in (1, channels):
            return None
        found += [operand] if shape[1] == channels else []
    return found
