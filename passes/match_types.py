"""Give the constants of a layer the type of what the layer reads."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.passes.change_precision import nearest

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class MatchTypes(InPlacePass):
    """Round float32 constants of layers between float16 or bfloat16 values to that type.

    Before::

        x bfloat16, W float32 ─► Conv ─► y

    After::

        x bfloat16, W bfloat16 ─► Conv ─► y bfloat16

    No layer reads both (a BatchNormalization may). Folding one into a layer makes such weights, here in order to
    compute in float32, and in torch's exporter unnoticed: its files of networks in bfloat16 run nowhere.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Round what does not match."""
        found = False
        for node in model.graph.all_nodes():
            read = node.inputs[0] if node.inputs else None
            if read is None or not graphs.is_op(node, *layer_nodes.WEIGHTED_OPS):
                continue
            wanted, result = read.dtype, node.outputs[0]
            if wanted is None or wanted not in NARROW:
                continue
            for value in node.inputs[1:]:
                if value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                    value.const_value = nearest(value.const_value.numpy(), wanted, value.name)
                    value.type = ir.TensorType(wanted)
                    found = True
            if result.dtype == ir.DataType.FLOAT:
                result.type = ir.TensorType(wanted)
        return PassResult(model, found)
