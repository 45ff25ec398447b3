"""Replace the QuantizeLinear of constant weights by the integers it gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.arithmetic import quantize
from onnxq.passes.insert_qdq import spec_of


class LowerWeights(InPlacePass):
    """Store weights as codes: the file shrinks, and both targets see a quantized constant.

    Before::

        W (float) ─► QuantizeLinear ─► DequantizeLinear ─► Conv

    After::

        W_quantized (int8) ─► DequantizeLinear ─► Conv
    """

    def call(self, model: ir.Model) -> PassResult:
        """Lower every QuantizeLinear that reads an initializer."""
        modified = False
        for node in list(model.graph):
            if not graphs.is_quantize(node) or not graphs.is_constant(node.inputs[0]):
                continue
            weight, scale, zero_point = node.inputs[:3]
            assert weight is not None and scale is not None and zero_point is not None
            assert weight.const_value and scale.const_value and zero_point.const_value
            container = zero_point.const_value.dtype  # may be wider than the format's own
            number_format = replace(spec_of(node).format, storage=container)
            per_tensor = scale.const_value.size == 1 and not scale.const_value.shape
            codes = quantize(
                weight.const_value.numpy(),
                scale.const_value.numpy(),
                zero_point.const_value.numpy(),
                number_format,
                axis=None if per_tensor else node.attributes.get_int("axis", 1),
                block_size=node.attributes.get_int("block_size", 0) or None,
            )
            quantized = node.outputs[0]
            stored = ir.Value(name=quantized.name, shape=weight.shape, type=ir.TensorType(number_format.storage))
            stored.const_value = _tensor(codes, number_format.storage, quantized.name)
            graphs.let_go(weight)
            quantized.replace_all_uses_with(stored)
            model.graph.remove(node, safe=True)
            model.graph.register_initializer(stored)
            modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)  # the float weights that nothing reads any more
        return PassResult(model, modified)


def _tensor(codes: np.ndarray[Any, Any], dtype: ir.DataType, name: str | None) -> ir.TensorProtocol:
    """Codes as they are stored: two of four bits in a byte, the first in its lower half."""
    if dtype.bitwidth != 4:
        return ir.Tensor(codes, dtype=dtype, name=name)
    halves = codes.reshape(-1).view(np.uint8) & 0xF
    if halves.size % 2:
        halves = np.append(halves, np.uint8(0))
    return ir.PackedTensor(halves[::2] | halves[1::2] << 4, dtype, shape=ir.Shape(codes.shape), name=name)
