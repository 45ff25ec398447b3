"""Write a mean over height and width as the pooling that onnxruntime has an integer kernel for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer


class PoolMeans(InPlacePass):
    """Make GlobalAveragePool of ReduceMean over all axes behind the channels.

    Before::

        y = ReduceMean(x [n, c, h, w], axes [2, 3])

    After::

        y = GlobalAveragePool(x)    (and a Squeeze where the axes are dropped)

    That is how torch's newer exporter writes adaptive pooling, in the heads of classifiers and in every
    squeeze-and-excite block; as ReduceMean it runs in float between integer kernels.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every mean that qualifies."""
        found = [node for node in model.graph if _is_pooling(node)]
        for node in found:
            _rewrite(model.graph, node)
        return PassResult(model, bool(found))


def _is_pooling(node: ir.Node) -> bool:
    if not graphs.is_op(node, "ReduceMean") or len(node.inputs) < 2 or node.inputs[0] is None:
        return False
    axes, size = node.inputs[1], graphs.rank(node.inputs[0])
    if not graphs.is_constant(axes) or size is None or size < 4 or not graphs.is_float(node.inputs[0]):
        return False
    return sorted(int(axis) % size for axis in array_of(axes)) == list(range(2, size))


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    tape = ir.tape.Tape()
    pooled = tape.op("GlobalAveragePool", [source])
    made = pooled
    if not node.attributes.get_int("keepdims", 1):
        axes = np.arange(2, graphs.rank(source), dtype=np.int64)
        made = tape.op("Squeeze", [pooled, new_initializer(graph, f"{output.name}_axes", axes, ir.DataType.INT64)])
        pooled.name, pooled.type = f"{output.name}_pooled", output.type
        if output.shape is not None:
            pooled.shape = ir.Shape([*output.shape, *(1 for _ in axes)])
        tape.nodes[-1].name = f"{node.name}_squeeze"
    tape.nodes[0].name = node.name
    graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    made.name, made.type, made.shape = output.name, output.type, output.shape
