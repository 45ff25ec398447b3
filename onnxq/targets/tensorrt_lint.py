"""What TensorRT refuses, or silently compiles as something else.

Rules E1–E12 are errors and live here; P1–P11, which cost speed or exactness, live in ``tensorrt_advice``. Every rule
was tried on TensorRT-RTX without a GPU; a message says what was expected and what was found, at which node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import onnx.defs
import onnx_ir as ir

from onnxq import dynamic_fp4, layer_nodes
from onnxq import graph as graphs
from onnxq.targets.findings import Finding
from onnxq.targets.reading import Operand, Reading, name_of, output_axis, scale_axis, scale_shape, spelled

Broken = Iterator[tuple[ir.Node, str]]
Rule = Callable[[Reading], Broken]

FP8, FP4, INT4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1, ir.DataType.INT4
LEGAL_FORMATS = (ir.DataType.INT8, INT4, FP8, FP4)
UNSIGNED_FORMATS = (ir.DataType.UINT8, ir.DataType.UINT4)

# The first compute capability with the format. 100 is the data-centre Blackwell that TensorRT-RTX does not build for.
FIRST_SM = {FP8: 89, FP4: 100, INT4: 80}
FIRST_SM_INT8_CONV = 80

SMALLEST_FLOAT16 = float(np.finfo(np.float16).tiny)


def lint(model: ir.Model, sm: int | None = None) -> list[Finding]:
    """Every rule of TensorRT that the model breaks, errors first.

    Args:
        model: Any ONNX model of opset 10 or later, by whichever tool; it is not changed.
        sm: Compute capability to compile for, such as 89. ``None``: only what holds for all of them.
    """
    from onnxq.targets.tensorrt_advice import ADVICE

    reading = Reading(model, sm)
    findings: dict[Finding, None] = {}  # ordered, and without repetition
    for severity, rules in (("error", ERRORS), ("warning", ADVICE)):
        for rule, check in rules.items():
            for node, message in check(reading):
                findings[Finding(rule, severity, name_of(node), message)] = None
    return list(findings)


def scale_known(reading: Reading) -> Broken:
    """E1: scales and zero points fold to constants; the compiler crashes on others, but of TRT_FP4DynamicQuantize."""
    for quantizer in reading.quantizers.values():
        if dynamic_fp4.reads_fp4(quantizer.node):
            continue
        for what, value in zip(("scale", "zero point"), quantizer.node.inputs[1:], strict=False):
            if value is not None and not reading.is_known(value):
                producer = value.producer()
                found = "a graph input" if producer is None else f"the output of {producer.op_type} {name_of(producer)}"
                yield (
                    quantizer.node,
                    f"expected a {what} that is known when the engine is built, found {value.name}, {found}",
                )


def scale_usable(reading: Reading) -> Broken:
    """E2: scales are finite and above zero, and do not underflow float16."""
    for quantizer in reading.leaders:
        if quantizer.scale is None or quantizer.scale.size == 0:
            continue
        scale = quantizer.scale.astype(np.float32)
        smallest = float(scale.min())
        if not np.isfinite(scale).all():
            yield quantizer.node, f"expected finite scales, found {_first(scale[~np.isfinite(scale)])}"
        elif smallest <= 0:
            yield quantizer.node, f"expected scales above zero, found {smallest:g}"
        elif quantizer.scale.dtype == np.float16 and smallest < SMALLEST_FLOAT16:
            yield (
                quantizer.node,
                f"expected float16 scales of at least {SMALLEST_FLOAT16:.3g}, found {smallest:.3g}, which underflows",
            )


def symmetric(reading: Reading) -> Broken:
    """E3: codes are int8 (int4, FP8, FP4) with zero point 0, and say so; uint8 is read as if it were int8."""
    for quantizer in reading.leaders:
        node = quantizer.node
        if quantizer.format == ir.DataType.INT32:
            continue  # E4
        if quantizer.zero_point is not None and np.any(quantizer.zero_point.astype(np.float32) != 0):
            shift = _first(quantizer.zero_point[quantizer.zero_point.astype(np.float32) != 0])
            yield node, f"expected zero point 0, found {shift:g} in {spelled(quantizer.format)}"
        elif quantizer.format in UNSIGNED_FORMATS:
            silent = len(node.inputs) < 3 and not node.attributes.get_int("output_dtype", 0)
            found = "no zero point, which means uint8" if silent else f"{spelled(quantizer.format)} with zero point 0"
            yield node, f"expected int8 codes, found {found}: they are read as int8, so that large values go wrong"


def bias_float(reading: Reading) -> Broken:
    """E4: a bias is a float tensor, of the type of the activation beside it."""
    for quantizer in reading.quantizers.values():
        if quantizer.format == ir.DataType.INT32:
            yield quantizer.node, "expected a float bias, found one stored as int32 with DequantizeLinear"
    for product in reading.products:
        if product.node.op_type == "MatMul" or len(product.node.inputs) < 3:
            continue
        bias = product.node.inputs[2]
        if bias is None:
            continue
        source = reading.operand(bias).quantizer
        if source is not None and source.format != ir.DataType.INT32:
            yield (
                product.node,
                f"expected a float bias, found {bias.name}, made of {spelled(source.format)} codes",
            )
        activation = product.operands[0].value.dtype
        if product.is_quantized and None not in (bias.dtype, activation) and bias.dtype != activation:
            yield (
                product.node,
                f"expected a bias of the activation's type {spelled(activation)}, found {spelled(bias.dtype)}",
            )


def activation_scale_scalar(reading: Reading) -> Broken:
    """E5: an activation has one scale of rank 0; with shape [1] or one per channel the layer stays float, silently."""
    for quantizer in reading.leaders:
        if reading.is_known(quantizer.node.inputs[0]) or dynamic_fp4.reads_fp4(quantizer.node):
            continue  # a weight, or blocks
        shape = scale_shape(quantizer)
        if shape:
            what = "a tensor of one element" if shape == (1,) else "one scale per channel or block"
            yield (
                quantizer.node,
                f"expected an activation scale of shape [], found {list(shape)} ({what}): convolutions stay float",
            )


def weight_axis(reading: Reading) -> Broken:
    """E6: weight scales run along output channels: axis 0 of Conv, the last of MatMul, Gemm by its transB."""
    for product in reading.products:
        weight = product.weight
        if product.node.op_type == "ConvTranspose" or weight is None or not product.is_quantized:
            continue
        found = scale_axis(weight)
        expected = output_axis(product, weight)
        if None not in (found, expected) and found != expected:
            yield (
                product.node,
                f"expected weight scales along axis {expected} of {weight.value.name}, found axis {found}"
                f"{_default_axis(weight)}: the layer stays float",
            )


def one_format(reading: Reading) -> Broken:
    """E7: both factors of a product have the same format; INT8 with FP8 does not compile."""
    for product in reading.products:
        first, second = (operand.quantizer.format if operand.quantizer else None for operand in product.operands)
        if first in LEGAL_FORMATS and second in LEGAL_FORMATS and first != second:  # others are E3 and E9
            yield product.node, f"expected both inputs in one format, found {spelled(first)} and {spelled(second)}"


def scale_type(reading: Reading) -> Broken:
    """E8: a scale has the type of what QuantizeLinear reads, and DequantizeLinear gives that type back."""
    for quantizer in reading.quantizers.values():
        value, scale = quantizer.node.inputs[:2]
        kind = None if scale is None else scale.dtype
        if quantizer.format == ir.DataType.INT32 or kind is None or value is None:
            continue  # E4
        if quantizer.is_quantize:
            other, what = value.dtype, f"its input {value.name}"
        else:
            other, what = quantizer.node.outputs[0].dtype, "its output"
            source = value.producer()
            before = source.inputs[0] if source is not None and graphs.is_quantize(source) else None
            if before is not None and before.dtype is not None and before.dtype != kind:
                other, what = before.dtype, f"{before.name}, which its QuantizeLinear reads"
        if other is not None and other != kind:
            yield quantizer.node, f"expected a scale of type {spelled(other)} like {what}, found {spelled(kind)}"


def reads_attention(node: ir.Node) -> bool:
    """Whether TensorRT's parser reads a form of Attention: no cache, nor scores, as an output, and no soft cap."""
    return sum(bool(value.name) for value in node.outputs) == 1 and not node.attributes.get_float("softcap", 0.0)


def unreadable(node: ir.Node) -> str:
    """What TensorRT's parser expects in place of a node, and that this was found; an empty string if it reads it."""
    if node.op_type in layer_nodes.QUANTIZED_OPS or node.op_type.startswith("QLinear"):
        return f"expected QuantizeLinear and DequantizeLinear around float ops, found {node.op_type}"
    if node.domain.startswith(graphs.ONNXRUNTIME_DOMAIN):
        return f"expected ops of the ONNX domain, found {node.domain} {node.op_type}"
    if graphs.is_op(node, "Attention") and not reads_attention(node):
        return "expected an Attention of one output without a soft cap, found another; write out its products"
    return ""


def supported(reading: Reading) -> Broken:
    """E9: Q/DQ only, and no format but int8, int4, FP8 E4M3 and FP4: no QLinear ops, no dynamic scales, no int16."""
    for node in reading.nodes:
        if found := unreadable(node):
            yield node, found
    for quantizer in reading.leaders:
        known = (*LEGAL_FORMATS, *UNSIGNED_FORMATS, ir.DataType.INT32)
        if quantizer.format is not None and quantizer.format not in known:
            yield (
                quantizer.node,
                f"expected int8, int4, float8e4m3fn or float4e2m1 codes, found {spelled(quantizer.format)}",
            )


def hardware(reading: Reading) -> Broken:
    """E10: the GPU has the format: FP8 from SM 89, FP4 from SM 100, INT4 and INT8 convolutions from SM 80."""
    if reading.sm is None:
        return
    for quantizer in reading.leaders:
        first = FIRST_SM.get(quantizer.format) if quantizer.format is not None else None
        if first is not None and reading.sm < first:
            yield quantizer.node, f"expected SM {first} or later for {spelled(quantizer.format)}, found SM {reading.sm}"
    for product in reading.products:
        integer = all(
            operand.quantizer and operand.quantizer.format == ir.DataType.INT8 for operand in product.operands
        )
        if integer and product.node.op_type == "Conv" and reading.sm < FIRST_SM_INT8_CONV:
            yield product.node, f"expected SM {FIRST_SM_INT8_CONV} or later for INT8 Conv, found SM {reading.sm}"


def transposed_convolution(reading: Reading) -> Broken:
    """E11: no Q/DQ on ConvTranspose, which the compiler takes and then runs as float."""
    for product in reading.products:
        activation = product.operands[0].quantizer
        if product.node.op_type == "ConvTranspose" and activation is not None:
            yield product.node, f"expected a float ConvTranspose, found Q/DQ on its input ({name_of(activation.node)})"


def types_agree(reading: Reading) -> Broken:
    """E12: what an op wants in one type is in one: an Add does not take float32 and bfloat16."""
    opset = reading.model.graph.opset_imports.get("", onnx.defs.onnx_opset_version())
    for node in reading.nodes:
        if node.domain not in graphs.ONNX_DOMAINS or graphs.is_quantize(node) or graphs.is_dequantize(node):
            continue
        found: dict[str, dict[ir.DataType, str]] = {}
        for kind, value in _kinds_of_values(node, opset):
            is_bias = graphs.is_op(node, *layer_nodes.WEIGHTED_OPS) and value in node.inputs[2:]  # E4
            if value.dtype is not None and not is_bias and not graphs.is_dequantize(value.producer()):  # E8
                found.setdefault(kind, {}).setdefault(value.dtype, value.name or "")
        for types in found.values():
            if len(types) > 1:
                (one, first), (other, second) = list(types.items())[:2]
                yield node, f"expected one type, found {spelled(one)} {first} and {spelled(other)} {second}"


@functools.cache
def _kinds(op_type: str, opset: int) -> tuple[list[str | None], list[str | None]]:
    """Type parameters of an op's inputs and outputs in order, the last for all behind; ``None`` where any type goes."""
    try:
        schema = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return [], []
    parameters = {constraint.type_param_str for constraint in schema.type_constraints}
    inputs, outputs = (
        [item.type_str if item.is_homogeneous and item.type_str in parameters else None for item in items]
        for items in (schema.inputs, schema.outputs)
    )
    return inputs, outputs


def _kinds_of_values(node: ir.Node, opset: int) -> Iterator[tuple[str, ir.Value]]:
    for kinds, values in zip(_kinds(node.op_type, opset), (node.inputs, node.outputs), strict=True):
        for index, value in enumerate(values if kinds else ()):
            kind = kinds[min(index, len(kinds) - 1)]
            if kind is not None and value is not None:
                yield kind, value


ERRORS: dict[str, Rule] = {
    "E1": scale_known,
    "E2": scale_usable,
    "E3": symmetric,
    "E4": bias_float,
    "E5": activation_scale_scalar,
    "E6": weight_axis,
    "E7": one_format,
    "E8": scale_type,
    "E9": supported,
    "E10": hardware,
    "E11": transposed_convolution,
    "E12": types_agree,
}


def _default_axis(weight: Operand) -> str:
    quantizer = weight.quantizer
    missing = quantizer is not None and "axis" not in quantizer.node.attributes
    return " (the default, for none is given)" if missing else ""


def _first(values: np.ndarray) -> float:
    return float(values.reshape(-1)[0])
