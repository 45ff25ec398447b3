"""Write GroupNormalization as the InstanceNormalization of groups, which onnxruntime has a kernel for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of, new_initializer
from onnxq.rewriting import Before, become


class LowerGroupNorm(InPlacePass):
    """Normalise groups as if they were channels; the function stays.

    Before::

        x ─► GroupNormalization(g, b) ─► y

    After::

        x ─► Reshape([N, groups, -1]) ─► InstanceNormalization ─► Reshape(Shape(x)) ─► Mul(g) ─► Add(b) ─► y

    onnxruntime's CPU provider takes GroupNormalization apart into means and differences: 400,000 numbers take 0.46 ms,
    and 0.21 ms so.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every one with constant scale and bias."""
        found = [node for node in model.graph if _qualifies(node)]
        for node in found:
            _rewrite(model.graph, node)
        return PassResult(model, bool(found))


def _qualifies(node: ir.Node) -> bool:
    if not graphs.is_op(node, "GroupNormalization") or not all(map(graphs.is_constant, node.inputs[1:3])):
        return False
    source = node.inputs[0]
    shape = None if source is None else source.shape
    # In opset 18 there is a scale for each group, not for each channel.
    return shape is not None and len(shape) > 2 and array_of(node.inputs[1]).size == shape[1]


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    source, scale, bias = node.inputs
    assert source is not None and source.shape is not None and scale is not None and scale.dtype is not None
    groups = node.attributes.get_int("num_groups", 1)
    name, dtype = node.outputs[0].name, scale.dtype
    before = Before(graph, node)

    def constant(suffix: str, array: np.ndarray, kind: ir.DataType = dtype) -> ir.Value:
        return new_initializer(graph, f"{name}_{suffix}", array, kind)

    split = constant("groups", np.array([0, groups, -1]), ir.DataType.INT64)
    ones, zeros = (constant(f"group_{what}s", np.full(groups, what, dtype.numpy())) for what in (1, 0))
    rows = before.op("Reshape", source, split)
    normalised = before.op(
        "InstanceNormalization", rows, ones, zeros, epsilon=node.attributes.get_float("epsilon", 1e-5)
    )
    rows.shape = normalised.shape = None
    shape = before.op("Shape", source)
    shape.type, shape.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(source.shape)])
    back = before.op("Reshape", normalised, shape)
    spread = (-1, *[1] * (len(source.shape) - 2))
    factor, offset = (constant(what, array_of(value).reshape(spread)) for what, value in (("g", scale), ("b", bias)))
    scaled = before.op("Mul", back, factor)
    node.attributes.clear()
    become(node, "Add", [scaled, offset])
    before.insert()
