"""The layers of a graph: which nodes multiply by weights, what they read, and which have codes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxq import graph as graphs

FUSED_ATTENTION = ("MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding")  # of onnxruntime, without weights

# Ops whose arithmetic runs on integer or FP8 matrix units: input 0 is the activation, input 1 the weight.
WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# Ops that compute on codes without Q/DQ around them.
QUANTIZED_OPS = (
    "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm",
    "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "MatMulBnb4", "QAttention",
    "QEmbedLayerNormalization", "GatherBlockQuantized",
)  # fmt: skip
RECURRENT = ("LSTM", "GRU", "RNN")


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
    if (
        not graphs.is_op(node, *WEIGHTED_OPS)
        or len(node.inputs) < 2
        or node.inputs[0] is None
        or node.inputs[1] is None
    ):
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
        dimensions = graphs.rank(right)
        if dimensions is None or dimensions < 2:
            return WeightedNode(node, 0, None)  # a matrix-vector product: nothing to gain
        return WeightedNode(node, 0, 1, dimensions - 1, dimensions - 2)
    if first:
        dimensions = graphs.rank(left)
        if dimensions is None or dimensions < 2:
            return WeightedNode(node, 0, None)
        return WeightedNode(node, 1, 0, dimensions - 2, dimensions - 1)  # weight on the left
    return WeightedNode(node, 0, None)


def _is_weight(value: ir.Value) -> bool:
    """Whether the value is constant, if only behind Q/DQ or a change of layout."""
    if graphs.is_constant(value):
        return True
    producer = value.producer()
    seen = 0
    while producer is not None and seen < 4:
        if (
            graphs.is_dequantize(producer)
            or graphs.is_quantize(producer)
            or graphs.is_op(producer, "Transpose", "Reshape", "Identity")
        ):
            source = producer.inputs[0]
        else:
            return False
        if graphs.is_constant(source):
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
    if graphs.is_constant(item.weight):
        return False
    if any(graphs.is_dequantized(value) or graphs.is_tabulated(value) for value in item.node.inputs[:2]):
        return True
    lookup = lookup_behind(item) if item.weight_index is None else None
    return lookup is not None and lookup.op_type == "GatherBlockQuantized"


def lookup_behind(item: WeightedNode) -> ir.Node | None:
    """What reads the weight of a product in a table of several, as that of an expert is, by a computed index."""
    for value in item.node.inputs[:2]:
        for node in graphs.nearest_behind(value, is_lookup, lambda node: graphs.is_op(node, *graphs.DATA_MOVEMENT)):
            table = node.inputs[0]
            if table is not None and (graphs.rank(table) or 0) > 2:  # others are of rows, as of tokens
                return node
    return None


def is_lookup(node: ir.Node) -> bool:
    """Whether a node reads entries along the first axis of a constant table, which ones is computed."""
    if len(node.inputs) < 2 or not graphs.is_constant(node.inputs[0]) or graphs.is_constant(node.inputs[1]):
        return False
    if node.op_type == "GatherBlockQuantized" and node.domain == graphs.ONNXRUNTIME_DOMAIN:
        return node.attributes.get_int("gather_axis", 0) == 0
    if graphs.is_op(node, "Gather"):
        return node.attributes.get_int("axis", 0) == 0
    indices = node.inputs[1].shape if graphs.is_op(node, "GatherND") and node.inputs[1] is not None else None
    return indices is not None and indices[-1] == 1 and node.attributes.get_int("batch_dims", 0) == 0


def depthwise_channels(node: ir.Node) -> int | None:
    """The channels of a convolution with one result and one kernel for each; ``None`` if it is none."""
    weight = node.inputs[1] if graphs.is_op(node, "Conv") and len(node.inputs) > 1 else None
    shape, groups = None if weight is None else weight.shape, node.attributes.get_int("group", 1)
    return groups if groups > 1 and shape is not None and shape[0] == groups and shape[1] == 1 else None


def multiplies_several(node: ir.Node) -> bool:
    """Whether the node is a MatMul with several matrices on its right, as the experts of a mixture are."""
    return graphs.is_op(node, "MatMul") and node.inputs[1] is not None and (graphs.rank(node.inputs[1]) or 0) > 2


def lstm_weights(node: ir.Node) -> list[WeightedNode]:
    """The weights of an LSTM [directions, 4 · hidden, inputs], those of the input and those of the recurrence."""
    return [WeightedNode(node, 0, index, channel_axis=1, reduction_axis=2) for index in (1, 2)]


def is_integer_lstm(node: ir.Node) -> bool:
    """Whether the node is onnxruntime's LSTM whose weights are codes."""
    return node.domain == graphs.ONNXRUNTIME_DOMAIN and node.op_type == "DynamicQuantizeLSTM"


def is_fused_attention(node: ir.Node) -> bool:
    """Whether ``node`` is attention, or its rotary positions, in one op of onnxruntime's own."""
    return node.domain == graphs.ONNXRUNTIME_DOMAIN and node.op_type in FUSED_ATTENTION


def multiplies_integers(node: ir.Node) -> bool:
    """Whether the node is a layer on integers in one op, which no Q/DQ stand around."""
    packed = node.domain == graphs.ONNXRUNTIME_DOMAIN and node.op_type == "MatMulNBits"
    return packed or is_integer_lstm(node) or graphs.is_op(node, "MatMulInteger")


def layers_inside(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """Float layers in the branches and loops of a graph, each with the If, Loop or Scan that it lies in."""
    for node in graph:
        for attribute in node.attributes.values():
            for inner in graphs.graphs_in(attribute):
                for item in weighted_nodes(inner):
                    if not reads_codes(item):
                        yield item.node.name or item.node.op_type, node
                yield from ((name, node) for name, _ in layers_without_codes(inner))


def layers_without_codes(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """Layers with weights that no target gives Q/DQ, and why: in branches and loops, recurrent, of other domains."""
    for name, around in layers_inside(graph):
        advice = "; `onnxq specialize` takes one branch" if graphs.is_op(around, "If") else ""
        where = f"inside the {around.op_type} {around.name!r}"
        yield name, f"{where}; a CPU runs codes there, with dynamic ranges or for weights alone{advice}"
    for node in graph:
        if graphs.is_op(node, *RECURRENT):
            yield node.name or "", f"the weights of {node.op_type} have no form with Q/DQ"
        if node.op_type in QUANTIZED_OPS or is_fused_attention(node):
            continue
        has_matrix = any(
            graphs.is_constant(value) and graphs.is_float(value) and (graphs.rank(value) or 0) > 1
            for value in node.inputs
            if value
        )
        if has_matrix and graphs.is_op(node, "Einsum"):
            yield node.name or "", "an Einsum has no kernel for codes; export it as MatMul"
        elif has_matrix and node.domain not in graphs.ONNX_DOMAINS:
            yield node.name or "", f"it is of the domain {node.domain}; start from the exporter's model"


def last_sums(graph: ir.Graph) -> set[str]:
    """Names of the values that a layer or an Add makes and that no other layer is computed from, as logits are."""
    read: set[ir.Value] = set()  # what layers are computed from
    for node in reversed(graph):
        if weighted(node) is not None or any(output in read for output in node.outputs):
            read.update(value for value in node.inputs if value is not None)
    return {
        value.name or ""
        for node in graph
        if weighted(node) is not None or graphs.is_op(node, "Add")
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
            if not (
                graphs.is_quantize(node) or graphs.is_dequantize(node) or graphs.is_op(node, *graphs.DATA_MOVEMENT)
            ):
                break
            value = node.inputs[0]
        if node is not None and graphs.is_op(node, *graphs.AVERAGES) and item.node.outputs[0].name in last:
            found |= names
    return found
