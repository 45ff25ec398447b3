"""Questions about a graph: what is constant, who reads a value, what lies behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

ONNX_DOMAINS = ("", "ai.onnx")
ONNXRUNTIME_DOMAIN = "com.microsoft"
QDQ = ("QuantizeLinear", "DequantizeLinear")

FLOATS = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# Ops that hand on what they read, at least in inference.
HANDED_ON = ("Identity", "Dropout", "Cast", "QuantizeLinear", "DequantizeLinear")
DRAWS = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli")
RANDOM = (*DRAWS, "Multinomial")


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of the given ops of the ONNX domain."""
    return node is not None and node.domain in ONNX_DOMAINS and node.op_type in op_types


def is_quantize(node: ir.Node | None) -> bool:
    """Whether ``node`` is a QuantizeLinear."""
    return is_op(node, "QuantizeLinear")


def is_dequantize(node: ir.Node | None) -> bool:
    """Whether ``node`` is a DequantizeLinear."""
    return is_op(node, "DequantizeLinear")


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is known when the model is built: an initializer that is not also an input."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def is_float(value: ir.Value) -> bool:
    """Whether the value is a tensor of float32, float16 or bfloat16 (unknown types count as float32)."""
    return value.dtype in FLOATS and is_tensor(value)


def is_tensor(value: ir.Value) -> bool:
    """Whether the value is no sequence of tensors, and no optional one."""
    return not isinstance(value.type, ir.SequenceType | ir.OptionalType)


def is_float32(value: ir.Value) -> bool:
    """Whether the value is float32 (an unknown type counts as that)."""
    return value.dtype in (None, ir.DataType.FLOAT)


def rank(value: ir.Value) -> int | None:
    """Number of dimensions, if it is known."""
    return None if value.shape is None else len(value.shape)


def consumers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The nodes that read the value and at which input, in graph order of insertion."""
    return [(use.node, use.idx) for use in value.uses()]


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads the value, and once; ``None`` if there is none, or if the value leaves the graph."""
    readers = consumers(value)
    return readers[0][0] if len(readers) == 1 and not value.is_graph_output() else None


# Ops that hand on what they read, so that Q/DQ before them still means the op after them.
DATA_MOVEMENT = (
    "MaxPool", "Identity", "Transpose", "Slice", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Split", "Pad",
)  # fmt: skip


AVERAGES = ("GlobalAveragePool", "AveragePool", "ReduceMean")


def computed_from(value: ir.Value) -> set[ir.Value]:
    """All values that a value is computed from, and itself."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        producer = item.producer()
        if producer is not None:
            stack.extend(source for source in producer.inputs if source is not None)
    return seen


def nearest_behind(
    value: ir.Value | None, wanted: Callable[[ir.Node], bool], through: Callable[[ir.Node], bool]
) -> Iterator[ir.Node]:
    """The first wanted nodes on every way up from a value, each once; ways end at what is not to be gone through."""
    seen: set[ir.Node] = set()
    open_ = [value]
    while open_:
        current = open_.pop()
        node = None if current is None else current.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if wanted(node):
            yield node
        elif through(node):
            open_ += node.inputs


def let_go(value: ir.Value) -> None:
    """Unmap a weight that lies in a file; it is mapped again when it is read next.

    Mapped pages count as the process's own, and a pass over all weights would gather those of the whole file.
    """
    if isinstance(value.const_value, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # somebody still looks at it
            value.const_value.release()


def is_dequantized(value: ir.Value | None) -> bool:
    """Whether a DequantizeLinear makes the value, if only through ops that move data."""
    producer = None if value is None else value.producer()
    while producer is not None and is_op(producer, *DATA_MOVEMENT):
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    return is_dequantize(producer)


def is_tabulated(value: ir.Value | None) -> bool:
    """Whether the value is a weight that is stored as indices into a table of levels."""
    scaled = None if value is None else value.producer()
    decoded = scaled.inputs[0].producer() if is_op(scaled, "Mul") and scaled and scaled.inputs[0] else None
    index = decoded.inputs[1].producer() if is_op(decoded, "Gather") and decoded and decoded.inputs[1] else None
    return index is not None and is_op(index, "Cast") and is_constant(index.inputs[0])


def holds_narrow_floats(graph: ir.Graph) -> bool:
    """Whether any Q/DQ is FP8, or FP4, which runs as FP8: onnxruntime's optimiser refuses or changes such graphs."""
    narrow = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT4E2M1)
    return any(
        value is not None and value.dtype in narrow
        for node in graph
        if is_quantize(node) or is_dequantize(node)
        for value in (node.inputs[0], *node.inputs[2:])
    )


def draws_at_random(model: ir.Model) -> bool:
    """Whether the model draws numbers at random, in the bodies of its nodes too."""
    return any(is_op(node, *DRAWS) for node in model.graph.all_nodes())


def is_bfloat16(model: ir.Model) -> bool:
    """Whether any value of the model is bfloat16."""
    return any(
        value.dtype == ir.DataType.BFLOAT16
        for graph in model.graphs()
        for value in (*graph.inputs, *graph.initializers.values(), *(made for node in graph for made in node.outputs))
    )


def tensor_outputs(graph: ir.Graph) -> list[str]:
    """Names of the graph's outputs that are tensors: sequences and optional values are not compared."""
    return [value.name or "" for value in graph.outputs if is_tensor(value)]


def input_named(graph: ir.Graph, name: str) -> ir.Value:
    """The input of that name, which is there."""
    return next(value for value in graph.inputs if value.name == name)


def values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every named value of the graph: inputs, initializers and node outputs."""
    found = {value.name: value for value in graph.inputs if value.name}
    found |= {name: value for name, value in graph.initializers.items() if name}
    for node in graph:
        found |= {value.name: value for value in node.outputs if value.name}
    return found


class Names:
    """The names that values and nodes of a graph have, those of graphs inside it too; and free ones.

    Args:
        graph: The graph as it is now.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._taken = {value.name or "" for value in graph.inputs} | set(graph.initializers)
        for node in graph.all_nodes():
            self._taken.add(node.name or "")
            self._taken.update(value.name or "" for value in node.outputs)
            for attribute in node.attributes.values():
                for inner in graphs_in(attribute):
                    self._taken |= {value.name or "" for value in inner.inputs} | set(inner.initializers)

    def free(self, name: str) -> str:
        """The name, with underscores behind it if it is taken; taken from now on."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def graphs_in(attribute: ir.Attr) -> Sequence[ir.Graph]:
    """The graphs that an attribute holds: bodies of If, Loop and Scan."""
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def with_bodies(node: ir.Node) -> Iterator[ir.Node]:
    """The node, and all nodes in its branches or its loop."""
    yield node
    for attribute in node.attributes.values():
        for inner in graphs_in(attribute):
            yield from inner.all_nodes()
