"""What a transformer's layers add to and read from: the residual stream, and whether it may be turned as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import array_of

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
PASSED_ON = ("Identity", "Cast", "Dropout")


class BrokenStreamError(Exception):
    """A node that a rotation cannot pass: what it does there depends on single channels."""

    def __init__(self, node: ir.Node | None, value: ir.Value) -> None:
        self.node, self.value = node, value
        what = "an input or output of the model" if node is None else f"{node.op_type} {node.name!r}"
        super().__init__(f"{what} takes channels of {value.name!r} one by one")


@dataclass(frozen=True)
class Gain:
    """What a norm multiplies each channel by, and adds, before layers read it.

    Attributes:
        node: The Mul or the norm that has the factor.
        scale_index: At which input.
        shift: The node and input of what is added, or ``None``.
        readers: The layers behind.
        values: What lies between, turned like the stream.
    """

    node: ir.Node
    scale_index: int
    shift: tuple[ir.Node, int] | None
    readers: tuple[layer_nodes.WeightedNode, ...]
    values: tuple[ir.Value, ...]


@dataclass
class Stream:
    """Everything that touches one residual stream, as far as a rotation of its channels is concerned.

    Attributes:
        channels: Its width.
        values: Its values [..., channels].
        written: Constants whose axis of channels goes into it: the node that reads the constant, the input, the axis.
        readers: Layers that read it directly.
        gains: Norms' factors, with the layers behind them.
        has_means: Whether something subtracts the mean of its channels.
    """

    channels: int
    values: set[ir.Value] = field(default_factory=set)
    written: list[tuple[ir.Node, int, int]] = field(default_factory=list)
    readers: list[layer_nodes.WeightedNode] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    has_means: bool = False


def starts(graph: ir.Graph) -> Iterator[ir.Value]:
    """Sums of a layer's output and something else: where a residual stream may be found."""
    for node in graph:
        if not graphs.is_op(node, "Add"):
            continue
        output = node.outputs[0]
        if width_of(output) is not None and any(_is_layer_output(value) for value in node.inputs):
            others = [value for value in node.inputs if value is not None and not graphs.is_constant(value)]
            if len(others) == 2 and all(width_of(value) == width_of(output) for value in others):
                yield output


def explore(start: ir.Value) -> Stream:
    """Follow a value through all that hands its channels on, and collect what reads and writes them.

    A rotation of the channels commutes with sums, with factors that all channels of a row share, with the mean square
    of a row (and with its mean, if the rotation keeps it), and with everything along other axes. Layers with constant
    weights take it in. If nothing else is met, the stream is closed under the rotation: that is the proof.

    Raises:
        BrokenStreamError: something else is met.
    """
    width = width_of(start)
    assert width is not None
    stream = Stream(width)
    waiting = [start]
    while waiting:
        value = waiting.pop()
        if value in stream.values:
            continue
        if value.is_graph_output() or value.is_graph_input() or width_of(value) != width:
            raise BrokenStreamError(value.producer() if width_of(value) != width else None, value)
        stream.values.add(value)
        waiting += _before(stream, value)
        for node, index in graphs.consumers(value):
            waiting += _behind(stream, value, node, index)
    return stream


def width_of(value: ir.Value | None) -> int | None:
    """The size of the last axis of a tensor of rank 2 and more, where it is known."""
    if value is None or value.shape is None or len(value.shape) < 2 or not graphs.is_float(value):
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) and size > 1 else None


def _is_layer_output(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if graphs.is_op(node, "Add") and node is not None and any(graphs.is_constant(item) for item in node.inputs):
        return any(_is_layer_output(item) for item in node.inputs)
    item = None if node is None else layer_nodes.weighted(node)
    return item is not None and item.weight_index == 1 and item.node.op_type in ("MatMul", "Gemm")


def _before(stream: Stream, value: ir.Value) -> list[ir.Value]:
    """What of the stream a value is made from; constants that make it are noted down."""
    node = value.producer()
    if node is None or value is not node.outputs[0]:
        raise BrokenStreamError(node, value)
    item = layer_nodes.weighted(node)
    if item is not None and _is_matrix(item) and item.node.op_type in ("MatMul", "Gemm"):
        stream.written.append((node, 1, item.channel_axis))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            _note_constant(stream, node, 2, value)
        return []
    convolution = _patches(node, stream.channels)
    if convolution is not None:
        stream.written += [(convolution, index, 0) for index in range(1, len(convolution.inputs))]
        return []
    if graphs.is_op(node, "Gather") and graphs.is_constant(node.inputs[0]):
        if node.attributes.get_int("axis", 0) != 0 or graphs.rank(node.inputs[0]) != 2:  # type: ignore[arg-type]
            raise BrokenStreamError(node, value)
        stream.written.append((node, 0, 1))
        return []
    if graphs.is_op(node, "Add", "Sub", "Concat"):
        if node.op_type == "Concat" and _axis(node, value) == _last(value):
            raise BrokenStreamError(node, value)
        found = []
        for index, operand in enumerate(node.inputs):
            if graphs.is_constant(operand):
                _note_constant(stream, node, index, value)
            elif operand is not None and not _is_row_mean(operand, stream):
                found.append(operand)
        return found
    if graphs.is_op(node, "Mul", "Div"):
        left, right = node.inputs
        if _is_shared(right):
            return [left] if left is not None else []
        if node.op_type == "Mul" and _is_shared(left):
            return [right] if right is not None else []
    if graphs.is_op(node, *PASSED_ON) or _is_along_rows(node, value):
        source = node.inputs[0]
        if graphs.is_constant(source):
            _note_constant(stream, node, 0, value)
            return []
        return [] if source is None else [source]
    raise BrokenStreamError(node, value)


def _behind(stream: Stream, value: ir.Value, node: ir.Node, index: int) -> list[ir.Value]:
    """What of the stream a node makes from a value; layers and norms that take it in are noted down."""
    output = node.outputs[0]
    item = layer_nodes.weighted(node)
    if item is not None and item.activation is value and _is_matrix(item):
        stream.readers.append(item)
        return []
    if graphs.is_op(node, "Shape") or _is_square_mean(node, value):
        return []
    if graphs.is_op(node, "ReduceMean") and _reduces_rows(node, value):
        stream.has_means = True
        return []
    if node.op_type in NORMS and index == 0:
        axis = node.attributes.get_int("axis", -1)
        if axis not in (-1, _last(value)) or any(other.uses() for other in node.outputs[1:]):
            raise BrokenStreamError(node, value)
        stream.has_means |= node.op_type == "LayerNormalization"
        shift = (node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        _note_gain(stream, node, 1, shift, output)
        return []
    if graphs.is_op(node, "Mul", "Div"):
        other = node.inputs[1 - index]
        if _is_shared(other) and (index == 0 or node.op_type == "Mul"):
            return [output]
        if node.op_type == "Mul" and graphs.is_constant(other):
            add = _only_shift(output)
            shift = None if add is None else (add, 1 - list(add.inputs).index(output))
            _note_gain(stream, node, 1 - index, shift, output if add is None else add.outputs[0])
            return []
    if graphs.is_op(node, "Add", "Sub", "Concat", *PASSED_ON) or (index == 0 and _is_along_rows(node, output)):
        return [output]  # what else goes into it is asked when its turn comes
    raise BrokenStreamError(node, value)


def _note_constant(stream: Stream, node: ir.Node, index: int, value: ir.Value) -> None:
    constant = node.inputs[index]
    assert constant is not None
    shape = array_of(constant).shape
    if not shape or shape[-1] != stream.channels:
        raise BrokenStreamError(node, value)
    stream.written.append((node, index, len(shape) - 1))


def _note_gain(stream: Stream, node: ir.Node, index: int, shift: tuple[ir.Node, int] | None, output: ir.Value) -> None:
    """A factor per channel is no obstacle where only layers read what it makes: they take it in first."""
    for owner, position in [(node, index), *([shift] if shift is not None else [])]:
        constant = owner.inputs[position]
        if not graphs.is_constant(constant) or array_of(constant).size not in (1, stream.channels):
            raise BrokenStreamError(owner, output)
    readers = []
    waiting = [output]
    for value in waiting:
        if value.is_graph_output():
            raise BrokenStreamError(None, value)
        for reader, position in graphs.consumers(value):
            item = layer_nodes.weighted(reader)
            if item is not None and item.activation_index == position and _is_matrix(item):
                readers.append(item)
            elif position == 0 and _is_along_rows(reader, reader.outputs[0]):
                waiting.append(reader.outputs[0])
            elif not graphs.is_op(reader, "Shape"):
                raise BrokenStreamError(reader, value)
    stream.gains.append(Gain(node, index, shift, tuple(readers), tuple({node.outputs[0], *waiting})))


def _is_matrix(item: layer_nodes.WeightedNode) -> bool:
    """Whether the layer multiplies rows by its own constant matrix from the right."""
    if item.weight_index != 1 or item.weight is None or not graphs.is_constant(item.weight):
        return False
    if item.node.op_type not in ("MatMul", "Gemm") or bool(item.node.attributes.get_int("transA", 0)):
        return False
    return graphs.is_float(item.weight) and array_of(item.weight).ndim == 2


def _is_shared(value: ir.Value | None) -> bool:
    """Whether all channels of a row share the number: a scalar, or a last axis of size one."""
    if value is None or value.shape is None:
        return False
    return len(value.shape) == 0 or value.shape[-1] == 1


def _only_shift(value: ir.Value) -> ir.Node | None:
    """The Add with a constant that alone reads a value, as behind a norm that an exporter took apart."""
    readers = [node for node, _ in graphs.consumers(value) if not graphs.is_op(node, "Shape")]
    if len(readers) != 1 or not graphs.is_op(readers[0], "Add"):
        return None
    return readers[0] if any(graphs.is_constant(other) for other in readers[0].inputs) else None


def _patches(node: ir.Node, channels: int) -> ir.Node | None:
    """The convolution whose channels a Transpose puts last, as at the start of vision transformers."""
    if not graphs.is_op(node, "Transpose") or list(node.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return None
    value = node.inputs[0]
    while value is not None and len(value.uses()) == 1 and graphs.is_op(value.producer(), "Reshape", "Flatten"):
        producer = value.producer()
        value = None if producer is None else producer.inputs[0]
    convolution = None if value is None else value.producer()
    if value is None or convolution is None or not graphs.is_op(convolution, "Conv") or value.shape is None:
        return None
    readers = [reader for reader, _ in graphs.consumers(value) if not graphs.is_op(reader, "Shape")]
    constants = all(graphs.is_constant(item) for item in convolution.inputs[1:])
    return convolution if len(readers) == 1 and constants and value.shape[1] == channels else None


def _is_row_mean(value: ir.Value, stream: Stream) -> bool:
    node = value.producer()
    if not graphs.is_op(node, "ReduceMean") or node is None:
        return False
    stream.has_means |= _reduces_rows(node, value)
    return _reduces_rows(node, value)


def _is_square_mean(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node starts the mean (or sum) of a row's squares, which no rotation changes."""
    if graphs.is_op(node, "ReduceL2", "ReduceSumSquare"):
        return _reduces_rows(node, value)
    power = node.inputs[1] if len(node.inputs) > 1 else None
    squares = graphs.is_op(node, "Mul") and node.inputs[0] is power
    if graphs.is_op(node, "Pow") and graphs.is_constant(power):
        squares = bool(np.all(array_of(power) == 2))
    output = node.outputs[0]
    return squares and all(
        graphs.is_op(reader, "ReduceMean", "ReduceSum") and _reduces_rows(reader, output)
        for reader, _ in graphs.consumers(output)
    )


def _reduces_rows(node: ir.Node, value: ir.Value) -> bool:
    """Whether a reduction runs along the last axis alone and keeps it."""
    axes = _axes(node)
    return axes is not None and axes in ([-1], [_last(value)]) and bool(node.attributes.get_int("keepdims", True))


def _is_along_rows(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node picks, moves or averages whole rows, whatever their channels."""
    source = node.inputs[0] if node.inputs else None
    if source is None or source.shape is None:
        return False
    if graphs.is_op(node, "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"):
        return width_of(source) is not None and width_of(source) == width_of(value)
    if graphs.is_op(node, "Transpose"):
        return list(node.attributes.get_ints("perm", []))[-1:] == [_last(source)]
    if graphs.is_op(node, "Gather"):
        return node.attributes.get_int("axis", 0) not in (-1, _last(source))
    if graphs.is_op(node, "Slice", "ReduceMean"):
        axes = _axes(node)
        return axes is not None and not {-1, _last(source)} & set(axes)
    return False


def _axes(node: ir.Node) -> list[int] | None:
    index = 3 if node.op_type == "Slice" else 1
    given = node.inputs[index] if len(node.inputs) > index else None
    if given is not None:
        return [int(axis) for axis in array_of(given).reshape(-1)] if graphs.is_constant(given) else None
    found = node.attributes.get_ints("axes", None)
    return None if found is None else list(found)


def _axis(node: ir.Node, value: ir.Value) -> int:
    axis = node.attributes.get_int("axis", 0)
    return axis + len(value.shape or ()) if axis < 0 else axis


def _last(value: ir.Value) -> int:
    return len(value.shape or ()) - 1
