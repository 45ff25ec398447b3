"""Even out the ranges of a convolution's output channels against those of the layer that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import along_reads, rename_rescaled

Array = np.ndarray[Any, Any]

ROUNDS = 200  # layers share neighbours, so it is repeated until nothing moves; most networks need 10 to 30
SETTLED = 1.01  # scales nearer to 1 than this change nothing that rounding sees
LAYERS = ("Conv", "Gemm", "MatMul")
HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")  # f(s·x) = s·f(x) for every s > 0; a Relu6 or Clip is not


class EqualizeLayers(InPlacePass):
    """Give every channel between two layers the same range on both sides; the function stays as it was.

    Before::

        x ─► Conv(W1, b1) ─► Relu ─► Conv(W2) ─► y

    After, with s = sqrt(range(W1) / range(W2)) per channel::

        x ─► Conv(W1 / s, b1 / s) ─► Relu ─► Conv(W2 · s) ─► y

    Between them is nothing, or a Relu, LeakyRelu or PRelu, and nobody else reads what is between. Grouped and
    depthwise convolutions count as well; a bias may be an Add after a Gemm or MatMul. Shared weights are left alone.
    Running it again changes nothing, because ranges that are even stay even.

    Source: M. Nagel et al., Data-free quantization through weight equalization and bias correction, ICCV 2019,
    eq. 11. Departures: Clip is skipped, not replaced by Relu; large biases are not absorbed (eq. 14).
    """

    def call(self, model: ir.Model) -> PassResult:
        """Equalize until the ranges have settled."""
        pairs = _pairs(model.graph)
        moved: dict[_Pair, None] = {}  # in order
        for _ in range(ROUNDS):
            moving = [pair for pair in pairs if _equalize(pair)]
            if not moving:
                break
            moved |= dict.fromkeys(moving)
        for pair in moved:
            rename_rescaled(model.graph, [pair.first.node], [pair.second.node])
        return PassResult(model, bool(moved))


@dataclass(frozen=True)
class _Pair:
    """Two layers and what is per channel between them.

    Attributes:
        first: The layer that makes the channels.
        second: The layer that reads them.
        bias: The first layer's bias, or ``None``.
    """

    first: layer_nodes.WeightedNode
    second: layer_nodes.WeightedNode
    bias: ir.Value | None


def _pairs(graph: ir.Graph) -> list[_Pair]:
    found = []
    for first in layer_nodes.weighted_nodes(graph):
        pair = _pair(first)
        if pair is not None:
            found.append(pair)
    return found


def _pair(first: layer_nodes.WeightedNode) -> _Pair | None:
    if not _can_scale(first):
        return None
    bias = first.node.inputs[2] if len(first.node.inputs) > 2 else None
    channels = _size(first.weight, first.channel_axis)
    node = first.node
    while (reader := graphs.only_reader(node.outputs[0])) is not None:
        if bias is None and node is first.node and node.op_type != "Conv" and graphs.is_op(reader, "Add"):
            bias = next((value for value in reader.inputs if graphs.is_constant(value)), None)
            if bias is None:
                return None
        elif not graphs.is_op(reader, *HOMOGENEOUS) or reader.inputs[0] is not node.outputs[0]:
            break
        elif reader.op_type == "PRelu" and not graphs.is_constant(reader.inputs[1]):
            return None
        node = reader
    second = None if reader is None else layer_nodes.weighted(reader)
    if second is None or not _can_scale(second) or second.activation is not node.outputs[0]:
        return None
    if (first.node.op_type == "Conv") != (second.node.op_type == "Conv") or channels != _channels_read(second):
        return None
    if second.node.attributes.get_int("transA", 0):
        return None  # it reads the channels as rows
    if bias is not None and not _per_channel(bias, channels):
        return None
    return _Pair(first, second, bias)


def _can_scale(item: layer_nodes.WeightedNode) -> bool:
    """Whether the layer's weight is its own float constant on the right."""
    if item.node.op_type not in LAYERS or item.weight_index != 1 or item.weight is None or not _own(item.weight):
        return False
    dimensions = graphs.rank(item.weight)
    return graphs.is_float(item.weight) and dimensions is not None and (item.node.op_type == "Conv" or dimensions == 2)


def _own(value: ir.Value) -> bool:
    """Whether one input alone reads the constant."""
    return graphs.is_constant(value) and value.const_value is not None and len(value.uses()) == 1


def _size(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.const_value is None or not len(value.const_value.shape):
        return None
    return int(value.const_value.shape.numpy()[axis])


def _per_channel(bias: ir.Value, channels: int | None) -> bool:
    if not _own(bias) or not graphs.is_float(bias) or bias.const_value is None:
        return False
    return _size(bias, -1) == channels and bias.const_value.size == channels


def _channels_read(item: layer_nodes.WeightedNode) -> int | None:
    size = _size(item.weight, item.reduction_axis)
    return None if size is None else size * item.node.attributes.get_int("group", 1)


def _equalize(pair: _Pair) -> bool:
    """One step of eq. 11; whether anything moved."""
    first, second = _numbers(pair.first.weight), _numbers(pair.second.weight)
    ranges = _ranges(first, pair.first.channel_axis)
    read = _ranges_read(second, pair.second)
    alive = (ranges > 0) & (read > 0)  # a dead channel keeps its scale
    scale = np.where(alive, np.sqrt(np.where(alive, ranges, 1.0) / np.where(alive, read, 1.0)), 1.0)
    if np.all(np.maximum(scale, 1 / scale) < SETTLED):
        return False
    _write(pair.first.weight, first / _along(scale, first.ndim, pair.first.channel_axis))
    _write(pair.second.weight, second * along_reads(pair.second, scale, second.shape))
    if pair.bias is not None:
        _write(pair.bias, _numbers(pair.bias) / scale)
    return True


def _ranges(weight: Array, axis: int) -> Array:
    """The largest magnitude of each index of an axis."""
    largest: Array = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1).max(axis=1)
    return largest


def _ranges_read(weight: Array, item: layer_nodes.WeightedNode) -> Array:
    """The largest weight that reads each channel: of a grouped convolution, those of its group alone."""
    if item.node.op_type != "Conv":
        return _ranges(weight, item.reduction_axis)
    groups = item.node.attributes.get_int("group", 1)
    by_group = np.abs(weight).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    largest: Array = by_group.max(axis=(1, 3)).reshape(-1)
    return largest


def _along(scale: Array, dimensions: int, axis: int) -> Array:
    return scale.reshape([-1 if index == axis % dimensions else 1 for index in range(dimensions)])


def _numbers(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _write(value: ir.Value | None, array: Array) -> None:
    assert value is not None and value.const_value is not None
    dtype = value.const_value.dtype
    value.const_value = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=value.name)
