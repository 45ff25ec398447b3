"""Questions about a graph: what is constant, what is a weight, who reads a value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

ONNX_DOMAINS = ("", "ai.onnx")
ONNXRUNTIME_DOMAIN = "com.microsoft"
FUSED_ATTENTION = ("MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding")  # of onnxruntime, without weights

# Ops whose arithmetic runs on integer or FP8 matrix units: input 0 is the activation, input 1 the weight.
WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# Ops that compute on codes without Q/DQ around them.
QDQ = ("QuantizeLinear", "DequantizeLinear")
QUANTIZED_OPS = (
    "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm",
    "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "MatMulBnb4", "QAttention",
    "QEmbedLayerNormalization", "GatherBlockQuantized",
)  # fmt: skip

# Ops that hand on what they read, at least in inference.
RECURRENT = ("LSTM", "GRU", "RNN")
HANDED_ON = ("Identity", "Dropout", "Cast", "QuantizeLinear", "DequantizeLinear")


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
    """Whether the value is float32, float16 or bfloat16 (unknown types count as float32)."""
    return value.dtype in (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


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


@dataclass(frozen=True)
class WeightedNode:
    """A Conv, ConvTranspose, Gemm or MatMul, with its constant weight if it has one.

    Attributes:
        node: The node.
        activation_index: Which input is the activation.
        weight_index: Which input is the weight, ``None`` for the product of two activations.
        channel_axis: The weight's axis of output channels.
        reduction_axis: The weight's axis that the product sums over (the first, for a convolution).
    """

    node: ir.Node
    activation_index: int
    weight_index: int | None
    channel_axis: int = 0
    reduction_axis: int = 1

    @property
    def weight(self) -> ir.Value | None:
        """The weight as the node reads it: an initializer, or what a DequantizeLinear makes of one."""
        return None if self.weight_index is None else self.node.inputs[self.weight_index]

    @property
    def activation(self) -> ir.Value:
        """The activation as the node reads it."""
        value = self.node.inputs[self.activation_index]
        if value is None:
            raise ValueError(f"{self.node.name} has no activation input")
        return value


def weighted(node: ir.Node) -> WeightedNode | None:
    """``node`` as a :class:`WeightedNode`, or ``None`` if it is no matrix product of floats.

    A weight may already be behind DequantizeLinear: the question is the same before and after insertion.
    """
    if not is_op(node, *WEIGHTED_OPS) or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    left, right = node.inputs[0], node.inputs[1]
    first, second = _is_weight(left), _is_weight(right)
    if node.op_type == "Conv":
        return WeightedNode(node, 0, 1 if second else None, 0, 1)
    if node.op_type == "ConvTranspose":
        return WeightedNode(node, 0, 1 if second else None, 1, 0)
    if node.op_type == "Gemm":
        transposed = bool(node.attributes.get_int("transB", 0))
        return WeightedNode(node, 0, 1 if second else None, 0 if transposed else 1, 1 if transposed else 0)
    if second:
        dimensions = rank(right)
        if dimensions is None or dimensions < 2:
            return WeightedNode(node, 0, None)  # a matrix-vector product: nothing to gain
        return WeightedNode(node, 0, 1, dimensions - 1, dimensions - 2)
    if first:
        dimensions = rank(left)
        if dimensions is None or dimensions < 2:
            return WeightedNode(node, 0, None)
        return WeightedNode(node, 1, 0, dimensions - 2, dimensions - 1)  # weight on the left
    return WeightedNode(node, 0, None)


def _is_weight(value: ir.Value) -> bool:
    """Whether the value is constant, if only behind Q/DQ or a change of layout."""
    if is_constant(value):
        return True
    producer = value.producer()
    seen = 0
    while producer is not None and seen < 4:
        if is_dequantize(producer) or is_quantize(producer) or is_op(producer, "Transpose", "Reshape", "Identity"):
            source = producer.inputs[0]
        else:
            return False
        if is_constant(source):
            return True
        producer = None if source is None else source.producer()
        seen += 1
    return False


def weighted_nodes(graph: ir.Graph) -> Iterator[WeightedNode]:
    """Every Conv, ConvTranspose, Gemm and MatMul of the graph, in order."""
    for node in graph:
        found = weighted(node)
        if found is not None:
            yield found


def reads_codes(item: WeightedNode) -> bool:
    """Whether the node reads codes of its weight, or of activations; with a float weight it does not."""
    if is_constant(item.weight):
        return False
    if any(is_dequantized(value) or is_tabulated(value) for value in item.node.inputs[:2]):
        return True
    lookup = lookup_behind(item) if item.weight_index is None else None
    return lookup is not None and lookup.op_type == "GatherBlockQuantized"


def lookup_behind(item: WeightedNode) -> ir.Node | None:
    """What reads the weight of a product in a table of several, as that of an expert is, by a computed index."""
    for value in item.node.inputs[:2]:
        for node in nearest_behind(value, is_lookup, lambda node: is_op(node, *DATA_MOVEMENT)):
            table = node.inputs[0]
            if table is not None and (rank(table) or 0) > 2:  # others are of rows, as of tokens
                return node
    return None


def is_lookup(node: ir.Node) -> bool:
    """Whether a node reads entries along the first axis of a constant table, which ones is computed."""
    if len(node.inputs) < 2 or not is_constant(node.inputs[0]) or is_constant(node.inputs[1]):
        return False
    if node.op_type == "GatherBlockQuantized" and node.domain == ONNXRUNTIME_DOMAIN:
        return node.attributes.get_int("gather_axis", 0) == 0
    if is_op(node, "Gather"):
        return node.attributes.get_int("axis", 0) == 0
    indices = node.inputs[1].shape if is_op(node, "GatherND") and node.inputs[1] is not None else None
    return indices is not None and indices[-1] == 1 and node.attributes.get_int("batch_dims", 0) == 0


def depthwise_channels(node: ir.Node) -> int | None:
    """The channels of a convolution with one result and one kernel for each; ``None`` if it is none."""
    weight = node.inputs[1] if is_op(node, "Conv") and len(node.inputs) > 1 else None
    shape, groups = None if weight is None else weight.shape, node.attributes.get_int("group", 1)
    return groups if groups > 1 and shape is not None and shape[0] == groups and shape[1] == 1 else None


def multiplies_several(node: ir.Node) -> bool:
    """Whether the node is a MatMul with several matrices on its right, as the experts of a mixture are."""
    return is_op(node, "MatMul") and node.inputs[1] is not None and (rank(node.inputs[1]) or 0) > 2


def lstm_weights(node: ir.Node) -> list[WeightedNode]:
    """The weights of an LSTM [directions, 4 · hidden, inputs], those of the input and those of the recurrence."""
    return [WeightedNode(node, 0, index, channel_axis=1, reduction_axis=2) for index in (1, 2)]


def is_integer_lstm(node: ir.Node) -> bool:
    """Whether the node is onnxruntime's LSTM whose weights are codes."""
    return node.domain == ONNXRUNTIME_DOMAIN and node.op_type == "DynamicQuantizeLSTM"


def is_fused_attention(node: ir.Node) -> bool:
    """Whether ``node`` is attention, or its rotary positions, in one op of onnxruntime's own."""
    return node.domain == ONNXRUNTIME_DOMAIN and node.op_type in FUSED_ATTENTION


def multiplies_integers(node: ir.Node) -> bool:
    """Whether the node is a layer on integers in one op, which no Q/DQ stand around."""
    packed = node.domain == ONNXRUNTIME_DOMAIN and node.op_type == "MatMulNBits"
    return packed or is_integer_lstm(node) or is_op(node, "MatMulInteger")


def layers_inside(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """Float layers in the branches and loops of a graph, each with the If, Loop or Scan that it lies in."""
    for node in graph:
        for attribute in node.attributes.values():
            for inner in graphs_in(attribute):
                for item in weighted_nodes(inner):
                    if not reads_codes(item):
                        yield item.node.name or item.node.op_type, node
                yield from ((name, node) for name, _ in layers_without_codes(inner))


def layers_without_codes(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """Layers with weights that no target gives Q/DQ, and why: in branches and loops, recurrent, of other domains."""
    for name, around in layers_inside(graph):
        advice = "; `onnxq specialize` takes one branch" if is_op(around, "If") else ""
        where = f"inside the {around.op_type} {around.name!r}"
        yield name, f"{where}; a CPU runs codes there, with dynamic ranges or for weights alone{advice}"
    for node in graph:
        if is_op(node, *RECURRENT):
            yield node.name or "", f"the weights of {node.op_type} have no form with Q/DQ"
        if node.op_type in QUANTIZED_OPS or is_fused_attention(node):
            continue
        has_matrix = any(
            is_constant(value) and is_float(value) and (rank(value) or 0) > 1 for value in node.inputs if value
        )
        if has_matrix and is_op(node, "Einsum"):
            yield node.name or "", "an Einsum has no kernel for codes; export it as MatMul"
        elif has_matrix and node.domain not in ONNX_DOMAINS:
            yield node.name or "", f"it is of the domain {node.domain}; start from the exporter's model"


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


def last_sums(graph: ir.Graph) -> set[str]:
    """Names of the values that a layer or an Add makes and that no other layer is computed from, as logits are."""
    read: set[ir.Value] = set()  # what layers are computed from
    for node in reversed(graph):
        if weighted(node) is not None or any(output in read for output in node.outputs):
            read.update(value for value in node.inputs if value is not None)
    return {
        value.name or ""
        for node in graph
        if weighted(node) is not None or is_op(node, "Add")
        for value in node.outputs
        if value not in read
    }


def pooled_features(graph: ir.Graph, last: Collection[str]) -> set[str]:
    """Names of the means over a map from which a layer computes what :func:`last_sums` names."""
    found = set[str]()
    for item in weighted_nodes(graph):
        value: ir.Value | None = item.activation
        names, node = set[str](), None
        while value is not None and (node := value.producer()) is not None:
            names.add(value.name or "")
            if not (is_quantize(node) or is_dequantize(node) or is_op(node, *DATA_MOVEMENT)):
                break
            value = node.inputs[0]
        if node is not None and is_op(node, *AVERAGES) and item.node.outputs[0].name in last:
            found |= names
    return found


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
