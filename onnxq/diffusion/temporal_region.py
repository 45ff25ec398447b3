"""The part of a denoiser that depends on the timestep alone, found by reachability.

It sees as many different inputs as the sampler has steps, however many samples are drawn. Names and ops play no role:
sines or a table, one embedding or one for each residual block, all are what the timestep reaches and the sample does
not. Where only the *shape* of another input is asked for, to repeat the timestep for each sample, nothing of that
input is known to the result, and it still counts as temporal.

Source: Y. Huang, R. Gong, J. Liu, T. Chen, X. Liu, TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion
Models, CVPR 2024 (arXiv 2311.16503), section 3: the "temporal information block".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes

CONSTANT, SHAPE, TEMPORAL, OTHER = range(4)
SHAPE_OPS = ("Shape", "Size")


@dataclass(frozen=True)
class TemporalRegion:
    """Nodes whose outputs follow from a few inputs.

    Attributes:
        inputs: Names of those inputs: the timestep, perhaps labels.
        nodes: In the order of the graph.
        frontier: The values of the region that the rest of the network reads.
    """

    inputs: tuple[str, ...]
    nodes: tuple[ir.Node, ...]
    frontier: tuple[ir.Value, ...]

    @property
    def features(self) -> list[str]:
        """Names of the values of the frontier that are no outputs of the model."""
        return [value.name or "" for value in self.frontier if not value.is_graph_output()]

    @property
    def layers(self) -> list[str]:
        """Names of its Conv, Gemm and MatMul nodes with a constant weight."""
        found = (layer_nodes.weighted(node) for node in self.nodes)
        return [item.node.name or "" for item in found if item is not None and item.weight_index is not None]


def find_region(graph: ir.Graph, inputs: Collection[str]) -> TemporalRegion:
    """The region that depends on no input but the named ones.

    Args:
        graph: The denoiser, sorted topologically.
        inputs: The timestep, or the timestep and labels.
    """
    kinds: dict[ir.Value, int] = {
        value: TEMPORAL if value.name in inputs else OTHER for value in graph.inputs if not graphs.is_constant(value)
    }
    nodes = []
    for node in graph:
        kind = _kind(node, kinds)
        kinds.update(dict.fromkeys(node.outputs, kind))
        if kind == TEMPORAL:
            nodes.append(node)
    inside = set(nodes)
    frontier = tuple(
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output()
        or any(reader not in inside and kinds[reader.outputs[0]] != SHAPE for reader, _ in graphs.consumers(value))
    )
    needed = _leading_to(frontier, inside)
    return TemporalRegion(tuple(inputs), tuple(node for node in nodes if node in needed), frontier)


def _kind(node: ir.Node, kinds: dict[ir.Value, int]) -> int:
    if graphs.is_op(node, *SHAPE_OPS):
        return SHAPE
    if graphs.is_op(node, *graphs.RANDOM) or any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return OTHER  # a subgraph may read anything
    return max((kinds.get(value, CONSTANT) for value in node.inputs if value is not None), default=CONSTANT)


def _leading_to(values: Collection[ir.Value], within: Collection[ir.Node]) -> set[ir.Node]:
    """The nodes of ``within`` that the values are computed from."""
    found: set[ir.Node] = set()
    stack = list(values)
    while stack:
        producer = stack.pop().producer()
        if producer is not None and producer in within and producer not in found:
            found.add(producer)
            stack.extend(value for value in producer.inputs if value is not None)
    return found
