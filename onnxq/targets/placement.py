"""What a target answers when asked where Q/DQ go: one :class:`Site` for every pair to insert."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.config import NOT
from onnxq.errors import OnnxqError
from onnxq.passes.split_matrices import PART
from onnxq.scheme import Scheme, Spec
from onnxq.targets import logarithms

LAYERS = (*layer_nodes.WEIGHTED_OPS, "LSTM", "Gather", "GatherND")
EXCLUDED = "excluded"  # why a layer stays float that the user named

Use = tuple[ir.Node, int]
Schemes = Callable[[ir.Node], Scheme]


@dataclass(frozen=True)
class Site:
    """One Q/DQ pair to insert.

    Attributes:
        value: The float value to quantize.
        uses: The inputs that read the quantized value; ``()`` means all of them, and the graph output too.
        spec: Number format, granularity and symmetry.
        axis: The axis of per-channel or block scales.
        like: The value whose scale it takes, for ops that only move data (MaxPool, Reshape, …).
    """

    value: ir.Value
    uses: tuple[Use, ...]
    spec: Spec
    axis: int | None = None
    like: ir.Value | None = None


@dataclass(frozen=True)
class Placement:
    """Where Q/DQ go, and what was left in float on purpose (node name → reason)."""

    sites: list[Site]
    left_float: dict[str, str] = field(default_factory=dict)

    @property
    def ranged(self) -> set[str]:
        """Names of the activations whose ranges it needs."""
        values = (
            site.like or site.value
            for site in self.sites
            if not site.value.is_initializer() and site.spec.is_calibrated
        )
        return {value.name or "" for value in values}


def excluded(graph: ir.Graph, patterns: Sequence[str]) -> set[str]:
    """Names of the nodes that ``--exclude`` patterns (shell wildcards on node names or op types) match.

    Patterns of ``--only``, which have ``!`` before them, leave out the layers that none of them matches; what has no
    weight gets codes for its neighbours' sake, as ever.

    Raises:
        OnnxqError: a pattern matches nothing, which is most often a typing error.
    """
    skipped: set[str] = set()
    wanted: set[str] = set()
    for pattern in patterns:
        is_wanted = pattern.startswith(NOT)
        found = matched(graph, pattern.removeprefix(NOT))
        if is_wanted and not found:  # a product of several matrices, which became one for each
            found = matched(graph, f"{pattern.removeprefix(NOT)}_{PART}*")
        if not found:
            examples = ", ".join(item.node.name or "" for item in list(layer_nodes.weighted_nodes(graph))[:3])
            option = "--only" if is_wanted else "--exclude"
            raise OnnxqError(
                f"expected {option} {pattern.removeprefix(NOT)!r} to match a node name or an op, found no match",
                hint=f"names look like: {examples}",
            )
        if is_wanted:
            wanted |= found
        else:
            skipped |= found
    return skipped | (_layers(graph) - wanted if wanted else set())


def within(graph: ir.Graph, patterns: Sequence[str]) -> list[str]:
    """Patterns for a part of the graph that they were written for, in which some match nothing."""
    left_out = [pattern for pattern in patterns if not pattern.startswith(NOT) and matched(graph, pattern)]
    wanted = [pattern.removeprefix(NOT) for pattern in patterns if pattern.startswith(NOT)]
    if wanted:
        found = {name for pattern in wanted for name in matched(graph, pattern)}
        left_out += sorted(glob.escape(name) for name in _layers(graph) - found)
    return left_out


def _layers(graph: ir.Graph) -> set[str]:
    """Names of what has codes of its own: layers, and tables that are looked up in."""
    return {node.name or "" for node in graph.all_nodes() if graphs.is_op(node, *LAYERS)}


def matched(graph: ir.Graph, pattern: str) -> set[str]:
    """Names of the nodes that one pattern matches, by name or op type, in branches and loops too."""
    return {
        node.name or ""
        for node in graph.all_nodes()
        if fnmatch.fnmatchcase(node.name or "", pattern) or fnmatch.fnmatchcase(node.op_type, pattern)
    }


def choose(
    graph: ir.Graph, skipped: set[str], why_float: Callable[[layer_nodes.WeightedNode], str]
) -> tuple[list[layer_nodes.WeightedNode], dict[str, str]]:
    """The weighted nodes to quantize, and why the others stay in float (``why_float`` gives a reason or nothing)."""
    chosen: list[layer_nodes.WeightedNode] = []
    left_float = {
        name: EXCLUDED if name in skipped else reason for name, reason in layer_nodes.layers_without_codes(graph)
    }
    filters = logarithms.before_logarithms(graph)
    for item in layer_nodes.weighted_nodes(graph):
        name = item.node.name or ""
        reason = logarithms.REASON if item.node in filters else why_float(item)
        if name in skipped:
            reason = EXCLUDED
        if reason:
            left_float[name] = reason
        else:
            chosen.append(item)
    return chosen, left_float


def schemes_of(scheme: Scheme, exceptions: Mapping[str, Scheme]) -> Schemes:
    """The scheme of each node: its own by name, or that of the whole."""
    return lambda node: exceptions.get(node.name or "", scheme)


def first_layers(graph: ir.Graph) -> set[ir.Node]:
    """The layers with weights that have none before them."""
    return _not_beyond(graph, list(graph), ir.Node.predecessors)


def first_and_last(graph: ir.Graph) -> list[str]:
    """Names of the layers with weights that have none before them, or none behind them."""
    ends = first_layers(graph) | _not_beyond(graph, list(reversed(graph)), ir.Node.successors)
    return [node.name or "" for node in graph if node in ends]


def _not_beyond(
    graph: ir.Graph, nodes: Sequence[ir.Node], neighbours: Callable[[ir.Node], Sequence[ir.Node]]
) -> set[ir.Node]:
    """The layers with weights that no other is on the way to, along neighbours that come first among the nodes."""
    layers = {item.node for item in layer_nodes.weighted_nodes(graph) if item.weight_index is not None}
    beyond: set[ir.Node] = set()  # of a layer, if only through other nodes
    for node in nodes:
        if any(other in layers or other in beyond for other in neighbours(node)):
            beyond.add(node)
    return layers - beyond


def weight_sites(items: Sequence[layer_nodes.WeightedNode], scheme_of: Schemes) -> list[Site]:
    """The Q/DQ pairs of constant weights: one for every weight, format and axis, whoever shares it."""
    sites: dict[tuple[int, int | None, str], Site] = {}
    for item in items:
        spec = scheme_of(item.node).weights
        if item.weight_index is None or item.weight is None or not graphs.is_constant(item.weight) or not spec.enabled:
            continue
        axis = {"tensor": None, "channel": item.channel_axis, "block": item.reduction_axis}[spec.granularity]
        key = (id(item.weight), axis, str(spec))
        uses = sites[key].uses if key in sites else ()
        sites[key] = Site(item.weight, (*uses, (item.node, item.weight_index)), spec, axis)
    return list(sites.values())


def merged(sites: Sequence[Site]) -> list[Site]:
    """Sites on one value with one format share a pair."""
    found: dict[tuple[int, int | None, str], Site] = {}
    for site in sites:
        key = (id(site.value), site.axis, str(site.spec))
        if key in found:
            uses = found[key].uses + tuple(use for use in site.uses if use not in found[key].uses)
            site = Site(site.value, uses, site.spec, site.axis, site.like)
        found[key] = site
    return list(found.values())
