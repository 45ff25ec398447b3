"""Keep onnxruntime from fusing an integer matrix product and its bias into a Gemm of floats."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.biases import BiasPlace, bias_place
from onnxq.folding import array_of, new_initializer


class KeepBiasesApart(InPlacePass):
    """Give the bias behind a product of codes with more than two dimensions a row of its own.

    Before::

        y = Add(MatMul(x [m, n, k], W), b [p])

    After::

        y = Add(MatMul(x [m, n, k], W), b [1, p])

    Where all dimensions are fixed, onnxruntime makes Reshape, Gemm and Reshape of the first before it looks for Q/DQ.
    That Gemm's bias is float, so the product does not run on codes: a BERT takes twice the time of the float one. A
    bias with two dimensions is left alone. Models with free dimensions are rewritten too: they may be fixed when a
    session is made.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every bias that qualifies."""
        places = [place for item in layer_nodes.weighted_nodes(model.graph) if (place := fused_bias(item)) is not None]
        for place in places:
            bias = place.value
            assert bias is not None and bias.dtype is not None
            place.put(new_initializer(model.graph, f"{bias.name}_row", array_of(bias).reshape(1, -1), bias.dtype))
            if not bias.uses():
                model.graph.initializers.pop(bias.name or "")
        return PassResult(model, bool(places))


def fused_bias(item: layer_nodes.WeightedNode) -> BiasPlace | None:
    """Where a product of codes has a bias that would be fused with it once all dimensions are fixed."""
    node = item.node
    if node.op_type != "MatMul" or not all(graphs.is_dequantized(value) for value in node.inputs):
        return None
    rank, place = graphs.rank(item.activation), bias_place(item)
    if rank is None or rank < 3 or place is None or place.value is None:
        return None
    return place if graphs.is_constant(place.value) and graphs.rank(place.value) == 1 else None
