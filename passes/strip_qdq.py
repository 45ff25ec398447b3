"""Take QuantizeLinear and DequantizeLinear out of a model, and keep what they knew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import block_scales, dynamic_fp4, layer_nodes
from onnxq import graph as graphs
from onnxq.arithmetic import dequantize
from onnxq.errors import OnnxqError
from onnxq.folding import array_of, new_initializer
from onnxq.passes.lower_integer_products import RaiseIntegerProducts
from onnxq.passes.lower_lstm import RaiseLstm
from onnxq.passes.quantize_tables import RaiseTables
from onnxq.passes.raise_packed_blocks import RaisePackedBlocks
from onnxq.passes.raise_qlinear import RaiseQLinear

Array = np.ndarray[Any, Any]

# Their outputs are never negative, so that unsigned codes cut nothing off.
RECTIFIED = ("Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Sqrt", "Abs", "Softplus")
MOVES = (
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Pad", "Slice", "Identity", "Resize",
    "Gather", "Split",
)  # fmt: skip
RELU6 = 6.0


@dataclass(frozen=True)
class StoredWeight:
    """What a weight was quantized to.

    Attributes:
        storage: Data type of its codes.
        scale: Its scales.
        zero_point: Its zero points, of the same shape or one number.
        axis: The axis of scales or blocks.
        block_size: Elements that share a scale along it, 0 without blocks.
        tensor: The float weight, to see later whether it is still the same.
    """

    storage: ir.DataType
    scale: Array
    zero_point: Array
    axis: int
    block_size: int
    tensor: ir.TensorProtocol | None

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are 0."""
        return not self.zero_point.any()


class StripQDQ(InPlacePass):
    """Make a float model of a Q/DQ model by any tool.

    Before::

        x ─► Clip ─► QuantizeLinear ─► DequantizeLinear ─► Conv ◄─ DequantizeLinear ◄─ codes

    After::

        x ─► Conv ◄─ float weight

    A weight that is float behind QuantizeLinear is the original again; stored codes become the numbers they mean,
    biases too, tables of tokens, and weights of integer products with the scales behind them. The Clip of an odd width
    goes with its pair if onnxq wrote it. Unsigned codes cut off what is below zero, and some tools leave out the Relu
    or Clip that did so in the float model: it comes back.

    Attributes:
        ranges: The lowest and highest number that the codes of an activation meant, by the name of the value.
        weights: What each weight was stored as, by the name of the float weight.
        is_dynamic: Whether the ranges of some activations were found while the model ran.
        has_tables: Whether tables that tokens are looked up in were stored as codes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ranges: dict[str, tuple[float, float]] = {}
        self.weights: dict[str, StoredWeight] = {}
        self.is_dynamic = self.has_tables = False

    def call(self, model: ir.Model) -> PassResult:
        """Strip every pair.

        Raises:
            OnnxqError: the model holds integer kernels instead of Q/DQ, or scales that are not constant.
        """
        graph = model.graph
        for node in graph:
            if node.op_type in graphs.QDQ and node.domain == graphs.ONNXRUNTIME_DOMAIN:
                node.domain = ""  # the same op, for 16 and 4 bits before ONNX had them
        raised = [one()(model).modified for one in (RaiseLstm, RaiseIntegerProducts, RaisePackedBlocks, RaiseQLinear)]
        self.has_tables = RaiseTables()(model).modified
        modified = any(raised) or self.has_tables
        for node in graph:
            if _is_dynamic_pair(node):
                continue
            if node.op_type in layer_nodes.QUANTIZED_OPS or node.op_type.startswith("QLinear"):
                raise OnnxqError(
                    f"expected Q/DQ pairs around float ops, found {node.op_type} {node.name!r}",
                    hint="write the model in Q/DQ form (onnxruntime: quant_format=QuantFormat.QDQ)",
                )
        for node in list(graph):
            if graphs.is_quantize(node) and node.graph is not None:
                self._strip_quantize(graph, node)
                modified = True
            elif graphs.is_dequantize(node) and node.graph is not None and graphs.is_constant(node.inputs[0]):
                self._strip_codes(graph, node)
                modified = True
            elif _is_dynamic_pair(node):
                for reader, _ in graphs.consumers(node.outputs[0]):
                    assert node.inputs[0] is not None
                    _bypass(graph, reader, node.inputs[0])
                modified = self.is_dynamic = True
            elif dynamic_fp4.makes_fp4(node):
                self._strip_blocks(graph, node)
                modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)

    def _strip_quantize(self, graph: ir.Graph, node: ir.Node) -> None:
        from onnxq.passes.insert_qdq import CLIP

        source = node.inputs[0]
        scale, zero_point = _parameters(node)
        if source is None:
            return
        producer = source.producer()
        if producer is not None and CLIP in producer.metadata_props:
            source = producer.inputs[0] or source
        storage = _storage(node)
        covered = None
        if graphs.is_constant(source):
            self.weights[source.name or ""] = _stored(node, storage, scale, zero_point, source)
        elif np.all(scale == scale.reshape(-1)[0]):  # one, or the same for each channel
            low, high = _range(storage, float(scale.reshape(-1)[0]), float(zero_point.reshape(-1)[0]))
            if low == 0 and not _is_rectified(source.producer()):
                source = _rectify(graph, source, node, high)
            covered = low, high
        moved = _let_read(graph, node.outputs[0], source, float(scale.reshape(-1)[0]), float(zero_point.reshape(-1)[0]))
        if covered is not None:  # not before: what was behind the model's output has its name now
            self.ranges |= {value.name or "": covered for value in (source, *moved)}

    def _strip_blocks(self, graph: ir.Graph, node: ir.Node) -> None:
        """An activation in FP4 blocks, whose scales are made with its codes."""
        source, factor = node.inputs[0], node.inputs[1]
        if source is None or not graphs.is_constant(factor):
            return
        for reader, _ in graphs.consumers(node.outputs[0]):
            _bypass(graph, reader, source)
        limit = float(array_of(factor)) * block_scales.LARGEST * dynamic_fp4.LARGEST_CODE
        self.ranges[source.name or ""] = (-limit, limit)

    def _strip_codes(self, graph: ir.Graph, node: ir.Node) -> None:
        codes = node.inputs[0]
        scale, zero_point = _parameters(node)
        storage = _storage(node)
        stored = _stored(node, storage, scale, zero_point, None)
        dtype = node.outputs[0].dtype or ir.DataType.FLOAT
        if storage == ir.DataType.INT32:  # a bias
            axis = stored.axis if array_of(codes).ndim > 1 and scale.ndim else -1
            values = np.moveaxis(np.moveaxis(array_of(codes).astype(np.float64), axis, -1) * scale, -1, axis)
        else:
            values = dequantize(
                array_of(codes),
                scale,
                zero_point.astype(storage.numpy()),
                axis=stored.axis if scale.ndim else None,
                block_size=stored.block_size or None,
            )
        value = new_initializer(graph, _plain_name(codes), values.astype(dtype.numpy()), dtype)
        if storage != ir.DataType.INT32:
            self.weights[value.name or ""] = replace(stored, tensor=value.const_value)
        _bypass(graph, node, value)


def _is_dynamic_pair(node: ir.Node) -> bool:
    """Whether a node makes codes of the range that it finds, for DequantizeLinear alone."""
    if not graphs.is_op(node, "DynamicQuantizeLinear"):
        return False
    return all(graphs.is_dequantize(reader) for reader, _ in graphs.consumers(node.outputs[0]))


def _is_rectified(node: ir.Node | None) -> bool:
    """Whether what the node gives is never negative, or is the input of the model."""
    if node is None or graphs.is_op(node, *RECTIFIED):
        return True
    return graphs.is_op(node, *MOVES) and node.inputs[0] is not None and _is_rectified(node.inputs[0].producer())


def _rectify(graph: ir.Graph, value: ir.Value, quantize: ir.Node, high: float) -> ir.Value:
    """A Relu in front of the quantizer; a Clip at 6 if its range ends there."""
    tape = ir.tape.Tape()
    if abs(high - RELU6) < RELU6 / 512:
        dtype = value.dtype or ir.DataType.FLOAT
        bounds = [
            new_initializer(graph, f"{value.name}_{name}", np.asarray(bound, dtype.numpy()), dtype)
            for name, bound in (("low", 0.0), ("high", RELU6))
        ]
        rectified = tape.op("Clip", [value, *bounds])
    else:
        rectified = tape.op("Relu", [value])
    rectified.name, rectified.type, rectified.shape = f"{value.name}_rectified", value.type, value.shape
    tape.nodes[0].name = f"{value.name}_rectify"
    graph.insert_before(quantize, tape.nodes)
    return rectified


def _let_read(graph: ir.Graph, codes: ir.Value, value: ir.Value, scale: float, zero_point: float) -> list[ir.Value]:
    """Let whoever reads codes read the number that they mean, also behind ops that move codes: those are returned."""
    found: list[ir.Value] = []
    for reader, index in graphs.consumers(codes):
        if graphs.is_dequantize(reader) and index == 0:
            _bypass(graph, reader, _scaled(graph, reader, value, scale))
            continue
        padding = reader.inputs[2] if graphs.is_op(reader, "Pad") and len(reader.inputs) > 2 else None
        if not graphs.is_op(reader, *MOVES) or (padding is not None and not graphs.is_constant(padding)):
            raise OnnxqError(
                f"expected DequantizeLinear or data movement behind {codes.name!r}, found {reader.op_type}",
                hint="only Q/DQ models can be stripped",
            )
        dtype = value.dtype or ir.DataType.FLOAT
        for moved in reader.outputs if graphs.is_op(reader, "Split") else reader.outputs[:1]:
            moved.type = ir.TensorType(dtype)  # before what moves it on takes its type
            found += [moved, *_let_read(graph, moved, moved, scale, zero_point)]
        reader.replace_input_with(index, value)
        if padding is not None:
            number = (array_of(padding).astype(np.float64) - zero_point) * scale
            name = f"{reader.outputs[0].name}_padding"
            float_padding = new_initializer(graph, name, number.astype(dtype.numpy()), dtype)
            reader.replace_input_with(2, float_padding)
    return found


def _scaled(graph: ir.Graph, dequantize: ir.Node, value: ir.Value, scale: float) -> ir.Value:
    """The value, or a multiple of it where DequantizeLinear gives the codes another step than they were made with."""
    steps, output = _parameters(dequantize)[0], dequantize.outputs[0]
    if steps.size != 1 or float(steps.reshape(())) == scale:
        return value
    dtype = value.dtype or ir.DataType.FLOAT
    ratio = np.asarray(float(steps.reshape(())) / scale, dtype.numpy())
    tape = ir.tape.Tape()
    product = tape.op("Mul", [value, new_initializer(graph, f"{output.name}_ratio", ratio, dtype)])
    product.name, product.type, product.shape = f"{output.name}_scaled", ir.TensorType(dtype), value.shape
    tape.nodes[0].name = dequantize.name
    graph.insert_before(dequantize, tape.nodes)
    return product


def _bypass(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let whoever reads the node's output read ``value``; a graph output keeps its name."""
    output = node.outputs[0]
    name = output.name if output.is_graph_output() else None
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if name is not None:
        value.name = name


def _plain_name(codes: ir.Value | None) -> str:
    name = "" if codes is None else codes.name or ""
    return name.removesuffix("_quantized") or "weight"


def _parameters(node: ir.Node) -> tuple[Array, Array]:
    scale, zero_point = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if not graphs.is_constant(scale) or (zero_point is not None and not graphs.is_constant(zero_point)):
        raise OnnxqError(
            f"expected constant scales, found computed ones at {node.name!r}",
            hint="dynamically quantized models have no ranges to keep; give the float model that it was made from",
        )
    steps = array_of(scale).astype(np.float32)
    return steps, np.zeros(steps.shape) if zero_point is None else array_of(zero_point).astype(np.float64)


def _storage(node: ir.Node) -> ir.DataType:
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    codes = node.outputs[0] if graphs.is_quantize(node) else node.inputs[0]
    for value in (zero_point, codes):
        if value is not None and value.dtype is not None:
            return value.dtype
    return ir.DataType.UINT8


def _stored(
    node: ir.Node, storage: ir.DataType, scale: Array, zero_point: Array, weight: ir.Value | None
) -> StoredWeight:
    axis, block_size = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    tensor = None if weight is None else weight.const_value
    return StoredWeight(storage, scale, zero_point, axis, block_size, tensor)


def _range(storage: ir.DataType, scale: float, zero_point: float) -> tuple[float, float]:
    if storage in (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2):
        largest = 448.0 if storage == ir.DataType.FLOAT8E4M3FN else 57344.0
        return -largest * scale, largest * scale
    if storage.bitwidth >= 8 and np.dtype(storage.numpy()).kind not in "iu":
        raise OnnxqError(
            f"expected codes that are integers or FP8, found a zero point of type {storage.name}",
            hint="check the model with `python -m onnx.checker`",
        )
    limits = np.iinfo(storage.numpy()) if storage.bitwidth >= 8 else None
    bits = storage.bitwidth
    low, high = (limits.min, limits.max) if limits is not None else (-(1 << bits - 1), (1 << bits - 1) - 1)
    if limits is None and storage.name.startswith("U"):
        low, high = 0, (1 << bits) - 1
    if low < 0 and zero_point == 0:
        low = -high  # symmetric: the code that has no counterpart adds nothing
    return (low - zero_point) * scale, (high - zero_point) * scale
