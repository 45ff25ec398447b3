"""Fold what is added to or multiplied with the channels of a convolution into its bias and weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer

Array = np.ndarray[Any, Any]

CHANNEL_AXIS = 1


class FoldAffine(InPlacePass):
    """Make one convolution of a convolution and the constants behind it; the function stays as it was.

    Before::

        x ─► Conv(W) ─► Add(c) ─► Mul(m) ─► y          c, m: one number, or one for each channel

    After::

        x ─► Conv(W · m, c · m) ─► y

    Some exporters write a bias as an Add of its own. Quantized codes between the two would be those of the sum
    without its bias: wider than what is needed, and rounded twice.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fold until nothing is left to fold."""
        modified = False
        for node in list(model.graph):
            if graphs.is_op(node, "Conv"):
                while _fold_next(model.graph, node):
                    modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def _fold_next(graph: ir.Graph, conv: ir.Node) -> bool:
    """Fold the only reader of a convolution into it, if it is of that kind."""
    output, weight = conv.outputs[0], conv.inputs[1]
    readers = graphs.consumers(output)
    if len(readers) != 1 or output.is_graph_output() or weight is None or not _is_own(weight):
        return False
    reader, index = readers[0]
    if not graphs.is_op(reader, "Add", "Sub", "Mul", "Div") or len(reader.inputs) != 2:
        return False
    if index == 1 and not graphs.is_op(reader, "Add", "Mul"):
        return False
    constant = reader.inputs[1 - index]
    kernel = array_of(weight)
    numbers = _per_channel(constant, output, kernel.shape[0])
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if numbers is None or (bias is not None and not graphs.is_constant(bias)):
        return False
    if reader.op_type == "Div" and not numbers.all():
        return False
    dtype = weight.dtype or ir.DataType.FLOAT
    shift = np.zeros(numbers.size) if bias is None else array_of(bias)
    if reader.op_type in ("Add", "Sub"):
        shift = shift + (numbers if reader.op_type == "Add" else -numbers)
    else:
        factor = numbers if reader.op_type == "Mul" else 1 / numbers
        scaled = kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))
        weight.const_value = ir.Tensor(scaled.astype(dtype.numpy()), dtype=dtype, name=weight.name)
        shift = shift * factor
    new_bias = new_initializer(graph, f"{conv.name}_bias", shift.astype(dtype.numpy()), dtype)
    conv.resize_inputs(3)
    conv.replace_input_with(2, new_bias)
    ir.convenience.replace_all_uses_with(reader.outputs[0], output, replace_graph_outputs=True)
    name = reader.outputs[0].name
    graph.remove(reader, safe=True)
    output.name = name
    return True


def _is_own(value: ir.Value) -> bool:
    return graphs.is_constant(value) and value.const_value is not None and len(value.uses()) == 1


def _per_channel(constant: ir.Value | None, output: ir.Value, channels: int) -> Array | None:
    """The constant as one number per channel, ``None`` if it is something else."""
    rank = graphs.rank(output)
    if constant is None or not graphs.is_constant(constant) or constant.const_value is None:
        return None
    shape = tuple(int(size) for size in constant.const_value.shape.numpy())
    if rank is None or len(shape) > rank or not graphs.is_float(constant):
        return None
    full = (1,) * (rank - len(shape)) + shape
    if any(size != 1 for axis, size in enumerate(full) if axis != CHANNEL_AXIS):
        return None
    if full[CHANNEL_AXIS] not in (1, channels):
        return None
    numbers: Array = np.broadcast_to(array_of(constant).reshape(-1), (channels,))
    return numbers
