"""Store the scales of FP4 blocks as FP8 numbers and one float, as TensorRT's FP4 kernels read them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import block_scales
from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer


class NarrowBlockScales(InPlacePass):
    """Dequantize the scales of FP4 blocks too: 4.5 bits a weight instead of 6.

    Before::

        W (fp4), scale (float [blocks]) ─► DequantizeLinear ─► MatMul

    After::

        scale (fp8 [blocks]), one float ─► DequantizeLinear ─┐
                                                W (fp4) ─► DequantizeLinear ─► MatMul

    FP4 came with opset 23, which reads like 21 for every other op.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every DequantizeLinear of FP4 blocks whose scales are constant."""
        names = graphs.Names(model.graph)
        modified = False
        for node in list(model.graph):
            codes, scale = node.inputs[:2] if graphs.is_dequantize(node) else (None, None)
            if codes is None or scale is None or codes.dtype != ir.DataType.FLOAT4E2M1:
                continue
            if not node.attributes.get_int("block_size", 0) or not graphs.is_constant(scale):
                continue
            numbers, factor = block_scales.two_levels(array_of(scale))
            dtype = scale.dtype or ir.DataType.FLOAT
            stored = new_initializer(model.graph, f"{scale.name}_numbers", numbers, ir.DataType.FLOAT8E4M3FN, names)
            step = new_initializer(model.graph, f"{scale.name}_factor", np.asarray(factor, dtype.numpy()), dtype, names)
            inner = ir.node("DequantizeLinear", [stored, step], name=names.free(f"{scale.name}_DQ"))
            inner.outputs[0].name = names.free(f"{scale.name}_dequantized")
            inner.outputs[0].type, inner.outputs[0].shape = ir.TensorType(dtype), scale.shape
            model.graph.insert_before(node, inner)
            node.replace_input_with(1, inner.outputs[0])
            zero_point = node.inputs[2] if len(node.inputs) > 2 else None
            node.resize_inputs(2)  # FP4 has no zero point but zero, which would be as large as the scales
            for value in (scale, zero_point):
                if value is not None and not value.uses():
                    del model.graph.initializers[value.name or ""]
            modified = True
        if modified:
            model.graph.opset_imports[""] = max(model.graph.opset_imports.get("", 0), 23)
            model.ir_version = max(model.ir_version or 0, 11)
        return PassResult(model, modified)
