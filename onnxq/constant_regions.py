"""What depends on no input, computed once by onnxruntime when a model is read."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from onnxq import graph as graphs
from onnxq.errors import OnnxqError
from onnxq.folding import new_initializer

LARGEST = 1 << 22  # elements of a result: what is larger, as a mask for long texts, stays as the nodes that fill it
DATA_TYPES = (
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL,
    ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
)  # fmt: skip


def compute(model: ir.Model) -> None:
    """Make constants of what nodes compute from constants alone, where :mod:`onnxq.constant_folding` has no rule.

    Queries that a detector has learned, with norms and halves of tables between them and the first attention, are such
    a region: onnxruntime computes it when it loads the float model, and with Q/DQ inside it in every run.
    """
    graph = model.graph
    known: set[ir.Value] = set()
    nodes = []
    for node in graph:
        if _is_computable(node, known):
            nodes.append(node)
            known.update(node.outputs)
    if not nodes:
        return
    NameFixPass()(model)
    inside = set(nodes)
    wanted = [
        value
        for value in (output for node in nodes for output in node.outputs)
        if not value.is_graph_output() and any(use.node not in inside for use in value.uses())
    ]
    names = graphs.Names(graph)
    for value, array in zip(wanted, _run(model, [value.name or "" for value in wanted]), strict=False):
        if array.size <= LARGEST and value.dtype is not None:
            made = new_initializer(graph, f"{value.name}_computed", array, value.dtype, names)
            ir.convenience.replace_all_uses_with(value, made)


def _is_computable(node: ir.Node, known: Container[ir.Value]) -> bool:
    """Whether everything that a node reads is known, and it always gives the same."""
    if node.domain not in graphs.ONNX_DOMAINS or graphs.is_op(node, *graphs.QDQ, *graphs.RANDOM):
        return False
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return False
    is_known = all(value is None or graphs.is_constant(value) or value in known for value in node.inputs)
    return is_known and all(output.dtype in DATA_TYPES for output in node.outputs)


def _run(model: ir.Model, names: list[str]) -> list[np.ndarray[Any, Any]]:
    """Values of a model that depend on no input; none where onnxruntime refuses them."""
    from onnxq.runtime import Session

    part = model.clone()
    values = graphs.values(part.graph)
    part.graph.inputs.clear()
    part.graph.outputs.clear()
    part.graph.outputs.extend(values[name] for name in names)
    RemoveUnusedNodesPass()(part)
    try:
        return Session(part, optimize=False).run({}, names) if names else []
    except OnnxqError:
        return []
