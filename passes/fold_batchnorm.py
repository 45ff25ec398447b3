"""Fold BatchNormalization and Pad into the convolution beside them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.errors import OnnxqError
from onnxq.passes.match_types import NARROW, MatchTypes


class FoldBatchNorm(InPlacePass):
    """Fold inference-time affine steps into weights; the function stays as it was.

    Before::

        x ─► Pad ─► Conv(W) ─► BatchNormalization ─► y

    After::

        x ─► Conv(W', b', pads) ─► y

    The rules are onnxscript's. The convolution keeps its name, so that ``--exclude`` and reports speak of the node
    that the user knows. In float16 and bfloat16 models too, factors are computed in float32.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fold until nothing is left to fold."""
        # Private modules: the rule sets are not exported, only the rules one by one.
        from onnxscript.rewriter.rules.common import _fuse_batchnorm, _fuse_pad_into_conv

        _check_sizes(model.graph)
        names = _names_by_final_output(model.graph)
        widened = _widen(model.graph)
        count = _fuse_batchnorm.rules.apply_to_model(model)
        count += _fuse_pad_into_conv.rules.apply_to_model(model)
        for value, tensor in widened.items():  # of what was not folded
            value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
        MatchTypes()(model)
        if count:
            for node in model.graph:
                original = names.get(node.outputs[0].name or "")
                if original is not None and graphs.is_op(node, *layer_nodes.WEIGHTED_OPS):
                    node.name = original
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(count))


def _check_sizes(graph: ir.Graph) -> None:
    """Refuse a BatchNormalization that cannot run: the rules would add arrays that do not fit."""
    for node in graph:
        if not graphs.is_op(node, "BatchNormalization"):
            continue
        sizes = {value.const_value.size for value in node.inputs[1:5] if value is not None and value.const_value}
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is not None and graphs.is_op(source, "Conv", "ConvTranspose", "Gemm"):
            item = layer_nodes.weighted(source)
            if item is not None and item.weight is not None and item.weight.shape is not None:
                channels = item.weight.shape[item.channel_axis]
                groups = source.attributes.get_int("group", 1) if source.op_type == "ConvTranspose" else 1
                sizes |= {channels * groups} if isinstance(channels, int) else set()
        if len(sizes) > 1:
            raise OnnxqError(
                f"expected one size of the parameters of {node.name!r} (BatchNormalization) and of its channels, "
                f"found {', '.join(map(str, sorted(sizes)))}",
                hint="the model is damaged; export it again",
            )


def _widen(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Let what is going to be folded be float32; returns what it was."""
    found: dict[ir.Value, ir.TensorProtocol] = {}
    for node in graph:
        if not graphs.is_op(node, "BatchNormalization"):
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        layer = before if graphs.is_op(before, *layer_nodes.WEIGHTED_OPS) else None
        for value in (*node.inputs[1:], *(layer.inputs if layer is not None else ())):
            if value is not None and value.const_value is not None and value.dtype in NARROW:
                found[value] = value.const_value
                value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
                value.type = ir.TensorType(ir.DataType.FLOAT)
    return found


def _names_by_final_output(graph: ir.Graph) -> dict[str, str]:
    """The name of each weighted node, keyed by its output and by that of the BatchNormalization after it."""
    names: dict[str, str] = {}
    for item in layer_nodes.weighted_nodes(graph):
        output = item.node.outputs[0]
        names[output.name or ""] = item.node.name or ""
        for reader, _ in graphs.consumers(output):
            if graphs.is_op(reader, "BatchNormalization"):
                names[reader.outputs[0].name or ""] = item.node.name or ""
    return names
