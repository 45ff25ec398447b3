"""What onnxruntime's CPU provider refuses, computes wrongly, or runs in float although it is quantized.

Rules C2, C3, C5 and C8 are errors, the others cost speed. Each was tried in onnxruntime by comparing the optimised
session with the unoptimised one, and by looking at the nodes that the optimised session runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.passes.keep_biases_apart import fused_bias
from onnxq.passes.keep_layers_float import is_rounded
from onnxq.passes.pad_channels import LANES
from onnxq.plugins import is_plugin
from onnxq.targets.cpu_ops import ABSORBED, ARITHMETIC, DATA_MOVEMENT
from onnxq.targets.findings import Finding
from onnxq.targets.reading import Product, Quantizer, Reading, name_of, output_axis, scale_axis, scale_shape, spelled

Broken = Iterator[tuple[ir.Node, str]]
Rule = Callable[[Reading], Broken]

INT8, UINT8 = ir.DataType.INT8, ir.DataType.UINT8
EIGHT_BITS = (INT8, UINT8)
FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)
FP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2FNUZ)
BIAS_TOLERANCE = 1e-3  # relative; two float32 products of the same scales differ by 1e-7


def lint(model: ir.Model) -> list[Finding]:
    """Every rule of onnxruntime's CPU provider that the model breaks, errors first; the model is not changed."""
    reading = Reading(model)
    findings: dict[Finding, None] = {}  # ordered, and without repetition
    for severity, rules in (("error", ERRORS), ("warning", WARNINGS)):
        for rule, check in rules.items():
            for node, message in check(reading):
                findings[Finding(rule, severity, name_of(node), message)] = None
    return list(findings)


def output_quantized(reading: Reading) -> Broken:
    """C1: the output of a quantized Conv is quantized too, in the format of its input and for every reader."""
    for product in reading.products:
        activation = product.operands[0].quantizer
        if product.node.op_type != "Conv" or not product.is_quantized or _why_float(reading, product) or not activation:
            continue
        after = _quantize_after(reading, product.node)
        if after is None:
            yield product.node, f"expected Q/DQ after the Conv, found {_found_after(product.node)}: it stays float"
        elif after.format != activation.format:
            yield (
                product.node,
                f"expected an output in {spelled(activation.format)} like the input, found {spelled(after.format)}: "
                "it stays float",
            )


def scale_usable(reading: Reading) -> Broken:
    """C2: scales are finite and above zero; those of a weight's blocks may be below."""
    for quantizer in reading.leaders:
        if quantizer.scale is None:
            continue
        scale = quantizer.scale.astype(np.float32)
        in_blocks = quantizer.node.attributes.get_int("block_size", 0) > 0
        usable = np.isfinite(scale) & ((scale > 0) | (in_blocks & (scale < 0)))
        if not np.all(usable):
            yield quantizer.node, f"expected finite scales above zero, found {scale[~usable].reshape(-1)[0]:g}"


def format_accepted(reading: Reading) -> Broken:
    """C3: no FP4; no FP8 or 4-bit activations where onnxruntime would build an integer kernel: 1.31 refuses."""
    for quantizer in reading.quantizers.values():
        if quantizer.format == ir.DataType.FLOAT4E2M1:
            yield quantizer.node, "expected a format that onnxruntime runs, found float4e2m1"
        if quantizer.is_quantize or quantizer.format not in (*FP8, *FOUR_BITS):
            continue
        if reading.is_known(quantizer.node.inputs[0]):
            continue
        for reader, _ in graphs.consumers(quantizer.node.outputs[0]):
            fp8 = quantizer.format in FP8
            whole = fp8 and graphs.is_op(reader, "MatMul", "MaxPool")
            fused = graphs.is_op(reader, "Conv", *ARITHMETIC) and _quantize_after(reading, reader) is not None
            if whole or fused:
                yield (
                    reader,
                    f"expected int8 or uint8 activations, found {spelled(quantizer.format)}: onnxruntime refuses it "
                    "unless its optimisations are off",
                )


def neighbours_quantized(reading: Reading) -> Broken:
    """C4: an op with an integer kernel between quantized ones has Q/DQ after it, of the same scale if it moves data."""
    for node in reading.nodes:
        varying = [value for value in node.inputs if value is not None and not reading.is_known(value)]
        sources = [_dequantize(reading, value) for value in varying]
        if not varying or None in sources:
            continue
        after = _quantize_after(reading, node)
        if graphs.is_op(node, *ARITHMETIC) and len(varying) == len(node.inputs):
            if after is None and _feeds_product(node):
                yield node, f"expected Q/DQ after {node.op_type} between quantized ops, found none: it runs in float"
        elif graphs.is_op(node, *DATA_MOVEMENT) and after is not None and sources[0] is not None:
            before = sources[0].scale
            if before is not None and after.scale is not None and not np.array_equal(before, after.scale):
                yield (
                    node,
                    f"expected one scale before and after {node.op_type}, found {float(before.max()):.4g} and "
                    f"{float(after.scale.max()):.4g}: it runs in float",
                )


def bias_scale(reading: Reading) -> Broken:
    """C5: an int32 bias has the scale input scale · weight scale, or the integer kernel adds it wrongly."""
    for product in reading.products:
        bias = product.node.inputs[2] if len(product.node.inputs) > 2 else None
        quantizer = None if bias is None else _dequantize(reading, bias)
        if product.node.op_type == "MatMul" or quantizer is None or quantizer.scale is None:
            continue
        scales = [operand.quantizer.scale if operand.quantizer else None for operand in product.operands]
        if quantizer.format != ir.DataType.INT32 or scales[0] is None or scales[1] is None or scales[0].size != 1:
            continue
        expected = scales[0].reshape(()) * scales[1].reshape(-1)
        found = quantizer.scale.reshape(-1)
        if found.size not in (1, expected.size) and expected.size != 1:
            continue
        error = float(np.max(np.abs(found / expected - 1)))
        if error > BIAS_TOLERANCE:
            yield (
                product.node,
                f"expected a bias scale of input scale · weight scale, found one {error:.3g} times away from it: "
                "the integer kernel computes something else; leave the bias float",
            )


def gemm_kernel(reading: Reading) -> Broken:
    """C6: a quantized Gemm has beta 1, a zero point on its weight, scales per output channel and no float bias."""
    for product in reading.products:
        weight = product.weight
        if product.node.op_type != "Gemm" or not product.is_quantized or weight is None or weight.quantizer is None:
            continue
        attributes, bias = product.node.attributes, product.node.inputs[2] if len(product.node.inputs) > 2 else None
        found = ""
        if bias is not None and attributes.get_float("beta", 1.0) != 1.0:
            found = f"beta {attributes.get_float('beta', 1.0):g}"
        elif len(weight.quantizer.node.inputs) < 3 or weight.quantizer.node.inputs[2] is None:
            found = "a weight without zero point"
        elif scale_axis(weight) not in (None, output_axis(product, weight)):
            found = f"weight scales along axis {scale_axis(weight)}"
        elif bias is not None and _dequantize(reading, bias) is None and _quantize_after(reading, product.node) is None:
            found = "a float bias and an output that is not quantized"
        if found:
            yield product.node, f"expected a Gemm with an integer kernel, found {found}: it stays float"


def signed_activations(reading: Reading) -> Broken:
    """C7: int8 activations that several products read need the session option session.qdqisint8allowed=1."""
    for quantizer in reading.quantizers.values():
        if quantizer.is_quantize or quantizer.format != INT8 or reading.is_known(quantizer.node.inputs[0]):
            continue
        readers = {reader for reader, _ in graphs.consumers(quantizer.node.outputs[0])}
        if sum(graphs.is_op(reader, *layer_nodes.WEIGHTED_OPS) for reader in readers) > 1:
            yield (
                quantizer.node,
                "expected uint8 activations, found int8: without the session option session.qdqisint8allowed=1 their "
                "readers stay float (said once for the whole model)",
            )
            return


def weight_axis(reading: Reading) -> Broken:
    """C8: weight scales run along output channels, of which several matrices have none that onnxruntime would run.

    It does not look at the axis and computes wrongly, or refuses to run.
    """
    for product in reading.products:
        weight = product.weight
        if product.node.op_type not in ("Conv", "MatMul") or not product.is_quantized or weight is None:
            continue
        found, expected = scale_axis(weight), output_axis(product, weight)
        if found is not None and layer_nodes.multiplies_several(product.node):
            yield product.node, f"expected one scale for a weight of several matrices, found scales along axis {found}"
        elif found is not None and expected is not None and found != expected:
            yield product.node, f"expected weight scales along axis {expected}, found axis {found}"


def kernel_exists(reading: Reading) -> Broken:
    """C9: there is an integer kernel for the product and for how it is quantized."""
    for product in reading.products:
        reason = _why_float(reading, product)
        if product.is_quantized and reason:
            yield product.node, f"expected a product with an integer kernel, found {reason}: it stays float"


def format_native(reading: Reading) -> Broken:
    """C10: activations are int8 or uint8; wider integers and FP8 are rounded to, but computed in float."""
    simulated = (*FP8, ir.DataType.INT16, ir.DataType.UINT16)
    for quantizer in reading.leaders:
        if quantizer.format in simulated and not reading.is_known(quantizer.node.inputs[0]):
            found = spelled(quantizer.format)
            yield quantizer.node, f"expected int8 or uint8 activations, found {found}: simulated, runs in float"


def bias_apart(reading: Reading) -> Broken:
    """C11: a bias behind a product of codes with more than two dimensions, all of them fixed, has two itself."""
    for product in reading.products:
        item = layer_nodes.weighted(product.node)
        shape = product.node.outputs[0].shape
        if item is None or shape is None or not shape.is_static() or fused_bias(item) is None:
            continue
        yield product.node, "expected a bias with two dimensions, found one: both become a float Gemm"


def float_kept(reading: Reading) -> Broken:
    """C12: a float convolution between codes reads a scale for each channel, or onnxruntime rounds its weights."""
    for node in reading.nodes:
        if is_rounded(node):
            yield (
                node,
                "expected codes with a scale for each channel before a layer with float weights, found one for all: "
                "onnxruntime rounds the weights to 8 bits of one scale",
            )


def depthwise_fast(reading: Reading) -> Broken:
    """C13: a depthwise convolution on codes has a multiple of 16 channels, and one result for each."""
    for product in reading.products:
        node = product.node
        weight, groups = node.inputs[1], node.attributes.get_int("group", 1)
        if node.op_type != "Conv" or groups == 1 or not product.is_quantized or weight is None or weight.shape is None:
            continue
        if weight.shape[1] != 1:
            continue
        if layer_nodes.depthwise_channels(node) is None:
            yield node, "expected one result for each channel on codes, found several: in float they are faster"
        elif groups % LANES:
            yield (
                node,
                f"expected a multiple of {LANES} channels on codes, found {groups}: those left over are computed one "
                "by one",
            )


def op_known(reading: Reading) -> Broken:
    """C14: onnxruntime knows the op; or it is told of a library of custom ops, wherever the model runs."""
    for node in reading.nodes:
        if is_plugin(node) and node.op_identifier() not in reading.model.functions:
            yield node, f"expected an op that onnxruntime knows, found {node.domain} {node.op_type}"


ERRORS: dict[str, Rule] = {
    "C2": scale_usable,
    "C3": format_accepted,
    "C5": bias_scale,
    "C8": weight_axis,
}
WARNINGS: dict[str, Rule] = {
    "C1": output_quantized,
    "C4": neighbours_quantized,
    "C6": gemm_kernel,
    "C7": signed_activations,
    "C9": kernel_exists,
    "C10": format_native,
    "C11": bias_apart,
    "C12": float_kept,
    "C13": depthwise_fast,
    "C14": op_known,
}


def _why_float(reading: Reading, product: Product) -> str:
    """Why a quantized product has no integer kernel, or an empty string (Gemm has a rule of its own)."""
    node, (first, second) = product.node, product.operands
    formats = [operand.quantizer.format if operand.quantizer else None for operand in product.operands]
    if node.op_type == "ConvTranspose":
        return "ConvTranspose"
    if any(kind in FOUR_BITS for kind in formats):
        return "4-bit codes on both sides or on one"
    if any(kind is not None and kind not in EIGHT_BITS for kind in formats):
        return ""  # C10
    if first.is_weight and first.quantizer and scale_shape(first.quantizer) not in (None, (), (1,)):
        return "a weight with one scale per channel on the left"
    for operand in (first, second):
        if operand.quantizer and not operand.is_weight and scale_shape(operand.quantizer) not in (None, (), (1,)):
            return "an activation with one scale per channel"
    bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
    computed = first.quantizer is not None and not reading.is_known(first.quantizer.node.inputs[1])
    if computed and bias is not None and _dequantize(reading, bias) is None:
        return "a float bias beside a computed input scale"
    return ""


def _dequantize(reading: Reading, value: ir.Value) -> Quantizer | None:
    """The DequantizeLinear that makes the value."""
    node = value.producer()
    return None if node is None or not graphs.is_dequantize(node) else reading.quantizers[node]


def _quantize_after(reading: Reading, node: ir.Node) -> Quantizer | None:
    """The QuantizeLinear that alone reads the node's output, if only after a Relu or Clip that it absorbs."""
    reader = graphs.only_reader(node.outputs[0])
    if reader is None or not graphs.is_op(reader, *ABSORBED):
        return reading.quantizers[reader] if reader is not None and graphs.is_quantize(reader) else None
    after = graphs.only_reader(reader.outputs[0])
    if after is None or not graphs.is_quantize(after):
        return None
    quantizer = reading.quantizers[after]
    return quantizer if _absorbs(reading, quantizer, reader) else None


def _absorbs(reading: Reading, quantizer: Quantizer, activation: ir.Node) -> bool:
    """Whether the codes reach no further than the Relu or Clip before them."""
    if quantizer.format not in EIGHT_BITS or quantizer.scale is None:
        return True  # cannot be told
    zero_point = 0.0 if quantizer.zero_point is None else float(quantizer.zero_point.reshape(-1)[0])
    codes = np.iinfo(np.int8 if quantizer.format == INT8 else np.uint8)
    scale = float(quantizer.scale.reshape(-1)[0])
    low, high = -np.inf, np.inf
    if graphs.is_op(activation, "Relu"):
        low = 0.0
    else:
        bounds = [*(reading.fold(value) for value in activation.inputs[1:3]), None, None][:2]
        low, high = (
            default if bound is None else float(bound.reshape(-1)[0])
            for bound, default in zip(bounds, (low, high), strict=True)
        )
    return (codes.min - zero_point) * scale >= low and (codes.max - zero_point) * scale <= high


def _found_after(node: ir.Node) -> str:
    readers = [reader.op_type for reader, _ in graphs.consumers(node.outputs[0])]
    if node.outputs[0].is_graph_output() or not readers:
        return "a graph output"
    if len(readers) == 1 and readers[0] in ABSORBED:
        return f"a {readers[0]} that no QuantizeLinear absorbs"
    return f"{', '.join(sorted(set(readers)))} reading its output"


def _feeds_product(node: ir.Node) -> bool:
    """Whether Q/DQ pairs or products alone read what the node makes, so that codes would have paid."""
    readers = [reader for reader, _ in graphs.consumers(node.outputs[0])]
    fed = [graphs.is_quantize(reader) or graphs.is_op(reader, *layer_nodes.WEIGHTED_OPS) for reader in readers]
    return bool(fed) and all(fed)
