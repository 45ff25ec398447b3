"""Values inside a network at which two networks are compared, found from the graph alone."""

from __future__ import annotations

import onnx_ir as ir

from onnxq import graph as graphs

POOLS = ("MaxPool", "AveragePool", "LpPool")
GLOBAL_POOLS = ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")


def stage_ends(graph: ir.Graph) -> list[str]:
    """What is left before each loss of resolution, and before the global pooling: the ends of a network's stages.

    Args:
        graph: A float graph whose shapes are known.
    """
    found = []
    for node in graph:
        value = node.inputs[0] if node.inputs else None
        if value is None or value.producer() is None or graphs.rank(value) != 4:
            continue
        strided = graphs.is_op(node, "Conv", *POOLS) and max(node.attributes.get_ints("strides", [1])) > 1
        if (strided or graphs.is_op(node, *GLOBAL_POOLS)) and value.name not in found:
            found.append(value.name or "")
    return found


def residual_branches(graph: ir.Graph) -> list[str]:
    """What residual Adds take from their longer branch; the ends of stages where there are none (HAST, section 3.4).

    Args:
        graph: A float graph, sorted topologically.
    """
    depth: dict[ir.Value, int] = {}
    found = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and not graphs.is_constant(value)]
        below = max((depth.get(value, 0) for value in inputs), default=0)
        if graphs.is_op(node, "Add") and len(inputs) == 2:
            branch = max(inputs, key=lambda value: depth.get(value, 0))
            if _ends_in_layer(branch) and branch.name not in found:
                found.append(branch.name or "")
        for value in node.outputs:
            depth[value] = below + graphs.is_op(node, "Conv", "Gemm", "MatMul")
    return found or stage_ends(graph)


def _ends_in_layer(value: ir.Value) -> bool:
    producer = value.producer()
    if graphs.is_op(producer, "BatchNormalization"):
        assert producer is not None and producer.inputs[0] is not None
        producer = producer.inputs[0].producer()
    return graphs.is_op(producer, "Conv", "Gemm", "MatMul")
