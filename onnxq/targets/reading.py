"""A quantized graph as the lints read it: its constants, its Q/DQ nodes, and what its matrix products multiply.

The graph may come from any tool: scales may be initializers, Constant nodes or constants behind a Cast; zero points
may be missing; weights may be codes, or floats behind QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxq import graph as graphs
from onnxq import layer_nodes, shapes
from onnxq import model as models
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]

# Through these the builder moves codes: what reads their output still reads codes (tried one by one on TensorRT-RTX).
MOVES = (
    "MaxPool", "Identity", "Pad", "Transpose", "Slice", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "DepthToSpace",
    "SpaceToDepth", "Expand", "Gather", "Dropout", "Split", "Tile", "Neg",
)  # fmt: skip


@dataclass(frozen=True)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear.

    Attributes:
        node: The node.
        format: Data type of the codes, ``None`` where it cannot be told.
        scale: The scale's value, ``None`` where it is not known when the engine is built (or not worth computing).
        zero_point: Likewise; a missing zero point is 0.
        follows: The QuantizeLinear whose codes this DequantizeLinear reads with the same scale.
    """

    node: ir.Node
    format: ir.DataType | None
    scale: Array | None
    zero_point: Array | None
    follows: ir.Node | None = None

    @property
    def is_quantize(self) -> bool:
        """Whether this is the QuantizeLinear of a pair."""
        return graphs.is_quantize(self.node)


@dataclass(frozen=True)
class Operand:
    """One factor of a matrix product.

    Attributes:
        value: What the product reads.
        quantizer: The DequantizeLinear it comes from, if only through ops that move codes.
        path: Those ops, from the DequantizeLinear to the product.
        is_weight: Whether it is known when the engine is built.
    """

    value: ir.Value
    quantizer: Quantizer | None
    path: tuple[ir.Node, ...]
    is_weight: bool


@dataclass(frozen=True)
class Product:
    """A Conv, ConvTranspose, Gemm or MatMul, with its two factors in the order of its inputs."""

    node: ir.Node
    operands: tuple[Operand, Operand]

    @property
    def is_quantized(self) -> bool:
        """Whether both factors come from DequantizeLinear."""
        return all(operand.quantizer is not None for operand in self.operands)

    @property
    def weight(self) -> Operand | None:
        """The constant factor: the second if there is a choice."""
        return next((operand for operand in reversed(self.operands) if operand.is_weight), None)


class Reading:
    """Answers about one model, subgraphs included. The model itself is not changed."""

    def __init__(self, model: ir.Model, sm: int | None = None) -> None:
        self.model = _typed(model)
        self.sm = sm
        self.nodes = [node for graph in self.model.graphs() for node in graph]
        self._known = self._constants()
        self._folded: dict[ir.Value, Array | None] = {}

    def is_known(self, value: ir.Value | None) -> bool:
        """Whether the value depends on constants alone."""
        return value is not None and value in self._known

    def fold(self, value: ir.Value | None) -> Array | None:
        """The value of a constant, for the few ops that exporters put on scales."""
        if value is None or value not in self._known:
            return None
        if value not in self._folded:
            self._folded[value] = self._compute(value)
        return self._folded[value]

    @cached_property
    def quantizers(self) -> dict[ir.Node, Quantizer]:
        """Every QuantizeLinear and DequantizeLinear, in graph order."""
        found = [node for node in self.nodes if graphs.is_quantize(node) or graphs.is_dequantize(node)]
        return {node: self._quantizer(node) for node in found}

    @property
    def leaders(self) -> Iterator[Quantizer]:
        """One quantizer of every pair, so that one mistake is one finding."""
        return (quantizer for quantizer in self.quantizers.values() if quantizer.follows is None)

    @cached_property
    def products(self) -> list[Product]:
        """Every matrix product."""
        found = []
        for node in self.nodes:
            if graphs.is_op(node, *layer_nodes.WEIGHTED_OPS) and len(node.inputs) > 1:
                first, second = node.inputs[:2]
                if first is not None and second is not None:
                    found.append(Product(node, (self.operand(first), self.operand(second))))
        return found

    def operand(self, value: ir.Value) -> Operand:
        """Where a value comes from."""
        path: list[ir.Node] = []
        node = value.producer()
        while node is not None and self.moves_codes(node):
            path.append(node)
            source = node.inputs[0]
            node = None if source is None else source.producer()
        quantizer = self.quantizers.get(node) if graphs.is_dequantize(node) and node is not None else None
        return Operand(value, quantizer, tuple(reversed(path)), self.is_known(value))

    def moves_codes(self, node: ir.Node) -> bool:
        """Whether the node keeps codes codes: data movement, a product with one number, a Cast to the same type."""
        if graphs.is_op(node, *MOVES):
            return True
        if graphs.is_op(node, "Cast"):
            return node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype
        if graphs.is_op(node, "Mul", "Div"):
            factor = node.inputs[1]
            return self.is_known(factor) and factor is not None and factor.shape is not None and _is_one(factor.shape)
        return False

    def _constants(self) -> set[ir.Value]:
        known: set[ir.Value] = set()
        for graph in self.model.graphs():
            known.update(graph.initializers.values())  # also those listed as inputs: parsers take them as constants
            for node in graph:
                inputs = [value for value in node.inputs if value is not None]
                if graphs.is_op(node, "Constant") or (inputs and all(value in known for value in inputs)):
                    known.update(node.outputs)
        return known

    def _compute(self, value: ir.Value) -> Array | None:
        if value.const_value is not None:
            return value.const_value.numpy()
        node = value.producer()
        if node is None:
            return None
        if graphs.is_op(node, "Constant"):
            return _constant_attribute(node)
        function = _FOLDS.get(node.op_type) if node.domain in graphs.ONNX_DOMAINS else None
        inputs = [self.fold(source) for source in node.inputs if source is not None]
        if function is None or any(array is None for array in inputs):
            return None
        return np.asarray(function(node, *inputs))

    def _quantizer(self, node: ir.Node) -> Quantizer:
        if len(node.inputs) < 2:
            raise OnnxqError(
                f"expected a value and a scale at {node.op_type} {node.name!r}, found {len(node.inputs)} inputs",
                hint="check the model with `python -m onnx.checker`",
            )
        scale = self.fold(node.inputs[1])
        zero_point = self.fold(node.inputs[2]) if len(node.inputs) > 2 else None
        leader = None
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is not None and graphs.is_dequantize(node) and graphs.is_quantize(source):
            other = self.fold(source.inputs[1])
            same = scale is not None and other is not None and _equal(scale, other)
            if source.inputs[1] is node.inputs[1] or same:
                leader = source
        return Quantizer(node, _codes_type(node), scale, zero_point, leader)


def name_of(node: ir.Node) -> str:
    """The node's name, or the one that TensorRT's parser gives to a nameless node."""
    return node.name or f"node_of_{node.outputs[0].name}"


def spelled(dtype: ir.DataType | None) -> str:
    """A data type as users write it."""
    return "an unknown type" if dtype is None else dtype.name.lower()


def output_axis(product: Product, weight: Operand) -> int | None:
    """The axis of output channels of a weight, as the product reads it."""
    if product.node.op_type == "Conv":
        return 0
    if product.node.op_type == "Gemm":
        return 0 if product.node.attributes.get_int("transB", 0) else 1
    rank = graphs.rank(weight.value)
    if rank is None or rank < 2:
        return None
    return rank - 2 if weight is product.operands[0] else rank - 1


def scale_axis(weight: Operand) -> int | None:
    """The axis of the weight, as the product reads it, that its scales run along; ``None``: one scale, or unclear."""
    quantizer = weight.quantizer
    if quantizer is None:
        return None
    shape = scale_shape(quantizer)
    codes = quantizer.node.inputs[0]
    rank = None if codes is None else graphs.rank(codes)
    if shape is None or len(shape) != 1 or shape[0] == 1 or not rank:
        return None
    axis = quantizer.node.attributes.get_int("axis", 1) % rank
    for node in weight.path:
        if graphs.is_op(node, "Transpose"):
            order = node.attributes.get("perm")
            permutation = list(order.as_ints()) if order is not None else list(range(rank))[::-1]
            axis = permutation.index(axis)
        elif not graphs.is_op(node, "Identity", "Mul", "Div", "Cast", "Neg"):
            return None
    return axis


def scale_shape(quantizer: Quantizer) -> tuple[int, ...] | None:
    """The shape of a scale, if it is known."""
    if quantizer.scale is not None:
        return tuple(quantizer.scale.shape)
    scale = quantizer.node.inputs[1]
    if scale is None or scale.shape is None:
        return None
    sizes = [size for size in scale.shape if isinstance(size, int)]
    return tuple(sizes) if len(sizes) == len(scale.shape) else None


def _typed(model: ir.Model) -> ir.Model:
    """A copy in which functions are inlined and types are inferred, if they are not there."""
    if not model.functions and all(
        value.dtype is not None and value.shape is not None
        for graph in model.graphs()
        for node in graph
        for value in node.outputs
        if value.name
    ):
        return model
    try:
        with models.quiet():
            copy = model.clone()
            if copy.functions:
                common_passes.InlinePass()(copy)
            shapes.infer(copy)
    except MemoryError:
        raise
    except Exception as error:  # whatever the libraries stumble over: the file is not ours
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise OnnxqError(
            f"expected a valid graph, found one that cannot be copied ({reason})",
            hint="check the model with `python -m onnx.checker` or in onnxruntime",
        ) from error
    return copy


def _codes_type(node: ir.Node) -> ir.DataType | None:
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    codes = node.outputs[0] if graphs.is_quantize(node) else node.inputs[0]
    if codes is not None and codes.dtype is not None:
        return codes.dtype
    if graphs.is_quantize(node):
        return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    source = None if codes is None else codes.producer()
    return _codes_type(source) if source is not None and graphs.is_quantize(source) else None


def _equal(first: Array, second: Array) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and bool(np.all(first == second))


def _is_one(shape: ir.Shape) -> bool:
    return all(size == 1 for size in shape)


def _constant_attribute(node: ir.Node) -> Array | None:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR:
            array: Array = attribute.value.numpy()
            return array
        if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
            return np.asarray(attribute.value, np.float32)
        if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
            return np.asarray(attribute.value, np.int64)
    return None


def _axes(node: ir.Node, arguments: Sequence[Array]) -> tuple[int, ...] | None:
    if arguments:
        return tuple(int(axis) for axis in np.atleast_1d(arguments[0]))
    found = node.attributes.get("axes")
    return None if found is None else tuple(found.as_ints())


# What exporters leave on scales. The first argument is the node, the others its inputs.
_FOLDS: dict[str, Callable[..., Array]] = {
    "Identity": lambda node, x: x,
    "Cast": lambda node, x: x.astype(ir.DataType(node.attributes.get_int("to", 1)).numpy()),
    "Reshape": lambda node, x, shape: x.reshape(shape.tolist()),
    "Flatten": lambda node, x: x.reshape(1, -1),
    "Squeeze": lambda node, x, *axes: np.squeeze(x, _axes(node, axes)),
    "Unsqueeze": lambda node, x, *axes: np.expand_dims(x, _axes(node, axes) or ()),
    "Transpose": lambda node, x: np.transpose(x),
    "Gather": lambda node, x, index: np.take(x, index, node.attributes.get_int("axis", 0)),
    "Concat": lambda node, *parts: np.concatenate(parts, node.attributes.get_int("axis", 0)),
    "Mul": lambda node, x, y: x * y,
    "Div": lambda node, x, y: x / y,
    "Max": lambda node, *parts: np.maximum.reduce(np.broadcast_arrays(*parts)),
    "Abs": lambda node, x: np.abs(x),
}
