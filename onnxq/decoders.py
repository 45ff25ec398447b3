"""What a decoder keeps in float where other transformers have codes: the two products of its attention.

Eight bits of turned queries and keys, one scale for all heads, cost a decoder more than all its layers together
(stories260k: 0.8 of the 1.6 % by which its predictions diverge), and TensorRT fuses INT8 attention for a fixed, short
length alone (rule P8), which no decoder has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.calibration.causality import is_causal
from onnxq.calibration.data import InputSpec


def attention_in_float(model: ir.Model, specs: Sequence[InputSpec]) -> list[str]:
    """Names of the products of two activations, and of Attention nodes, that stay float: a decoder's, no encoder's.

    Where one layer makes queries, keys and values together, they keep their codes: left in float, the compiler of
    TensorRT pulls the slices of that layer through its product and runs it in float too.

    Args:
        model: A float model that reads tokens.
        specs: Its inputs.
    """
    products = [node for node in model.graph if is_product(node)]
    if not products or _joint_projections(products) or not is_causal(model, specs):
        return []
    return [node.name or "" for node in products]


def is_product(node: ir.Node) -> bool:
    """Whether the node multiplies two activations, or is an Attention, which does so twice."""
    item = layer_nodes.weighted(node)
    return graphs.is_op(node, "Attention") or (item is not None and item.weight_index is None)


def _joint_projections(products: Sequence[ir.Node]) -> bool:
    """Whether two operands of attention are cut out of the output of one layer."""
    makers: Counter[ir.Node] = Counter()
    for node in products:
        for value in node.inputs[: 3 if node.op_type == "Attention" else 2]:
            makers.update(_layers_behind(value))
    return any(count > 1 for count in makers.values())


def _layers_behind(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nearest products and convolutions that a value comes from."""
    return graphs.nearest_behind(
        value,
        lambda node: layer_nodes.weighted(node) is not None or is_product(node),
        lambda node: not graphs.is_op(node, "Shape", "Size"),  # what counts tokens for positions and masks
    )
