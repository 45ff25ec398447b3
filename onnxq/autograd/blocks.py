"""Cut a graph into the units that reconstruction works on, from the graph alone.

A block is what one merging op closes: the two branches of a residual Add, the gate of a Mul, the branches before a
Concat, with everything between them and the value they split at. Attention and feed-forward layers lie inside the
residual Add that follows them. What no block holds is cut layer by layer. Every block ends in one value; what it
reads are ends of earlier blocks and graph inputs, so that a network is computed by walking the list once.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes

MERGES = ("Add", "Mul", "Concat")
MOST_LAYERS = 6  # a residual unit or a transformer layer's half; more is a whole stage, or a UNet's bottom

# What a layer's own nonlinearity is made of: the error is measured after it, where it matters.
ELEMENTWISE = (
    "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish",
    "Gelu", "Softplus", "Tanh", "Erf", "Add", "Sub", "Mul", "Div", "BatchNormalization", "Identity", "Pow",
)  # fmt: skip
LONGEST_TAIL = 10
CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")


@dataclass(frozen=True)
class Block:
    """A unit of reconstruction.

    Attributes:
        name: The name of the node that ends it.
        inputs: The values it is computed from: graph inputs and outputs of earlier blocks.
        output: The value that ends it.
        layers: Its Conv, ConvTranspose, Gemm and MatMul nodes with a constant weight, by name.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    layers: tuple[str, ...]


def cut(graph: ir.Graph, granularity: str = "block", apart: Sequence[ir.Value] = ()) -> list[Block]:
    """The blocks of a float graph in the order to run them.

    Args:
        graph: A float graph, sorted topologically.
        granularity: ``block``, or ``layer`` for one block for each Conv, Gemm and MatMul with a constant weight.
        apart: Values that are computed apart, with everything before them: each ends a block that reaches back to
            graph inputs (or to another of these values), and no other block holds any of their nodes.
    """
    return _Cut(graph).blocks(merged=granularity == "block", apart=apart)


class _Cut:
    """Nodes are numbered in topological order; sets of nodes are the bits of an integer."""

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        # What a body reads, its If or Loop reads.
        inside = {node: list(graphs.with_bodies(node)) for node in self.nodes}
        self.index = {inner: position for position, node in enumerate(self.nodes) for inner in inside[node]}
        self.layers = {
            self.index[item.node]
            for item in layer_nodes.weighted_nodes(graph)
            if item.weight_index is not None and graphs.is_constant(item.weight)
        }
        self.layer_bits = _bits(self.layers)
        self.ancestors: list[int] = []  # of each node, itself included
        for position, node in enumerate(self.nodes):
            found = 1 << position
            for value in [value for inner in inside[node] for value in inner.inputs]:
                producer = None if value is None else value.producer()
                if producer is not None and self.index[producer] < position:
                    found |= self.ancestors[self.index[producer]]
            self.ancestors.append(found)

    def blocks(self, merged: bool, apart: Sequence[ir.Value]) -> list[Block]:
        separate = {value: self._source_bits(value) for value in apart}
        taken = 0
        for region in separate.values():
            taken |= region
        regions = [region for region in self._disjoint_regions() if not region & taken] if merged else []
        for region in regions:
            taken |= region
        singles = set(self.layers)
        if not merged:  # the sums end blocks of their own, or every layer would read all the sums' parts before it
            singles |= {self.index[node] for node in self.nodes if self._region(node)}
        for position in sorted(singles):
            if not taken >> position & 1:
                regions.append(1 << position)
                taken |= 1 << position
        ends = dict(separate)
        for region in sorted(regions, key=int.bit_length):
            extended = self._with_tail(region, taken)
            taken |= extended
            ends[self._end(extended)] = extended
        ordered = sorted(ends.items(), key=lambda end: end[1].bit_length())
        found = [self._block(value, region, ends) for value, region in ordered]
        return _merged_by_scope(self.nodes, found) if merged else found

    def _disjoint_regions(self) -> list[int]:
        """Largest first, what each merging op closes, if nothing inside is read outside."""
        found = [region for node in self.nodes if (region := self._region(node))]
        found.sort(key=lambda region: (-region.bit_count(), region.bit_length()))
        chosen: list[int] = []
        taken = 0
        for region in found:
            if not region & taken:
                chosen.append(region)
                taken |= region
        return chosen

    def _region(self, merge: ir.Node) -> int:
        """The nodes between ``merge`` and where its operands part, or 0 if that is no block."""
        if not graphs.is_op(merge, *MERGES):
            return 0
        operands = [value for value in merge.inputs if value is not None and not graphs.is_constant(value)]
        if len(operands) < 2:
            return 0
        sources = [self._source_bits(value) for value in operands]
        common = sources[0]
        for bits in sources[1:]:
            common &= bits
        inputs = [value for value in operands if value.producer() is None]
        if inputs:  # a shortcut from a graph input
            region = self._descendants_of_value(inputs[0], self.ancestors[self.index[merge]])
        elif common:
            start = common.bit_length() - 1
            region = self._descendants(1 << start, self.ancestors[self.index[merge]]) & ~(1 << start)
        else:
            return 0
        count = (region & self.layer_bits).bit_count()
        return region if 1 <= count <= MOST_LAYERS and self._is_closed(region, self.index[merge]) else 0

    def _source_bits(self, value: ir.Value) -> int:
        producer = value.producer()
        return 0 if producer is None else self.ancestors[self.index[producer]]

    def _descendants(self, start: int, within: int) -> int:
        """The nodes of ``within`` that depend on the start nodes, which are included."""
        found = start
        for position in _positions(within & ~((start & -start) - 1)):
            for value in self.nodes[position].inputs:
                producer = None if value is None else value.producer()
                if producer is not None and found >> self.index[producer] & 1:
                    found |= 1 << position
                    break
        return found

    def _descendants_of_value(self, value: ir.Value, within: int) -> int:
        readers = _bits(self.index[node] for node, _ in graphs.consumers(value) if within >> self.index[node] & 1)
        return self._descendants(readers, within) if readers else 0

    def _is_closed(self, region: int, end: int) -> bool:
        for position in _positions(region & ~(1 << end)):
            for value in self.nodes[position].outputs:
                if any(not region >> self.index[reader] & 1 for reader, _ in graphs.consumers(value)):
                    return False
        return True

    def _with_tail(self, region: int, taken: int) -> int:
        """The region and the elementwise ops that read nothing else, as far as one value ends it."""
        best = current = region
        for _ in range(LONGEST_TAIL):
            candidates = {
                self.index[reader]
                for value in self._live(current)
                for reader, _ in graphs.consumers(value)
                if not (current | taken) >> self.index[reader] & 1
                and self._extends(self.nodes[self.index[reader]], current)
            }
            if not candidates:
                break
            current |= 1 << min(candidates)
            if len(self._live(current)) == 1:
                best = current
        return best

    def _extends(self, node: ir.Node, region: int) -> bool:
        if not graphs.is_op(node, *ELEMENTWISE):
            return False
        for value in node.inputs:
            if value is None or graphs.is_constant(value):
                continue
            producer = value.producer()
            if producer is None or not region >> self.index[producer] & 1:
                return False
        return True

    def _live(self, region: int) -> list[ir.Value]:
        """Values of the region that are read outside it."""
        return [
            value
            for position in _positions(region)
            for value in self.nodes[position].outputs
            if value.is_graph_output()
            or any(not region >> self.index[reader] & 1 for reader, _ in graphs.consumers(value))
        ]

    def _end(self, region: int) -> ir.Value:
        return self.nodes[region.bit_length() - 1].outputs[0]

    def _block(self, end: ir.Value, region: int, ends: dict[ir.Value, int]) -> Block:
        """Walk back from the end to the ends of other blocks; what lies between is computed along."""
        inputs: dict[str, None] = {}
        seen: set[ir.Value] = set()
        stack = [end]
        while stack:
            value = stack.pop()
            if value in seen or graphs.is_constant(value):
                continue
            seen.add(value)
            producer = value.producer()
            if producer is None or (value in ends and value is not end):
                inputs[value.name or ""] = None
                continue
            stack.extend(item for item in producer.inputs if item is not None)
        layers = tuple(self.nodes[position].name or "" for position in _positions(region & self.layer_bits))
        node = end.producer()
        assert node is not None
        return Block(node.name or "", tuple(sorted(inputs)), end.name or "", layers)


def _merged_by_scope(nodes: Sequence[ir.Node], found: Sequence[Block]) -> list[Block]:
    """Join a block to the one it alone reads, where the exporter says that both belong to one module.

    A strided inverted residual has no Add that would hold its three convolutions together.
    """
    scopes = {node.name: _scopes(node) for node in nodes}
    readers: dict[str, int] = {}
    for block in found:
        for name in block.inputs:
            readers[name] = readers.get(name, 0) + 1
    merged: list[Block] = []
    chain = False  # whether the last block is made of single layers alone
    for block in found:
        last = merged[-1] if merged else None
        single = len(block.layers) == 1
        if (
            last is not None
            and chain
            and single
            and block.inputs == (last.output,)
            and readers[last.output] == 1
            and len(last.layers) + len(block.layers) <= MOST_LAYERS
            and _same_module([scopes[name] for name in last.layers + block.layers])
        ):
            merged[-1] = Block(block.name, last.inputs, block.output, last.layers + block.layers)
        else:
            merged.append(block)
            chain = single
    return merged


def _scopes(node: ir.Node) -> list[tuple[str, str]]:
    """The modules that a node was exported from, outermost first: (name, class)."""
    try:
        names = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
        classes = ast.literal_eval(node.metadata_props["pkg.torch.onnx.class_hierarchy"])
        return [(str(name), str(kind).rsplit(".", 1)[-1]) for name, kind in zip(names, classes, strict=True)]
    except (KeyError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # of literals nested too deep
        return []


def _same_module(paths: Sequence[Sequence[tuple[str, str]]]) -> bool:
    """Whether one module that is neither the network itself nor a plain container holds all the paths."""
    common: list[tuple[str, str]] = []
    for level in zip(*paths, strict=False):
        if any(entry != level[0] for entry in level):
            break
        common.append(level[0])
    while common and common[-1][1] in CONTAINERS:
        common.pop()
    return len(common) > 1


def _bits(positions: Sequence[int] | set[int] | Iterator[int]) -> int:
    found = 0
    for position in positions:
        found |= 1 << position
    return found


def _positions(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
