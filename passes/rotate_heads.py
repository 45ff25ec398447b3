"""Turn the channels of attention's values within each head; the function stays."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.attention import attention_products
from onnxq.folding import array_of
from onnxq.rotation import rotate_constant, rotation

MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Identity", "Cast")


class RotateHeads(InPlacePass):
    """Multiply the values of every head by an orthogonal matrix, and the rows of the layer behind by its transpose.

    Before::

        v = MatMul(x, W₁) ─► heads ─► MatMul(probabilities, v) ─► heads together ─► MatMul(W₂)

    After, with one matrix R [size of a head, same] for all heads of the layer::

        v = MatMul(x, W₁·R) ─► … ─► MatMul(Rᵀ·W₂)

    Attention mixes positions, never the channels of a head, so that R goes through it; heads may share their values.
    Where values are read by something else (a cache of keys and values is one), nothing is turned.

    Source: R2 of Z. Liu et al., SpinQuant, ICLR 2025 (arXiv 2405.16406), random as in QuaRot (arXiv 2404.00456).

    Args:
        seed: Of the random matrices.

    Attributes:
        rotated: Names of the products of probabilities and values whose heads were turned.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.rotated: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        """Turn what can be turned."""
        for node in list(attention_products(model.graph)):
            found = _attention(node)
            if found is None:
                continue
            matrix = rotation(found.size, self.seed)
            for owner, index, axis in found.constants:
                rotate_constant(model.graph, owner, index, axis, matrix)
            for value in found.values:
                value.name = f"{value.name}_rotated"  # it is not what the float model calls by that name
            self.rotated.append(node.name or "")
        return PassResult(model, bool(self.rotated))


@dataclass(frozen=True)
class _Attention:
    """The size of a head, the constants that are turned along an axis, run by run of that size, and what is between."""

    size: int
    constants: list[tuple[ir.Node, int, int]]
    values: list[ir.Value]


def _attention(node: ir.Node) -> _Attention | None:
    """What a product of probabilities and values is between, if its heads can be turned."""
    size = None if node.inputs[1] is None else _last(node.inputs[1])
    if node.inputs[1] is None or size is None or size < 2:
        return None
    between: list[ir.Value] = []
    before = _layer_before(node.inputs[1], size, between)
    behind = _layer_behind(node.outputs[0], size, between)
    return None if before is None or behind is None else _Attention(size, before + behind, between)


def _layer_before(value: ir.Value, size: int, between: list[ir.Value]) -> list[tuple[ir.Node, int, int]] | None:
    """The layer that makes the values, reached through moves that keep the runs of a head's channels together."""
    constants: list[tuple[ir.Node, int, int]] = []
    while True:
        between.append(value)
        readers = [node for node, _ in graphs.consumers(value) if not graphs.is_op(node, "Shape")]
        node = value.producer()
        if len(set(readers)) != 1 or value.is_graph_output() or node is None:
            return None
        item = layer_nodes.weighted(node)
        if item is not None:
            return None if not _is_layer(item, size) else [*constants, (node, 1, item.channel_axis), *_bias(item)]
        if graphs.is_op(node, "Add"):
            bias = next((index for index, other in enumerate(node.inputs) if graphs.is_constant(other)), None)
            other = None if bias is None else node.inputs[1 - bias]
            if bias is None or other is None or _last(other) is None:
                return None
            shape = array_of(node.inputs[bias]).shape
            if not shape or shape[-1] != _last(other) or shape[-1] % size:
                return None
            constants.append((node, bias, len(shape) - 1))
            value = other
        elif not graphs.is_op(node, *MOVES) or node.inputs[0] is None or not _keeps_runs(node, size):
            return None
        else:
            value = node.inputs[0]


def _layer_behind(value: ir.Value, size: int, between: list[ir.Value]) -> list[tuple[ir.Node, int, int]] | None:
    """The layer that alone reads the heads once they are put together."""
    while True:
        between.append(value)
        readers = [(node, index) for node, index in graphs.consumers(value) if not graphs.is_op(node, "Shape")]
        if len(readers) != 1 or value.is_graph_output():
            return None
        node, index = readers[0]
        item = layer_nodes.weighted(node)
        if item is not None:
            fits = item.activation_index == index == 0 and _is_layer(item, size)
            return [(node, 1, item.reduction_axis)] if fits else None
        if index != 0 or not graphs.is_op(node, *MOVES) or not _keeps_runs(node, size):
            return None
        value = node.outputs[0]


def _keeps_runs(node: ir.Node, size: int) -> bool:
    """Whether runs of ``size`` numbers along the last axis are still such runs behind the node."""
    source, output = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or output.shape is None:
        return False
    if graphs.is_op(node, "Transpose"):
        return list(node.attributes.get_ints("perm", []))[-1:] == [len(source.shape) - 1]
    before, after = _last(source), _last(output)
    if graphs.is_op(node, "Expand") and before != after:
        return False
    return before is not None and after is not None and before % size == 0 and after % size == 0


def _is_layer(item: layer_nodes.WeightedNode, size: int) -> bool:
    if item.node.op_type not in ("MatMul", "Gemm") or item.weight_index != 1 or item.weight is None:
        return False
    if item.node.attributes.get_int("transA", 0) or not graphs.is_constant(item.weight):
        return False
    bias = item.node.inputs[2] if len(item.node.inputs) > 2 else None
    shape = array_of(item.weight).shape
    if len(shape) != 2 or not graphs.is_float(item.weight) or any(length % size for length in shape):
        return False
    return bias is None or (graphs.is_constant(bias) and array_of(bias).shape[-1:] == (shape[item.channel_axis],))


def _bias(item: layer_nodes.WeightedNode) -> list[tuple[ir.Node, int, int]]:
    bias = item.node.inputs[2] if len(item.node.inputs) > 2 else None
    return [] if bias is None else [(item.node, 2, len(array_of(bias).shape) - 1)]


def _last(value: ir.Value | None) -> int | None:
    size = None if value is None or not value.shape else value.shape[-1]
    return size if isinstance(size, int) else None
