"""Keep the weights of experts, of which a network with many chooses a few for each token, as codes."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.formats import FORMATS
from onnxq.passes.quantize_tables import is_large, write_blocks

BLOCK_SIZES = {"int8": 128, "int4": 32}
AXES = (3, 4)  # of a table of matrices


class QuantizeExperts(InPlacePass):
    """Codes for a table of matrices of which products read those that a router chose.

    Only what is chosen is dequantized. Q/DQ cannot say that: behind the table they mean all experts in every run.

    Before::

        weights (float [experts, rows, columns]) ─► Gather or GatherND ─► MatMul ◄─ x

    After::

        codes, scales of blocks ─► GatherBlockQuantized ─► MatMul ◄─ x

    Args:
        skipped: Names of products, and of nodes that look up, which stay as they are.
        name: The format, ``int8`` or ``int4``.
    """

    def __init__(self, skipped: Collection[str] = (), name: str = "int8") -> None:
        super().__init__()
        self.skipped = set(skipped)
        self.name = name

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every table that only products of experts read."""
        names = graphs.Names(model.graph)
        tables: dict[ir.Value, set[ir.Node]] = {}
        for item in layer_nodes.weighted_nodes(model.graph):
            lookup = layer_nodes.lookup_behind(item) if item.weight_index is None else None
            table = None if lookup is None else lookup.inputs[0]
            if lookup is None or table is None or {item.node.name, lookup.name} & self.skipped:
                continue
            if is_large(table, AXES):
                tables.setdefault(table, set()).add(lookup)
        modified = False
        for table, lookups in tables.items():
            if {node for node, _ in graphs.consumers(table)} == lookups:
                in_order = [node for node in model.graph if node in lookups]
                write_blocks(model.graph, table, in_order, names, FORMATS[self.name], BLOCK_SIZES[self.name])
                graphs.let_go(table)
                modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)
