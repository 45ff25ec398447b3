"""Put a thin product of two matrices beside a layer's weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import array_of, new_initializer
from onnxq.rotation import replace_constant
from onnxq.weights.low_rank import Factors

ENDINGS = ("inward", "outward")  # of the names of the two layers


class AddLowRank(InPlacePass):
    """Split weights into what is going to be rounded and a product of small rank that is not; the function stays.

    Before::

        y = MatMul(x, W)

    After::

        y = MatMul(x, W − A·B) + MatMul(MatMul(x, A), B)

    Args:
        factors: The products, by the name of the MatMul or Gemm.
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        super().__init__()
        self.factors = dict(factors)

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the layers."""
        modified = False
        for item in list(layer_nodes.weighted_nodes(model.graph)):
            factors = self.factors.get(item.node.name or "")
            if factors is not None and takes_low_rank(item):
                _add(model.graph, item, factors)
                modified = True
        return PassResult(model, modified)


def takes_low_rank(item: layer_nodes.WeightedNode) -> bool:
    """Whether the layer multiplies rows by its own constant float matrix from the right."""
    node, weight = item.node, item.weight
    if node.op_type not in ("MatMul", "Gemm") or item.weight_index != 1 or weight is None:
        return False
    if not graphs.is_constant(weight) or not graphs.is_float(weight) or bool(node.attributes.get_int("transA", 0)):
        return False
    return array_of(weight).ndim == 2


def _add(graph: ir.Graph, item: layer_nodes.WeightedNode, factors: Factors) -> None:
    node, output = item.node, item.node.outputs[0]
    weight = array_of(item.weight).astype(np.float64)
    product = factors.product if item.channel_axis == 0 else factors.product.T
    assert item.weight is not None
    dtype, name = item.weight.dtype or ir.DataType.FLOAT, item.weight.name
    alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
    replace_constant(graph, node, 1, weight - product)
    tape = ir.tape.Tape()
    inward = new_initializer(graph, f"{name}_{ENDINGS[0]}", factors.inward.T.astype(dtype.numpy()), dtype)
    outward = new_initializer(graph, f"{name}_{ENDINGS[1]}", (alpha * factors.outward.T).astype(dtype.numpy()), dtype)
    thin = tape.op("MatMul", [item.activation, inward])
    correction = tape.op("MatMul", [thin, outward])
    total = tape.op("Add", [output, correction])
    for made, value, ending in zip(tape.nodes, (thin, correction, total), (*ENDINGS, "corrected"), strict=True):
        made.name, value.name = f"{node.name}_{ending}", f"{output.name}_{ending}"
        value.type = output.type
    if output.shape is not None:
        correction.shape = total.shape = output.shape
        thin.shape = ir.Shape([*output.shape[:-1], len(factors.inward)])
    uses = [(reader, index) for reader, index in graphs.consumers(output) if reader is not tape.nodes[-1]]
    graph.insert_after(node, tape.nodes)
    for reader, index in uses:
        reader.replace_input_with(index, total)
    if output.is_graph_output():
        graph.outputs[list(graph.outputs).index(output)] = total
    total.name, output.name = output.name, f"{output.name}_uncorrected"
