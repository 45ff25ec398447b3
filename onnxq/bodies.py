"""The branches and loops of a model, each as a model of its own, so that what works on models works on them too."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxq import graph as graphs

FEWEST_SHARED_BYTES = 1 << 10  # of a constant that is looked for in other bodies


def bodies(model: ir.Model) -> Iterator[ir.Model]:
    """Every body of If, Loop and Scan, the innermost first; what is done to it is done to ``model``.

    What a body reads of the graphs around it are inputs and initializers of the model that stands for it. Large
    constants that it gets go into the main graph, once for all bodies that have the same: branches of one network often
    do. What DequantizeLinear reads stays, as onnxruntime finds that only beside the product behind it.
    """
    shared: _Shared | None = None  # made when it is needed: the main graph may hold gigabytes
    for body in reversed(list(model.graph.subgraphs())):
        opened = _Opened(model, body)
        try:
            yield opened.inner
        finally:
            new = opened.close()
            shared = shared or (_Shared(model.graph) if new else None)
            for value in new:
                assert shared is not None
                shared.add(value)


@dataclass
class _Opened:
    """A body that stands as a model of its own until it is closed."""

    model: ir.Model
    body: ir.Graph
    inner: ir.Model = field(init=False)
    _captured: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)  # what is read, and its stand-in

    def __post_init__(self) -> None:
        self._names = graphs.Names(self.model.graph)
        self._before = set(_values(self.body))
        nodes = set(self.body.all_nodes())
        for value in _read_from_around(self.body):
            stand_in = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
            for node, index in graphs.consumers(value):
                if node in nodes:
                    node.replace_input_with(index, stand_in)
            if graphs.is_constant(value):
                self.body.initializers.add(stand_in)
            else:
                self.body.inputs.append(stand_in)
            self._captured.append((value, stand_in))
        self.body.opset_imports.update(self.model.opset_imports)
        self.inner = ir.Model(self.body, ir_version=self.model.ir_version)

    def close(self) -> list[ir.Value]:
        """Let the body read from around it again; its new large constants are returned."""
        for value, stand_in in self._captured:
            if stand_in.is_graph_output():  # a body hands on what its nodes give, and nothing else
                self._hand_on(stand_in)
            stand_in.replace_all_uses_with(value)
            if stand_in.is_initializer():
                self.body.initializers.pop(stand_in.name or "", None)
            if stand_in in self.body.inputs:
                self.body.inputs.remove(stand_in)
        self.model.opset_imports.update(self.body.opset_imports)
        self.body.opset_imports.clear()
        for value in list(_values(self.body)):
            if value not in self._before:
                value.name = self._names.free(value.name or "")
        for value, _ in self._captured:
            if value.is_initializer() and not value.uses() and value.graph is not None:
                value.graph.initializers.pop(value.name or "")
        return [value for value in self.body.initializers.values() if value not in self._before and _is_large(value)]

    def _hand_on(self, stand_in: ir.Value) -> None:
        tape = ir.tape.Tape()
        copy = tape.op("Identity", [stand_in])
        copy.name, copy.type, copy.shape = stand_in.name, stand_in.type, stand_in.shape
        tape.nodes[0].name = f"{stand_in.name}_handed_on"
        self.body.extend(tape.nodes)
        for index, value in enumerate(self.body.outputs):
            if value is stand_in:
                self.body.outputs[index] = copy


def _read_from_around(body: ir.Graph) -> list[ir.Value]:
    """What a body reads, or hands on, that lies in the graphs around it, in the order of reading."""
    own = set(_values(body))
    read = [value for node in body.all_nodes() for value in node.inputs if value is not None]
    return list(dict.fromkeys(value for value in read if value not in own))


def _values(body: ir.Graph) -> Iterator[ir.Value]:
    """All values of a body and of those inside it."""
    for graph in (body, *body.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


class _Shared:
    """The large constants of a graph, by what they hold."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._found = {_digest(value): value for value in graph.initializers.values() if _is_large(value)}

    def add(self, value: ir.Value) -> None:
        """Move a constant of a body there, or let its readers read the same one there."""
        assert value.graph is not None
        value.graph.initializers.pop(value.name or "")
        same = self._found.setdefault(_digest(value), value)
        if same is value:
            self._graph.initializers.add(value)
        else:
            value.replace_all_uses_with(same)


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.nbytes < FEWEST_SHARED_BYTES:
        return False
    return not any(graphs.is_dequantize(reader) for reader, _ in graphs.consumers(value))


def _digest(value: ir.Value) -> bytes:
    tensor = value.const_value
    assert tensor is not None
    digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()).digest()
    graphs.let_go(value)
    return digest
