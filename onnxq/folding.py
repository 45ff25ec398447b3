"""Scale the channels of a value by changing the constants that make it, without a node more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes

Array = np.ndarray[Any, Any]

# y = f(x) per channel with f(x / s) = f(x) / s for every s > 0.
HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout")
# Ops whose channels are surely last where no rank is known.
LAST_CHANNELS = ("LayerNormalization", "RMSNormalization", "Gemm", "MatMul", "Mul", "Add", "Relu", "LeakyRelu")
POOLING = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


@dataclass(frozen=True)
class Change:
    """An initializer to multiply: the node that reads it, at which input, and by what (broadcast)."""

    node: ir.Node
    index: int
    factor: Array


def fold(value: ir.Value, axis: int, factor: Array) -> list[Change] | None:
    """The changes that multiply a value by a factor per channel.

    Args:
        value: The value; all of its readers have to expect the change.
        axis: Its axis of channels, counted from the front; -1 where its rank is unknown.
        factor: Positive, one number per channel.

    Returns:
        The initializers to change, ``None`` if the value's producer takes no factor.
    """
    node = value.producer()
    if axis < 0 and not (axis == -1 and graphs.is_op(node, *LAST_CHANNELS)):
        return None
    if node is None or node.domain not in graphs.ONNX_DOMAINS or value is not node.outputs[0]:
        return None
    if len([output for output in node.outputs if output.uses()]) > 1:
        return None
    last = axis == -1 or (graphs.rank(value) is not None and axis == (graphs.rank(value) or 0) - 1)
    if node.op_type in ("LayerNormalization", "RMSNormalization", "BatchNormalization"):
        along = axis == 1 if node.op_type == "BatchNormalization" else last
        return _constants(node, (1, 2), factor) if along and _size(node.inputs[1]) == factor.size else None
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        return _fold_into_product(node, axis, last, factor)
    if node.op_type in ("Mul", "Div", "Add", "Sub"):
        return _fold_into_arithmetic(node, axis, factor)
    if node.op_type == "Clip" and _is_relu(node):
        return _through(node, axis, factor)
    if node.op_type == "PRelu" and not graphs.is_constant(node.inputs[1]):
        return None
    if node.op_type in HOMOGENEOUS or (node.op_type in POOLING and axis == 1):
        return _through(node, axis, factor)
    if node.op_type == "Transpose" and axis >= 0:
        permutation = list(node.attributes.get_ints("perm", []))
        return _through(node, permutation[axis], factor) if permutation else None
    return None


def _through(node: ir.Node, axis: int, factor: Array, index: int = 0) -> list[Change] | None:
    """The same question for an input that this node alone reads."""
    source = node.inputs[index]
    if source is None or graphs.is_constant(source) or source.is_graph_output() or len(source.uses()) != 1:
        return None
    return fold(source, axis, factor)


def _fold_into_product(node: ir.Node, axis: int, last: bool, factor: Array) -> list[Change] | None:
    item = layer_nodes.weighted(node)
    if item is None or item.weight_index is None or item.weight is None or item.weight.shape is None:
        return None
    if item.weight.shape[item.channel_axis] != factor.size:
        return None
    if node.op_type == "Conv":
        if axis != 1:
            return None
        changes = _constants(node, (1,), factor.reshape(-1, *[1] * (len(item.weight.shape) - 1)))
        return _with_bias(node, changes, factor)
    if item.weight_index != 1 or not last:
        return None
    shape = [factor.size if index == item.channel_axis else 1 for index in range(len(item.weight.shape))]
    changes = _constants(node, (1,), factor.reshape(shape))
    return _with_bias(node, changes, factor) if node.op_type == "Gemm" else changes


def _with_bias(node: ir.Node, changes: list[Change] | None, factor: Array) -> list[Change] | None:
    if changes is None or len(node.inputs) < 3 or node.inputs[2] is None:
        return changes
    bias = _constants(node, (2,), factor)
    return None if bias is None else changes + bias


def _fold_into_arithmetic(node: ir.Node, axis: int, factor: Array) -> list[Change] | None:
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None or left is right:
        return None
    constants = [index for index, value in enumerate((left, right)) if graphs.is_constant(value)]
    if len(constants) == 2:
        return None
    rank = graphs.rank(node.outputs[0])
    if constants:
        index = constants[0]
        value = node.inputs[index]
        assert value is not None
        shaped = _along(axis, rank, 1 / factor if node.op_type == "Div" and index == 1 else factor)
        # A constant of more axes than the value, or of another size along this one, is no constant per channel.
        if shaped is None or not _keeps_rank(value, node.inputs[1 - index], rank):
            return None
        changes = _constants(node, (index,), shaped)
        if changes is None or node.op_type in ("Mul", "Div"):
            return changes
        rest = _through(node, axis, factor, 1 - index)
        return None if rest is None else changes + rest
    if node.op_type in ("Mul", "Div"):
        same_rank = rank is not None and graphs.rank(left) == graphs.rank(right) == rank
        if axis >= 0 and not same_rank:
            return None
        for index in (1, 0) if node.op_type == "Mul" else (0,):
            operand = node.inputs[index]
            assert operand is not None
            if not _has_channels(operand, axis, factor.size):
                continue
            changes = _through(node, axis, factor, index)
            if changes is not None:
                return changes
    return None


def _has_channels(value: ir.Value, axis: int, size: int) -> bool:
    """Whether the value is known to have so many numbers along the axis (and is not broadcast there)."""
    return value.shape is not None and value.shape[axis] == size


def _keeps_rank(constant: ir.Value, other: ir.Value | None, rank: int | None) -> bool:
    size = graphs.rank(constant)
    if size is None:
        return False
    if rank is None:
        return size <= 1
    return other is not None and graphs.rank(other) == rank and size <= rank


def _along(axis: int, rank: int | None, factor: Array) -> Array | None:
    """The factor in a shape that broadcasts along an axis of a value."""
    if axis == -1:
        return factor
    if rank is None or axis < 0:
        return None
    return factor.reshape(-1, *[1] * (rank - axis - 1))


def _size(value: ir.Value | None) -> int:
    return 0 if value is None or value.const_value is None else int(value.const_value.size)


def _is_relu(node: ir.Node) -> bool:
    low = node.inputs[1] if len(node.inputs) > 1 else None
    high = node.inputs[2] if len(node.inputs) > 2 else None
    if low is None or not graphs.is_constant(low) or np.any(array_of(low) != 0):
        return False
    return high is None or (graphs.is_constant(high) and bool(np.all(np.isinf(array_of(high)))))


def _constants(node: ir.Node, indices: Sequence[int], factor: Array) -> list[Change] | None:
    """Changes for inputs that must be constant floats where they are there at all."""
    changes = []
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            continue
        if not graphs.is_constant(value) or value.const_value is None or not graphs.is_float(value):
            return None
        changes.append(Change(node, index, factor))
    return changes


def along_reads(layer: layer_nodes.WeightedNode, scale: Array, shape: Sequence[int]) -> Array:
    """The scale of each channel that a layer reads, in a shape that broadcasts over its weight of this ``shape``."""
    if layer.node.op_type != "Conv":
        axis = layer.reduction_axis % len(shape)
        return scale.reshape([-1 if index == axis else 1 for index in range(len(shape))])
    count = layer.node.attributes.get_int("group", 1)
    by_output = np.repeat(scale.reshape(count, -1), shape[0] // count, axis=0)  # [out, in / groups]
    return by_output.reshape(*by_output.shape, *[1] * (len(shape) - 2))


def rename_rescaled(graph: ir.Graph, sources: Iterable[ir.Node], layers: Collection[ir.Node]) -> None:
    """Give values other names that no longer are what the float model calls so.

    Args:
        graph: The graph.
        sources: The nodes whose constants changed.
        layers: The layers that take the change back.
    """
    seen, open_, names = set(layers), list(sources), graphs.Names(graph)
    while open_:
        node = open_.pop()
        if node in seen or graphs.is_op(node, "Shape", "Size"):
            continue
        seen.add(node)
        for output in node.outputs:
            output.name = names.free(f"{output.name}_rescaled")
            open_ += [reader for reader, _ in graphs.consumers(output)]


def multiply(graph: ir.Graph, change: Change) -> None:
    """Write the product into the initializer, or into a copy of it where others read it too."""
    value = change.node.inputs[change.index]
    assert value is not None and value.dtype is not None
    product = np.asarray(array_of(value).astype(np.float64) * change.factor).astype(value.dtype.numpy())
    if len(value.uses()) == 1 and not value.is_graph_output() and product.shape == array_of(value).shape:
        value.const_value = ir.Tensor(product, dtype=value.dtype, name=value.name)
        return
    change.node.replace_input_with(change.index, new_initializer(graph, f"{value.name}_smoothed", product, value.dtype))


def new_initializer(
    graph: ir.Graph, name: str, array: Array, dtype: ir.DataType, names: graphs.Names | None = None
) -> ir.Value:
    """Register an initializer; a name that is taken, by whatever in the graph, is made longer."""
    name = (names or graphs.Names(graph)).free(name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
    value.const_value = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name)
    graph.register_initializer(value)
    return value


def array_of(value: ir.Value | None) -> Array:
    """The numbers of a constant."""
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()
