"""Make a sum of several layers of one that reads a Concat, so that each part is rounded in its own range."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import array_of, new_initializer

Array = np.ndarray[Any, Any]

PARTIAL_SUM = "onnxq.partial_sum"  # on the Add that joins two parts: neither operand is worth a rounding of its own

# Ops whose output at a place follows from their input at that place, so that they can as well stand before the Concat.
ELEMENTWISE = (
    "Relu", "LeakyRelu", "ThresholdedRelu", "Clip", "Elu", "Selu", "Celu", "Gelu", "Mish", "Softplus", "Softsign",
    "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Exp", "Abs", "Neg", "Sqrt", "Identity",
    "Add", "Sub", "Mul", "Div", "Pow",
)  # fmt: skip


@dataclass(frozen=True)
class Shortcut:
    """A layer that reads a Concat of channels.

    Attributes:
        layer: The Conv, Gemm or MatMul.
        between: The elementwise nodes from the Concat to the layer, in the order of the graph; often none.
        joined: What the Concat makes.
        parts: What it joins.
        sizes: The channels of each part.
    """

    layer: layer_nodes.WeightedNode
    between: tuple[ir.Node, ...]
    joined: ir.Value
    parts: tuple[ir.Value, ...]
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.node.name or ""

    @property
    def axis(self) -> int:
        """The axis of channels in the value that the layer reads, counted from the front."""
        return _channel_axis(self.layer)

    def split(self, numbers: Array, axis: int) -> list[Array]:
        """An array cut along the channels as the parts are."""
        return np.split(numbers, np.cumsum(self.sizes)[:-1], axis=axis)


def find_shortcuts(graph: ir.Graph) -> list[Shortcut]:
    """Every layer with a float constant weight that reads a Concat of its channels, if only through elementwise ops.

    A normalization in between mixes the parts, so that such a layer is none of them; grouped convolutions are left out.
    """
    order = {node: index for index, node in enumerate(graph)}
    found = [_shortcut(item, order) for item in layer_nodes.weighted_nodes(graph)]
    return [shortcut for shortcut in found if shortcut is not None]


class SplitShortcuts(InPlacePass):
    """Split layers that read a Concat into one layer for each part; the function stays as it was.

    Before::

        Concat(a, b) ─► f ─► Conv(W, bias) ─► y

    After::

        a ─► f ─► Conv(W[:, :n], bias) ─┐
                                        Add ─► y
        b ─► f ─► Conv(W[:, n:]) ───────┘

    f is any chain of elementwise ops with single numbers, SiLU for example. Each part then has scales of its own, of
    activations and of weights. Two scales at the inputs of the Concat instead would leave TensorRT no integer
    convolution, and its output one scale for both. Other readers of the Concat keep it. The first part keeps the
    layer's name and its bias; a Concat of Concats is split into all of their parts.

    Source: X. Li et al., Q-Diffusion: Quantizing Diffusion Models, ICCV 2023 (arXiv 2302.04304), section 3.2.

    Args:
        names: The layers to split; ``None`` for all that :func:`find_shortcuts` finds.

    Attributes:
        split: The names of the layers of all parts, by the name of the layer that they were.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        super().__init__()
        self.names = names
        self.split: dict[str, tuple[str, ...]] = {}

    def call(self, model: ir.Model) -> PassResult:
        """Split every such layer once."""
        for shortcut in find_shortcuts(model.graph):
            if self.names is None or shortcut.name in self.names:
                self.split[shortcut.name] = _split(model.graph, shortcut)
        if self.split:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(self.split))


def _shortcut(item: layer_nodes.WeightedNode, order: dict[ir.Node, int]) -> Shortcut | None:
    weight = item.weight
    if item.node.op_type == "ConvTranspose" or item.weight_index != 1 or not graphs.is_constant(weight):
        return None
    assert weight is not None
    if weight.const_value is None or not graphs.is_float(weight) or graphs.rank(item.activation) is None:
        return None
    if item.node.attributes.get_int("group", 1) != 1 or item.node.attributes.get_int("transA", 0) != 0:
        return None
    traced = _trace(item.activation, _channel_axis(item))
    if traced is None:
        return None
    concat, between = traced
    parts = _parts(concat, _channel_axis(item))
    sizes = [_size(part, _channel_axis(item)) for part in parts]
    if len(parts) < 2 or 0 in sizes or sum(sizes) != array_of(weight).shape[item.reduction_axis]:
        return None
    chain = tuple(sorted(between, key=order.__getitem__))
    return Shortcut(item, chain, concat.outputs[0], tuple(parts), tuple(sizes))


def _channel_axis(item: layer_nodes.WeightedNode) -> int:
    return 1 if item.node.op_type == "Conv" else (graphs.rank(item.activation) or 0) - 1


def _trace(value: ir.Value, axis: int) -> tuple[ir.Node, set[ir.Node]] | None:
    """The one Concat that a value comes from, and the elementwise nodes after it."""
    concat: ir.Node | None = None
    between: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer()
        if node is None or graphs.rank(current) != graphs.rank(value):
            return None
        if _joins(node, axis):
            if concat not in (None, node):
                return None
            concat = node
        elif not graphs.is_op(node, *ELEMENTWISE):
            return None
        elif node not in between:
            between.add(node)
            for operand in node.inputs:
                if operand is None or _is_number(operand, value):
                    continue
                waiting.append(operand)
    return None if concat is None else (concat, between)


def _is_number(operand: ir.Value, value: ir.Value) -> bool:
    if not graphs.is_constant(operand) or operand.const_value is None:
        return False
    return operand.const_value.size == 1 and (graphs.rank(operand) or 0) <= (graphs.rank(value) or 0)


def _joins(node: ir.Node, axis: int) -> bool:
    """Whether the node is a Concat along this axis."""
    rank = graphs.rank(node.outputs[0])
    return graphs.is_op(node, "Concat") and rank is not None and node.attributes.get_int("axis", 0) % rank == axis


def _parts(concat: ir.Node, axis: int) -> list[ir.Value]:
    """What a Concat joins, and what Concats among its inputs join."""
    parts: list[ir.Value] = []
    for value in concat.inputs:
        assert value is not None
        producer = value.producer()
        parts += _parts(producer, axis) if producer is not None and _joins(producer, axis) else [value]
    return parts


def _size(value: ir.Value, axis: int) -> int:
    """The size along an axis, 0 where it is not known."""
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else 0


def _split(graph: ir.Graph, shortcut: Shortcut) -> tuple[str, ...]:
    layer = shortcut.layer
    output, weight = layer.node.outputs[0], layer.weight
    assert weight is not None and weight.dtype is not None
    kernels = shortcut.split(array_of(weight), layer.reduction_axis)
    nodes: list[ir.Node] = []
    names: list[str] = []
    total: ir.Value | None = None
    for index, (part, kernel) in enumerate(zip(shortcut.parts, kernels, strict=True)):
        source = _repeat(shortcut, part, index, nodes)
        own = new_initializer(graph, f"{weight.name}_part{index}", kernel, weight.dtype)
        rest = layer.node.inputs[2:] if index == 0 else ()
        node = ir.Node(
            "", layer.node.op_type, [source, own, *rest], layer.node.attributes.values(), name=_name(layer.node, index)
        )
        node.metadata_props.update(layer.node.metadata_props)
        nodes.append(_described(node, f"{output.name}_part{index}", output, output.shape))
        names.append(node.name or "")
        if total is None:
            total = node.outputs[0]
            continue
        join = ir.Node("", "Add", [total, node.outputs[0]], name=f"{layer.node.name}_sum{index}")
        join.metadata_props[PARTIAL_SUM] = "1"
        nodes.append(_described(join, f"{output.name}_sum{index}", output, output.shape))
        total = join.outputs[0]
    assert total is not None
    graph.insert_before(layer.node, nodes)
    ir.convenience.replace_all_uses_with(output, total, replace_graph_outputs=True)
    name = output.name
    graph.remove(layer.node, safe=True)
    total.name = name
    return tuple(names)


def _name(layer: ir.Node, index: int) -> str:
    return layer.name or "" if index == 0 else f"{layer.name}_part{index}"


def _repeat(shortcut: Shortcut, part: ir.Value, index: int, nodes: list[ir.Node]) -> ir.Value:
    """The elementwise nodes once more, for one part alone."""
    new: dict[ir.Value, ir.Value] = {shortcut.joined: part}
    for node in shortcut.between:
        inputs = [None if value is None else new.get(value, value) for value in node.inputs]
        name = f"{shortcut.name}_{node.name}_part{index}"
        copy = ir.Node("", node.op_type, inputs, node.attributes.values(), name=name)
        old = node.outputs[0]
        nodes.append(_described(copy, f"{shortcut.name}_{old.name}_part{index}", old, part.shape))
        new[old] = copy.outputs[0]
    return new.get(shortcut.layer.activation, part)


def _described(node: ir.Node, name: str, like: ir.Value, shape: ir.Shape | None) -> ir.Node:
    """The node, with its output named and typed."""
    value = node.outputs[0]
    value.name, value.type, value.shape = name, like.type, shape
    return node
