"""Fold BatchNormalization and Pad into the convolution beside them."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs


class FoldBatchNorm(InPlacePass):
    """Fold inference-time affine steps into weights; the function stays as it was.

    Before::

        x ─► Pad ─► Conv(W) ─► BatchNormalization ─► y

    After::

        x ─► Conv(W', b', pads) ─► y

    The rules are onnxscript's. The convolution keeps its name, so that ``--exclude`` and reports speak of the node
    that the user knows.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fold until nothing is left to fold."""
        # Private modules: the rule sets are not exported, only the rules one by one.
        from onnxscript.rewriter.rules.common import _fuse_batchnorm, _fuse_pad_into_conv

        names = _names_by_final_output(model.graph)
        count = _fuse_batchnorm.rules.apply_to_model(model)
        count += _fuse_pad_into_conv.rules.apply_to_model(model)
        if count:
            for node in model.graph:
                original = names.get(node.outputs[0].name or "")
                if original is not None and graphs.is_op(node, *graphs.WEIGHTED_OPS):
                    node.name = original
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(count))


def _names_by_final_output(graph: ir.Graph) -> dict[str, str]:
    """The name of each weighted node, keyed by its output and by that of the BatchNormalization after it."""
    names: dict[str, str] = {}
    for item in graphs.weighted_nodes(graph):
        output = item.node.outputs[0]
        names[output.name or ""] = item.node.name or ""
        for reader, _ in graphs.consumers(output):
            if graphs.is_op(reader, "BatchNormalization"):
                names[reader.outputs[0].name or ""] = item.node.name or ""
    return names
