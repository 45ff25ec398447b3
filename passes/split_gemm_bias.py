"""Take the bias out of Gemm, so that onnxruntime finds an integer kernel with a float output."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes


class SplitGemmBias(InPlacePass):
    """Make matrix products of two-dimensional activations match the integer Gemm, whose bias would be integer.

    Before::

        y = Gemm(x, W, b)            y = MatMul(x [n, k], W)

    After::

        y = Add(Gemm(x, W), b)       y = Gemm(x, W)

    onnxruntime's integer Gemm takes a bias only as int32 at the product of both scales, and otherwise runs in float;
    a quantized bias is what goes silently wrong when scales change. A two-dimensional MatMul before an Add would be
    fused into just such a Gemm.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every Gemm with a bias and every two-dimensional MatMul; weights may be behind Q/DQ already."""
        modified, names = False, graphs.Names(model.graph)
        for item in list(layer_nodes.weighted_nodes(model.graph)):
            node = item.node
            if item.weight is None or item.weight_index != 1:
                continue
            if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None and _is_plain(node):
                _split(model.graph, node, names)
                modified = True
            elif node.op_type == "MatMul" and graphs.rank(item.activation) == 2 and graphs.rank(item.weight) == 2:
                node.op_type = "Gemm"
                modified = True
        return PassResult(model, modified)


def _is_plain(node: ir.Node) -> bool:
    return node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0


def _split(graph: ir.Graph, node: ir.Node, names: graphs.Names) -> None:
    output, bias = node.outputs[0], node.inputs[2]
    tape = ir.tape.Tape()
    product = tape.op("Gemm", node.inputs[:2], dict(node.attributes))
    total = tape.op("Add", [product, bias])
    product.name, product.type, product.shape = f"{output.name}_product", output.type, output.shape
    gemm, add = tape.nodes
    gemm.name, add.name = node.name, names.free(f"{node.name}_bias")
    graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(output, total, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    total.name, total.type, total.shape = output.name, output.type, output.shape
