"""Run a model of gigabytes part by part: no more of its weights are in memory than one part has.

onnxruntime holds all weights of a session, copied and often packed once more for its kernels. A model whose weights
exceed the machine's memory, or a limit set for the process, still runs when it is cut along its topological order:
each part becomes a session, is run on what the parts before it gave, and is dropped again. Weights that lie in files
are mapped, never copied. Making a session is cheap without packing and optimisation, so that the whole costs about
what reading the weights does.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

Array = np.ndarray[Any, Any]
PART_BYTES = 128 << 20
OpenSession = Callable[[bytes, Sequence[str]], Any]


@dataclass(frozen=True)
class Description:
    """An input or output, as onnxruntime describes it."""

    name: str
    type: str = "tensor"  # of parts that is all that there is


@dataclass
class _Part:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: set[str] = field(default_factory=set)
    weight_bytes: int = 0


class Parts:
    """A model in parts, with the interface of an onnxruntime session.

    Args:
        model: The model, its nodes in topological order and every value with a type.
        open_session: Makes a session of a part's bytes; it is told which initializers the part reads.
        part_bytes: A part ends before its weights, as float32, exceed so many bytes. One node's are never divided.
    """

    def __init__(self, model: onnx.ModelProto, open_session: OpenSession, part_bytes: int = PART_BYTES) -> None:
        self._open = open_session
        self._model = model
        graph = self._model.graph
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
        self._inputs = [value.name for value in graph.input if value.name not in self._initializers]
        self._outputs = [value.name for value in graph.output]
        self._parts = self._cut(part_bytes)

    def __len__(self) -> int:
        return len(self._parts)

    def get_inputs(self) -> list[Description]:
        """The model's inputs, in order."""
        return [Description(name) for name in self._inputs]

    def get_outputs(self) -> list[Description]:
        """The model's outputs, in order."""
        return [Description(name) for name in self._outputs]

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        """Run one batch through all parts and return the named outputs (all, if none are named)."""
        wanted = list(self._outputs if outputs is None else outputs)
        reads = [_read_by(part.nodes) for part in self._parts]
        values = dict(feed)
        for number, part in enumerate(self._parts):
            later = set(wanted).union(*reads[number + 1 :])
            made = [name for node in part.nodes for name in node.output if name in later]
            given = [name for name in reads[number] if name in values]
            if made:
                session = self._open(self._part_bytes(part, given, made), sorted(part.initializers))
                found = session.run(made, {name: values[name] for name in given})
                values.update(zip(made, found, strict=True))
                del session, found
                _give_back()
            values = {name: value for name, value in values.items() if name in later}
        return [values[name] for name in wanted]

    def _cut(self, part_bytes: int) -> list[_Part]:
        parts = [_Part()]
        sizes = {name: _bytes_of(tensor) for name, tensor in self._initializers.items()}
        last_read = {name: index for index, node in enumerate(self._model.graph.node) for name in _read_by([node])}
        untyped_until = -1  # a value without a type cannot cross from one session to the next
        for index, node in enumerate(self._model.graph.node):
            reads = _read_by([node])
            new = {name for name in reads if name in sizes} - parts[-1].initializers
            added = sum(sizes[name] for name in new)
            if (
                added
                and parts[-1].weight_bytes
                and parts[-1].weight_bytes + added > part_bytes
                and index > untyped_until
            ):
                parts.append(_Part())
                new = {name for name in reads if name in sizes}
                added = sum(sizes[name] for name in new)
            parts[-1].nodes.append(node)
            parts[-1].initializers |= new
            parts[-1].weight_bytes += added
            untyped = (last_read.get(name, -1) for name in node.output if name and name not in self._types)
            untyped_until = max(untyped_until, *untyped, -1)
        return parts

    def _part_bytes(self, part: _Part, given: Sequence[str], made: Sequence[str]) -> bytes:
        model = onnx.ModelProto()
        model.ir_version = self._model.ir_version
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.graph.name = self._model.graph.name or "part"
        model.graph.node.extend(part.nodes)
        model.graph.initializer.extend(self._initializers[name] for name in sorted(part.initializers))
        model.graph.input.extend(self._typed(name) for name in given)
        model.graph.output.extend(self._typed(name) for name in made)
        data: bytes = model.SerializeToString()
        return data

    def _typed(self, name: str) -> onnx.ValueInfoProto:
        """The value with its type; its shape is left to the run, because an export may declare a wrong one."""
        value = onnx.ValueInfoProto()
        value.CopyFrom(self._types[name])
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
        return value


def _give_back() -> None:
    """Let the system have the memory that the allocator keeps for later: the next part's weights are other sizes."""
    with contextlib.suppress(OSError, AttributeError):  # glibc has this, others do not need it
        ctypes.CDLL(None).malloc_trim(0)


def _read_by(nodes: Sequence[onnx.NodeProto]) -> dict[str, None]:
    """Names that the nodes, and graphs inside them, read from outside, in order."""
    read: dict[str, None] = {}
    made: set[str] = set()
    for node in nodes:
        names = dict.fromkeys(node.input)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                inner = {value.name for value in (*graph.input, *graph.initializer)}
                names.update(dict.fromkeys(name for name in _read_by(graph.node) if name not in inner))
                names.update(dict.fromkeys(value.name for value in graph.output))
        read.update(dict.fromkeys(name for name in names if name and name not in made))
        made.update(node.output)
    return read


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """What the tensor takes as float32, which a literal run unpacks codes to."""
    bits = max(32, ir.DataType(tensor.data_type).bitwidth)
    return int(math.prod(tensor.dims) * bits // 8)
