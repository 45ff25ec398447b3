"""Write products whose range is found while the model runs as products of integers, and read such ones as Q/DQ."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.arithmetic import quantize, scale_and_zero_point
from onnxq.folding import array_of, new_initializer
from onnxq.formats import FORMATS
from onnxq.rewriting import InPlaceOf, operand

CHANNEL_AXES = {"MatMulInteger": -1, "ConvInteger": 0}  # of the weight, along which its scales run
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
FLOAT_OPS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}


class LowerIntegerProducts(InPlacePass):
    """Write a product between DequantizeLinear with a dynamic range as one of integers, with the scales behind it.

    Before::

        x ─► DynamicQuantizeLinear ═► DequantizeLinear ─► MatMul ─► y
                 codes of W ────────► DequantizeLinear ─────┘

    After::

        x ─► DynamicQuantizeLinear ═► MatMulInteger ◄─ codes of W
                       │                    └─► Cast ─► Mul ─► y
                       └─ scale ─► Mul (scale of W) ─────┘

    Both run on integers in onnxruntime; only of the second its kernel adds the bias too, which of an encoder with 384
    channels is a twentieth of the time.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every MatMul and Gemm with a matrix of bytes."""
        modified = False
        names = graphs.Names(model.graph)
        for item in list(layer_nodes.weighted_nodes(model.graph)):
            if _has_integers(item.node):
                _lower(model.graph, item.node, names)
                modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


class RaiseIntegerProducts(InPlacePass):
    """Make a float op between DequantizeLinear of an integer one whose scales are multiplied behind it.

    Before::

        x ─► DynamicQuantizeLinear ═► MatMulInteger ◄─ codes of W
                       │                    └─► Cast ─► Mul ─► y
                       └─ scale ─► Mul (scale of W) ─────┘

    After::

        x ─► DynamicQuantizeLinear ═► DequantizeLinear ─► MatMul ─► y
                 codes of W ────────► DequantizeLinear ─────┘
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every one of which both scales are found."""
        modified = False
        names = graphs.Names(model.graph)
        for node in list(model.graph):
            if graphs.is_op(node, "DynamicQuantizeLinear") and graphs.is_constant(node.inputs[0]):
                _fold(model.graph, node, names)
        for node in list(model.graph):
            if graphs.is_op(node, *FLOAT_OPS) and _raise(model.graph, node, names):
                modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def _has_integers(node: ir.Node) -> bool:
    if not graphs.is_op(node, "MatMul", "Gemm") or operand(node, 2) is not None:
        return False
    if node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return False
    activation, weight = (None if value is None else value.producer() for value in node.inputs[:2])
    if not (graphs.is_dequantize(activation) and graphs.is_dequantize(weight)) or activation is None or weight is None:
        return False
    codes, scale = weight.inputs[:2]
    made = None if activation.inputs[0] is None else activation.inputs[0].producer()
    if not graphs.is_op(made, "DynamicQuantizeLinear") or not graphs.is_constant(codes):
        return False
    assert codes is not None and scale is not None
    columns = 0 if node.attributes.get_int("transB", 0) else 1
    along_columns = graphs.rank(scale) == 0 or weight.attributes.get_int("axis", 1) == columns
    return codes.dtype in EIGHT_BITS and graphs.rank(codes) == 2 and along_columns


def _lower(graph: ir.Graph, node: ir.Node, names: graphs.Names) -> None:
    activation, weight = (value.producer() for value in node.inputs[:2] if value is not None)
    assert activation is not None and weight is not None
    codes, scale, zero_point = weight.inputs[0], weight.inputs[1], operand(weight, 2)
    if node.attributes.get_int("transB", 0) and codes is not None and codes.dtype is not None:
        codes = new_initializer(graph, f"{codes.name}_transposed", array_of(codes).T, codes.dtype, names)
    whole = InPlaceOf(graph, node, names)
    steps, zero = activation.inputs[1], operand(activation, 2)
    sums = whole.main("MatMulInteger", [activation.inputs[0], codes, zero, zero_point])
    sums.type = ir.TensorType(ir.DataType.INT32)
    factors = whole.op("scales", "Mul", [steps, scale])
    factors.type = ir.TensorType(ir.DataType.FLOAT)
    whole.take_over(whole.op("scaled", "Mul", [whole.as_type("floats", sums, ir.DataType.FLOAT), factors]))


def _fold(graph: ir.Graph, node: ir.Node, names: graphs.Names) -> None:
    """Work out the codes of a constant, as the op is defined: weights that lay in nodes have them made at run time."""
    values = array_of(node.inputs[0]).astype(np.float32)
    low, high = values.min(initial=0), values.max(initial=0)
    scale, zero_point = scale_and_zero_point(low, high, FORMATS["uint8"], symmetric=False)
    codes = quantize(values, scale, zero_point, FORMATS["uint8"])
    for output, array in zip(node.outputs, (codes, scale, zero_point), strict=True):
        made = new_initializer(graph, output.name or "", array, ir.DataType.from_numpy(array.dtype), names)
        output.replace_all_uses_with(made)
    graph.remove(node, safe=True)


def _raise(graph: ir.Graph, node: ir.Node, names: graphs.Names) -> bool:
    found = _scaled_behind(node)
    weight, zero_point = node.inputs[1], operand(node, 3)
    if found is None or weight is None or not graphs.is_constant(weight):
        return False
    if zero_point is not None and not graphs.is_constant(zero_point):
        return False
    made, product, steps = found

    def parameter(ending: str, value: ir.Value) -> ir.Value:
        array = array_of(value)
        array = array.reshape(-1 if array.size > 1 else ())
        return new_initializer(graph, f"{weight.name}_{ending}", array, ir.DataType.from_numpy(array.dtype), names)

    parameters = [parameter("steps", steps)]
    if zero_point is not None:
        parameters.append(parameter("zeros", zero_point))
    whole = InPlaceOf(graph, product, names)
    axis = CHANNEL_AXES[node.op_type] % array_of(weight).ndim
    activation = whole.op("activation", "DequantizeLinear", made.outputs)
    numbers = whole.op("weight", "DequantizeLinear", [weight, *parameters], {"axis": axis})
    for value, source in ((activation, made.inputs[0]), (numbers, weight)):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None if source is None else source.shape
    whole.take_over(whole.main(FLOAT_OPS[node.op_type], [activation, numbers], node.attributes, named_after=node))
    return True


def _scaled_behind(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Value] | None:
    """What made the codes that an integer product reads, the Mul that scales its result, and the weight's scale."""
    made = None if node.inputs[0] is None else node.inputs[0].producer()
    cast = graphs.only_reader(node.outputs[0])
    product = graphs.only_reader(cast.outputs[0]) if cast is not None and graphs.is_op(cast, "Cast") else None
    if made is None or cast is None or product is None or not graphs.is_op(product, "Mul"):
        return None
    if not graphs.is_op(made, "DynamicQuantizeLinear") or operand(node, 2) is not made.outputs[2]:
        return None
    factor = next((value for value in product.inputs if value is not cast.outputs[0]), None)
    scales = None if factor is None else factor.producer()
    if scales is None or not graphs.is_op(scales, "Mul") or made.outputs[1] not in scales.inputs:
        return None
    steps = next((value for value in scales.inputs if value is not made.outputs[1]), None)
    return (made, product, steps) if steps is not None and graphs.is_constant(steps) else None
