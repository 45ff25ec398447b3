"""Regions of integer kernels on onnxruntime's CPU provider: which values are held as codes, and in whose scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.scheme import Spec
from onnxq.targets.cpu_ops import ARITHMETIC, STREAMS, TAKEN_APART, after_activation, hands_on_codes, moves_data
from onnxq.targets.placement import Schemes, Site


class Regions:
    """Which values are held as codes."""

    def __init__(self, graph: ir.Graph, chosen: Sequence[layer_nodes.WeightedNode], skipped: set[str]) -> None:
        self.graph = graph
        self.chosen = list(chosen)
        self.core = {item.node for item in chosen}
        self.skipped = skipped
        self.codes: set[ir.Value] = set()  # quantized for every reader
        self.like: dict[ir.Value, ir.Value] = {}
        self.useful = self._useful_nodes()
        for node in graph:
            self._visit(node)

    def _useful_nodes(self) -> set[ir.Node]:
        """Nodes whose output reaches a core op through ops that have integer kernels."""
        useful: set[ir.Node] = set()
        for node in reversed(list(self.graph)):
            for reader, _ in graphs.consumers(node.outputs[0]):
                if reader in self.core or (reader in useful and hands_on_codes(reader)):
                    useful.add(node)
                    break
        return useful

    def _visit(self, node: ir.Node) -> None:
        if node.name in self.skipped:
            return
        if node in self.core:
            if node.op_type == "Conv":
                self._hold(after_activation(node))
        elif node in self.useful and self._pays(node) and self._reads_codes(node):
            for value in node.inputs:
                if value is not None and value not in self.codes:
                    self._hold(value)
            joined = after_activation(node)
            self._hold(joined)
            if node.op_type == "Concat" and joined is node.outputs[0]:
                for value in node.inputs:
                    if value is not None:
                        self._tie(value, joined)
        elif node in self.useful and moves_data(node) and node.inputs[0] in self.codes:
            self._hold(node.outputs[0])
            self.like[node.outputs[0]] = node.inputs[0]

    def _pays(self, node: ir.Node) -> bool:
        """Whether an integer kernel is worth it: for a sum or a Concat, if nothing reads its output as floats.

        A norm or a residual stream would turn the codes into floats again, at the same cost, and the stream has lost
        what eight bits cannot hold beside each other: a class token among patches, say.
        """
        if not graphs.is_op(node, *STREAMS):
            return graphs.is_op(node, *ARITHMETIC, *TAKEN_APART)
        readers = [reader for reader, _ in graphs.consumers(after_activation(node))]
        return all(reader in self.core or hands_on_codes(reader) for reader in readers)

    def _tie(self, value: ir.Value, joined: ir.Value) -> None:
        """Give what only a Concat reads the scale of its output.

        The kernel then copies codes instead of computing them, and they are rounded once instead of twice.
        """
        while graphs.only_reader(value) is not None:
            source = self.like.get(value)
            if source is None:
                self.like[value] = joined
                return
            value = source

    def _root(self, value: ir.Value) -> ir.Value:
        """The value whose scale this one has."""
        while value in self.like:
            value = self.like[value]
        return value

    def _hold(self, value: ir.Value) -> None:
        if graphs.is_float(value):
            self.codes.add(value)

    def _reads_codes(self, node: ir.Node) -> bool:
        """Whether an integer kernel fits: one operand is held as codes, and the others can be."""
        inputs = [value for value in node.inputs if value is not None]
        if any(graphs.is_constant(value) or not graphs.is_float(value) for value in inputs):
            return False
        return any(value in self.codes for value in inputs)

    def is_alone(self, item: layer_nodes.WeightedNode) -> bool:
        """Whether a layer is all of its region: it reads floats, and what reads its result makes no codes of it."""
        readers = [reader for reader, _ in graphs.consumers(after_activation(item.node))]
        reaches = any(reader in self.core or (reader in self.useful and hands_on_codes(reader)) for reader in readers)
        return item.activation not in self.codes and not reaches

    def sites(self, scheme_of: Schemes, usual: Spec) -> list[Site]:
        """Pairs for all readers of held values, and for the core ops alone elsewhere.

        A value has one pair, so where its readers want several formats it gets the widest.
        """
        wanted: dict[ir.Value, list[Spec]] = {}
        uses: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
        for item in self.chosen:
            spec = scheme_of(item.node).activations
            if not spec.enabled:
                continue
            wanted.setdefault(self._root(item.activation), []).append(spec)
            if item.activation not in self.codes:
                uses.setdefault(item.activation, []).append((item.node, item.activation_index))

        def spec_of(value: ir.Value) -> Spec:
            return max(wanted.get(value, [usual]), key=lambda spec: spec.format.bits)

        sites = []
        for value in self._in_order():
            root = self._root(value)
            sites.append(Site(value, (), spec_of(root), like=None if root is value else root))
        return sites + [Site(value, tuple(readers), spec_of(value)) for value, readers in uses.items()]

    def _in_order(self) -> Iterator[ir.Value]:
        yield from (value for value in self.graph.inputs if value in self.codes)
        for node in self.graph:
            for value in node.outputs:
                if value in self.codes:
                    yield value
