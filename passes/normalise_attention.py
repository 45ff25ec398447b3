"""Normalise the queries and keys of attention, so that they reach equally far in every step of a sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.attention import attention_products
from onnxq.folding import new_initializer

EPSILON = 1e-6
NORMALISED = "onnxq.normalised"  # on the products whose operands are: a second time would undo what was trained
BETWEEN = ("Softmax", "Mul", "Div", "Add", "Where", "Cast", "IsNaN", "Identity", "Reshape", "Clip", "Max")


@dataclass(frozen=True)
class Operand:
    """One side of q · kᵀ.

    Attributes:
        product: The MatMul.
        position: Which of its inputs.
        channels: The size of its axis of channels, the last of q and the last but one of kᵀ.
    """

    product: ir.Node
    position: int
    channels: int

    @property
    def value(self) -> ir.Value:
        """What is normalised."""
        value = self.product.inputs[self.position]
        assert value is not None
        return value

    @property
    def axis(self) -> int:
        """Of its channels, counted from the end."""
        return -2 if self.position else -1


def operands(graph: ir.Graph) -> list[Operand]:
    """Both sides of every q · kᵀ whose channels are known; softmax(q · kᵀ) · v tells which products these are."""
    found = []
    for product in _scores(graph):
        pair = [_operand(product, position) for position in (0, 1)]
        if NORMALISED not in product.metadata_props:
            found += [item for item in pair if item is not None]
    return found


class NormaliseAttention(InPlacePass):
    """Bring queries and keys to mean 0 and deviation 1 over the channels of each token, times a gain that trains.

    Before::

        q, kᵀ ─► MatMul ─► … ─► Softmax

    After::

        q ─► LayerNormalization(gain) ─┐
        kᵀ ─► Transpose ─► LayerNormalization(gain) ─► Transpose ─► MatMul ─► … ─► Softmax

    This is another function: the network has to be trained with it.

    Source: Y. Li et al., Q-DM, NeurIPS 2023, as others describe it; Q-ViT (arXiv 2210.06707) normalises them likewise.

    Args:
        gains: By name of the value: what all its gains start at; other values are left alone.

    Attributes:
        normalised: The values that were.
    """

    def __init__(self, gains: Mapping[str, float]) -> None:
        super().__init__()
        self.gains = gains
        self.normalised: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        """Insert the nodes."""
        names = graphs.Names(model.graph)
        for item in operands(model.graph):  # found before any is marked
            value, name = item.value, item.value.name or ""
            if name not in self.gains:
                continue
            tape, stem = ir.tape.Tape(), f"{name}_normalised"
            gain = np.full(item.channels, self.gains[name], np.float32)
            scale = new_initializer(model.graph, f"{stem}_gain", gain, ir.DataType.FLOAT)
            order = list(range(graphs.rank(value) or 0))
            order[-2:] = order[:-3:-1]
            moved = value if item.axis == -1 else tape.op("Transpose", [value], {"perm": order})
            result = tape.op("LayerNormalization", [moved, scale], {"axis": -1, "epsilon": EPSILON})
            if item.axis == -2:
                result = tape.op("Transpose", [result], {"perm": order})
            for position, node in enumerate(tape.nodes):
                node.name = names.free(f"{stem}_{node.op_type}_{position}")
                node.outputs[0].name = names.free(f"{stem}_{position}")
                node.outputs[0].type = value.type
            result.shape = value.shape
            model.graph.insert_before(item.product, tape.nodes)
            item.product.replace_input_with(item.position, result)
            item.product.metadata_props[NORMALISED] = "1"
            self.normalised.append(name)
        return PassResult(model, bool(self.normalised))


def _scores(graph: ir.Graph) -> Iterator[ir.Node]:
    for product in attention_products(graph):
        yield from graphs.nearest_behind(
            product.inputs[0], lambda node: graphs.is_op(node, "MatMul"), lambda node: graphs.is_op(node, *BETWEEN)
        )


def _operand(product: ir.Node, position: int) -> Operand | None:
    value = product.inputs[position]
    if value is None or graphs.is_constant(value) or value.shape is None or len(value.shape) < 2:
        return None
    channels = value.shape[-2 if position else -1]
    return Operand(product, position, channels) if isinstance(channels, int) else None
