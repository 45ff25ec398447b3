"""FP4 activations: TensorRT's op that makes codes and the scales of their blocks at once, and what it means in ONNX.

A block of 16 neighbours has its scale from its own largest number, found while the network runs; calibration gives one
number for the whole tensor, which keeps those scales within what FP8 holds. Until a model is lowered an ordinary pair
of Q/DQ with that one scale stands for the op, and recipes that learn see it as what it becomes.

onnxruntime has neither the op nor FP4: a session gets a function of ONNX's own ops, and FP8 codes in place of FP4 ones,
of which FP8 holds all.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.block_scales import BLOCK
from onnxq.passes.insert_qdq import FORMAT

DOMAIN, OP = "trt", "TRT_FP4DynamicQuantize"
LARGEST_CODE = 6.0

# The nearest number of FP4, half to even, is a multiple of 0.5 below 2, of 1 below 4 and of 2 above.
_MEANING = f"""
<domain: "{DOMAIN}", opset_import: ["" : 23]>
{OP} <axis, block_size, scale_type> (x, factor) => (codes, scales)
{{
    numbers = Cast <to=1> (x)
    unit = Cast <to=1> (factor)
    shape = Shape (x)
    before = Shape <end=-1> (x)
    parts = Constant <value_ints=[-1, {BLOCK}]> ()
    one_each = Constant <value_ints=[-1]> ()
    in_blocks = Concat <axis=0> (before, parts)
    of_blocks = Concat <axis=0> (before, one_each)
    blocks = Reshape (numbers, in_blocks)
    sizes = Abs (blocks)
    largest = ReduceMax <keepdims=0> (sizes, one_each)
    six = Constant <value_float={LARGEST_CODE}> ()
    largest_code = Mul (unit, six)
    wanted = Div (largest, largest_code)
    scales = Cast <to=17> (wanted)
    rounded = Cast <to=1> (scales)
    steps = Mul (rounded, unit)
    zero = Constant <value_float=0.0> ()
    one = Constant <value_float=1.0> ()
    is_empty = Equal (steps, zero)
    divisors = Where (is_empty, one, steps)
    wide = Unsqueeze (divisors, one_each)
    exact = Div (blocks, wide)
    minus_six = Neg (six)
    inside = Clip (exact, minus_six, six)
    size = Abs (inside)
    half = Constant <value_float=0.5> ()
    two = Constant <value_float=2.0> ()
    four = Constant <value_float=4.0> ()
    is_small = Less (size, two)
    is_middle = Less (size, four)
    coarse = Where (is_middle, one, two)
    gap = Where (is_small, half, coarse)
    gaps = Div (inside, gap)
    nearest = Round (gaps)
    found = Mul (nearest, gap)
    whole = Reshape (found, shape)
    codes = Cast <to=17> (whole)
}}
"""


def stands_for(node: ir.Node) -> bool:
    """Whether a QuantizeLinear of ours is an activation's, which becomes the op when a model is lowered."""
    return (
        graphs.is_quantize(node)
        and FORMAT in node.metadata_props
        and node.outputs[0].dtype == ir.DataType.FLOAT4E2M1
        and not graphs.is_constant(node.inputs[0])
    )


def makes_fp4(node: ir.Node | onnx.NodeProto) -> bool:
    """Whether a node is the op."""
    return node.op_type == OP and node.domain == DOMAIN


def reads_fp4(node: ir.Node) -> bool:
    """Whether a DequantizeLinear reads the op's codes, by the scales that it makes with them."""
    codes = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return codes is not None and makes_fp4(codes)


def for_onnxruntime(proto: onnx.ModelProto) -> None:
    """Put FP8 in place of FP4 in a serialized model, and give it the meaning of the op if it has one.

    Args:
        proto: Its FP4 initializers are FP8 ones already; changed in place.
    """
    for value in proto.graph.value_info:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT4E2M1:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT8E4M3FN
    if any(map(makes_fp4, proto.graph.node)):
        proto.functions.append(_meaning())


@functools.cache
def _meaning() -> onnx.FunctionProto:
    return onnx.parser.parse_function(_MEANING)
