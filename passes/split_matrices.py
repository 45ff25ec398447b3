"""Write a product with several constant matrices as one product for each, which has scales and a kernel of its own."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import array_of, new_initializer
from onnxq.rewriting import InPlaceOf

MOST_MATRICES = 64


PART = "matrix"  # in the names of the products that one becomes


class SplitMatrices(InPlacePass):
    """Make a product for each matrix of a batch of weights, as of experts that all run. The function stays the same.

    Before::

        x [experts, rows, k] ─► MatMul ◄─ weights [experts, k, n]

    After::

        x ─► Split ═► MatMul ◄─ weights [k, n]
                 ╘══► MatMul ◄─ weights [k, n] ═► Concat

    Where all read the same rows they read them as they are, also before an Expand. onnxruntime's integer kernels know
    one scale for a whole batch, and dequantize weights alone of a batch in every run.

    Args:
        skipped: Names of nodes that stay as they are.
    """

    def __init__(self, skipped: Collection[str] = ()) -> None:
        super().__init__()
        self.skipped = set(skipped)

    def call(self, model: ir.Model) -> PassResult:
        """Split every MatMul with a constant [matrices, k, n] whose rows are known to be split alike, or shared."""
        names = graphs.Names(model.graph)
        modified = False
        for item in list(layer_nodes.weighted_nodes(model.graph)):
            weight = item.weight
            if weight is not None and item.node.name not in self.skipped and _is_batch(item, weight):
                modified |= _split(model.graph, item, weight, names)
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def _is_batch(item: layer_nodes.WeightedNode, weight: ir.Value) -> bool:
    if not layer_nodes.multiplies_several(item.node) or not graphs.is_constant(weight) or weight.dtype is None:
        return False
    shape = None if graphs.only_reader(weight) is None else weight.shape
    return shape is not None and shape.is_static() and len(shape) == 3 and 1 < shape.numpy()[0] <= MOST_MATRICES


def _split(graph: ir.Graph, item: layer_nodes.WeightedNode, weight: ir.Value, names: graphs.Names) -> bool:
    matrices = array_of(weight)
    count = len(matrices)
    rows = _before_expand(item.activation)
    rank = graphs.rank(rows) or 0
    if rows.shape is None or rank < 2:
        return False
    of_each = rank > 2 and rows.shape[-3] == count
    if rank > 2 and not of_each and rows.shape[-3] != 1:
        return False
    apart = InPlaceOf(graph, item.node, names)
    parts = [rows] * count
    if of_each:
        parts = list(apart.ops("parts", "Split", [rows], {"axis": rank - 3, "num_outputs": count}, results=count))
    products = []
    for index, (part, matrix) in enumerate(zip(parts, matrices, strict=True)):
        own = new_initializer(graph, f"{weight.name}_{PART}{index}", matrix, weight.dtype or apart.dtype, names)
        product = apart.op(f"{PART}{index}", "MatMul", [part, own])
        if rank == 2:
            product = apart.op(f"row{index}", "Unsqueeze", [product, apart.integers(f"first{index}", [0])])
        products.append(product)
    apart.take_over(apart.op("joined", "Concat", products, {"axis": max(rank - 3, 0)}))
    graphs.let_go(weight)
    return True


def _before_expand(value: ir.Value) -> ir.Value:
    """What an Expand copies for each matrix, and for nothing else."""
    node = value.producer()
    source = node.inputs[0] if graphs.is_op(node, "Expand") and node is not None else None
    if source is None or source.shape is None or value.shape is None or len(source.shape) != len(value.shape):
        return value
    pairs = list(zip(source.shape, value.shape, strict=True))
    same = all(before == after for place, (before, after) in enumerate(pairs) if place != len(pairs) - 3)
    return source if len(pairs) > 2 and pairs[-3][0] == 1 and same else value
