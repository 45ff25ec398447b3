"""Write FP4 as TensorRT's kernels read it: a scale for each block of 16, in FP8, times one float for the tensor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import block_scales, dynamic_fp4
from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer

FP4, FP8 = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN


class LowerFp4(InPlacePass):
    """Dequantize the scales of blocks too: those of weights are constant, those of activations made with the codes.

    Before::

        W (fp4), scales (float [blocks]) ─► DequantizeLinear ─┐
        x, one scale ─► QuantizeLinear ─► DequantizeLinear ───┴► MatMul

    After::

        scales (fp8 [blocks]), one float ─► DequantizeLinear ─┐
                                 W (fp4) ─────────────► DequantizeLinear ─┐
        x ─► TRT_FP4DynamicQuantize ─┬─ codes (fp4) ──► DequantizeLinear ─┴► MatMul
                                     └─ scales (fp8) ─► DequantizeLinear ─┘

    A weight takes 4.5 bits so instead of 6. FP4 came with opset 23, which reads like 21 for every other op.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every DequantizeLinear of FP4 blocks with constant scales, and every FP4 pair of an activation."""
        lowering = _Lowering(model.graph)
        for node in list(model.graph):
            if graphs.is_dequantize(node) and _has_blocks_of_fp4(node):
                lowering.weight(node)
            elif dynamic_fp4.stands_for(node):
                lowering.activation(node)
        if lowering.modified:
            common_passes.RemoveUnusedNodesPass()(model)  # scales and zero points that nothing reads any more
            model.graph.opset_imports[""] = max(model.graph.opset_imports.get("", 0), 23)
            model.ir_version = max(model.ir_version or 0, 11)
        return PassResult(model, lowering.modified)


def _has_blocks_of_fp4(node: ir.Node) -> bool:
    codes, scale = node.inputs[:2]
    has_blocks = node.attributes.get_int("block_size", 0) > 0
    return codes is not None and codes.dtype == FP4 and has_blocks and graphs.is_constant(scale)


class _Lowering:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.names, self.modified = graph, graphs.Names(graph), False

    def weight(self, node: ir.Node) -> None:
        scale = node.inputs[1]
        numbers, factor = block_scales.two_levels(array_of(scale), _least_factor(scale))
        stored = new_initializer(self.graph, f"{_name(scale)}_numbers", numbers, FP8, self.names)
        self._read_scales(node, stored, self._factor(scale, factor))

    def activation(self, node: ir.Node) -> None:
        """The range of the tensor is what the largest scale of a block reaches with the largest code."""
        source, scale = node.inputs[:2]
        factor = self._factor(scale, max(float(array_of(scale)) / block_scales.LARGEST, _least_factor(scale)))
        old = node.outputs[0]
        codes = ir.Value(name=self.names.free(f"{old.name}_blocks"), type=ir.TensorType(FP4), shape=old.shape)
        numbers = ir.Value(name=self.names.free(f"{old.name}_scales"), type=ir.TensorType(FP8))
        attributes = {"axis": -1, "block_size": block_scales.BLOCK, "scale_type": int(FP8)}
        made = ir.node(
            dynamic_fp4.OP, [source, factor], attributes, domain=dynamic_fp4.DOMAIN, outputs=[codes, numbers],
            name=self.names.free(f"{node.name}_blocks"),
        )  # fmt: skip
        self.graph.insert_before(node, made)
        self.graph.opset_imports.setdefault(dynamic_fp4.DOMAIN, 1)
        for reader, index in graphs.consumers(old):
            reader.replace_input_with(index, codes)
            reader.attributes["axis"] = ir.AttrInt64("axis", -1)
            reader.attributes["block_size"] = ir.AttrInt64("block_size", block_scales.BLOCK)
            self._read_scales(reader, numbers, factor)
        self.graph.remove(node, safe=True)

    def _read_scales(self, node: ir.Node, numbers: ir.Value, factor: ir.Value) -> None:
        """Let a DequantizeLinear of codes read scales that are dequantized first; zero is FP4's only zero point."""
        scale = node.inputs[1]
        inner = ir.node("DequantizeLinear", [numbers, factor])
        inner.name = self.names.free(f"{_name(scale)}_DQ")
        output = inner.outputs[0]
        output.name, output.type = self.names.free(f"{_name(scale)}_dequantized"), ir.TensorType(_float_type(scale))
        output.shape = numbers.shape
        self.graph.insert_before(node, inner)
        node.replace_input_with(1, output)
        node.resize_inputs(2)
        self.modified = True

    def _factor(self, scale: ir.Value | None, factor: float) -> ir.Value:
        dtype = _float_type(scale)
        array = np.asarray(factor, dtype.numpy())
        return new_initializer(self.graph, f"{_name(scale)}_factor", array, dtype, self.names)


def _least_factor(scale: ir.Value | None) -> float:
    """What float16 holds in full (rule E2); FP8 reaches 17 powers of two down from it."""
    return float(np.finfo(np.float16).tiny) if _float_type(scale) == ir.DataType.FLOAT16 else 0.0


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def _float_type(scale: ir.Value | None) -> ir.DataType:
    return ir.DataType.FLOAT if scale is None or scale.dtype is None else scale.dtype
