"""Ops that onnxruntime does not know, as plugins of TensorRT are, and the graph without them.

Detectors end in such an op (EfficientNMS_TRT and its kin), which TensorRT alone runs. Nothing that is quantized needs
what it makes, so a model is worked on without it, and without all that reads it; what they read are outputs meanwhile.
When the model is written they are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from onnxq import custom_ops, dynamic_fp4, shapes
from onnxq import graph as graphs
from onnxq.passes.lower_opset import reads_the_same

PLUGIN_DOMAIN = "trt.plugins"  # onnxruntime's TensorRT provider looks for plugins there; TensorRT's parser anywhere
KNOWN_DOMAINS = (
    *graphs.ONNX_DOMAINS, "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training",
    graphs.ONNXRUNTIME_DOMAIN, f"{graphs.ONNXRUNTIME_DOMAIN}.nchwc",
)  # fmt: skip
ONNXRUNTIME_IN_ONNX = ("SimplifiedLayerNormalization",)  # ops of onnxruntime's in ONNX's own domain
KEY = "onnxq.behind_plugins"


@dataclass(frozen=True)
class Aside:
    """What was taken out of a graph.

    Attributes:
        graph: The plugins and all behind them; its inputs are what they read.
        outputs: The whole graph's outputs in order, each by its place among those of ``graph`` (``True``) or of what
            was left (``False``).
        sources: What each input of ``graph`` is: the place of an output of what was left, or the name of an input.
        plugins: Domain and op of each plugin.
    """

    graph: ir.Graph
    outputs: list[tuple[bool, int]]
    sources: list[int | str]
    plugins: list[str]

    def spelled(self) -> str:
        """The plugins in words."""
        return ", ".join(dict.fromkeys(self.plugins))


def claim(model: ir.Model) -> None:
    """Move ops that ONNX's own domain does not have to that of plugins: exporters of detectors leave them there."""
    for node in model.graph.all_nodes():
        if node.domain not in graphs.ONNX_DOMAINS or node.op_type in ONNXRUNTIME_IN_ONNX:
            continue
        if not onnx.defs.has(node.op_type):
            node.domain = PLUGIN_DOMAIN
            model.graph.opset_imports.setdefault(PLUGIN_DOMAIN, 1)


def is_plugin(node: ir.Node) -> bool:
    """Whether onnxruntime knows nothing of a node's domain, nor may a library of custom ops that it was told of."""
    if node.domain == PLUGIN_DOMAIN:
        return True
    return not (node.domain in KNOWN_DOMAINS or dynamic_fp4.makes_fp4(node) or custom_ops.list_libraries())


def aside(model: ir.Model) -> Aside | None:
    """What :func:`set_aside` took out of a model, if anything."""
    found: Aside | None = model.graph.meta.get(KEY)
    return found


def set_aside(model: ir.Model) -> None:
    """Take plugins and all that depends on them out of a model, where anything else is left of it.

    Args:
        model: It is changed in place, and remembers what was taken out; its copies do, too.
    """
    graph = model.graph
    behind, plugins = _behind_plugins(graph)
    if not behind or len(behind) == len(graph):
        return
    read = dict.fromkeys(value for node in behind for value in _read(node, graph))
    edges = [value for value in read if value.producer() not in behind and not value.is_initializer()]
    outputs = list(graph.outputs)
    lost = [value for value in outputs if value.producer() in behind]
    left = list(dict.fromkeys(value for value in outputs if value.producer() not in behind))
    left += [value for value in edges if not value.is_graph_input() and value not in left]
    if not left or not lost:
        return
    taken = Aside(
        ir.convenience.extract(graph, edges, lost),
        [(value in lost, (lost if value in lost else left).index(value)) for value in outputs],
        [value.name or "" if value.is_graph_input() else left.index(value) for value in edges],
        plugins,
    )
    graph.outputs.clear()
    graph.outputs.extend(left)
    graph.remove(list(behind), safe=True)
    RemoveUnusedNodesPass()(model)
    graph.meta[KEY] = taken


def put_back(model: ir.Model) -> None:
    """Put what :func:`set_aside` took out of a model, or of what it is a copy of, back in its place."""
    graph, taken = model.graph, model.graph.meta.pop(KEY, None)
    if taken is None:
        return
    names, part = graphs.Names(graph), taken.graph.clone()
    left, inputs = list(graph.outputs), {value.name: value for value in graph.inputs}
    lost = list(part.outputs)
    part.outputs.clear()
    for value, source in zip(list(part.inputs), taken.sources, strict=True):
        given = inputs[source] if isinstance(source, str) else left[source]
        ir.convenience.replace_all_uses_with(value, given)
    for value in list(part.initializers.values()):
        part.initializers.pop(value.name or "")
        value.name = names.free(value.name or "")
        graph.register_initializer(value)
    nodes = list(part)
    part.remove(nodes)
    graph.extend(nodes)
    graph.outputs.clear()
    graph.outputs.extend((lost if is_lost else left)[place] for is_lost, place in taken.outputs)
    for domain, version in part.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    needed = part.opset_imports[""]
    if not all(reads_the_same(node, needed, graph.opset_imports[""]) for node in nodes):
        graph.opset_imports[""] = needed


def without_plugins(model: ir.Model) -> ir.Model:
    """The model, or a copy of it without plugins where there are some."""
    if not holds_plugins(model):
        return model
    copy = model.clone()
    InlinePass()(copy)
    set_aside(copy)
    if any(value.dtype is None for value in copy.graph.outputs):
        shapes.infer(copy)
    return copy


def holds_plugins(model: ir.Model) -> bool:
    """Whether a model, which may have functions of its own, holds an op that onnxruntime does not know."""
    graphs_of = [model.graph, *(function.graph for function in model.functions.values())]
    nodes = (node for graph in graphs_of for node in graph.all_nodes())
    return any(is_plugin(node) and node.op_identifier() not in model.functions for node in nodes)


def _behind_plugins(graph: ir.Graph) -> tuple[dict[ir.Node, None], list[str]]:
    """The nodes that are plugins or depend on one, in order, and the plugins in words."""
    behind: dict[ir.Node, None] = {}
    plugins: list[str] = []
    for node in graph:
        found = [inner for inner in graphs.with_bodies(node) if is_plugin(inner)]
        plugins += [f"{inner.domain} {inner.op_type}" for inner in found]
        if found or any(value.producer() in behind for value in _read(node, graph)):
            behind[node] = None
    return behind, plugins


def _read(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    """The values of a graph that a node reads, also within its branches."""
    for inner in graphs.with_bodies(node):
        for value in inner.inputs:
            if value is not None and (inner is node or value.graph is graph):
                yield value
