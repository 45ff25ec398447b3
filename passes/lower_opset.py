"""Write opset 20 where nothing needs opset 21."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs

OPSET = 20
NEEDS_21 = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.FLOAT4E2M1)


class LowerOpset(InPlacePass):
    """Step from opset 21 to 20, which read the same for every op but those named below.

    onnxruntime turns signed Q/DQ into unsigned ones while it optimises, but at opset 21 forgets the ``output_dtype``
    of those that it moves past a Transpose or Slice, and then refuses the model. Opset 20 has no such attribute.
    Left at 21: block scales, 4- and 16-bit codes, GroupNormalization (whose scale changed shape).
    """

    def call(self, model: ir.Model) -> PassResult:
        """Lower the opset if every node allows it."""
        graph = model.graph
        if graph.opset_imports.get("") != OPSET + 1 or not all(reads_the_same(node) for node in graph.all_nodes()):
            return PassResult(model, False)
        if any(value.dtype in NEEDS_21 for value in graph.initializers.values()):
            return PassResult(model, False)
        graph.opset_imports[""] = OPSET
        return PassResult(model, True)


def reads_the_same(node: ir.Node) -> bool:
    """Whether a node means the same at both opsets."""
    if graphs.is_op(node, "GroupNormalization"):
        return False
    if graphs.is_quantize(node) or graphs.is_dequantize(node):
        return not {"block_size", "output_dtype"} & set(node.attributes)
    return True
