"""Constants computed when a model is read, and branches of If that they decide."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxq import graph as graphs
from onnxq import shapes

FOLDED_ELEMENTS = 1 << 26
FILLED_ELEMENTS = 1 << 18  # of one number, a MiB: as a node it takes none
SPREAD_ELEMENTS = 1 << 22  # the same again and again, as a mask for long texts


def fold(model: ir.Model) -> None:
    """Compute what is constant, again where that has decided an If: shapes behind it may be known now."""
    if not any(_is_foldable(node) for node in model.graph.all_nodes()):
        return
    from onnxscript import optimizer

    undecided = _decisions(model)
    while True:
        # Weights may be stored compressed, behind Cast and Mul: the default limits would leave those in the graph.
        optimizer.fold_constants(
            model, input_size_limit=FOLDED_ELEMENTS, output_size_limit=FOLDED_ELEMENTS, should_fold=_should_fold
        )
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _take_shapes_of_numbers(model)
        before, undecided = undecided, _decisions(model)
        if undecided == before:
            return
        _forget_lost_nodes(model)
        shapes.infer(model)


def _decisions(model: ir.Model) -> int:
    return sum(node.op_type == "If" for node in model.graph.all_nodes())


def _is_foldable(node: ir.Node) -> bool:
    """All inputs constant, or a Shape: what constant folding could remove."""
    if node.op_type in ("Shape", "Size", "ConstantOfShape"):
        return True
    if graphs.is_quantize(node) or graphs.is_dequantize(node):
        return False
    return bool(node.inputs) and all(value is None or graphs.is_constant(value) for value in node.inputs)


def _should_fold(node: ir.Node) -> bool | None:
    """Not what would be computed only to be found too large; else what the folder decides by itself.

    It leaves every ConstantOfShape, and with it all that is computed from one: masks, states and queries of zeros.
    """
    shape = None
    if graphs.is_op(node, "ConstantOfShape") and node.inputs[0] is not None:
        shape = ir.convenience.get_const_tensor(node.inputs[0])
    if shape is not None and shape.numpy().prod() <= FILLED_ELEMENTS:
        return True
    if graphs.is_op(node, "Expand", "Tile") and any(
        (shapes.elements(value) or 0) > SPREAD_ELEMENTS for value in node.outputs
    ):
        return False
    return False if any((shapes.elements(value) or 0) > FOLDED_ELEMENTS for value in node.outputs) else None


def _take_shapes_of_numbers(model: ir.Model) -> None:
    """What was computed has the sizes of its numbers, also where inference could not tell them (of a Slice, say)."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape = ir.Shape(value.const_value.shape.numpy())


def _forget_lost_nodes(model: ir.Model) -> None:
    """Where one branch of an If was taken, nodes of the other still count as readers: weights would stay for them."""
    alive = list(model.graphs())
    for graph in alive:
        for value in graphs.values(graph).values():
            for user in value.uses():
                if not any(user.node.graph is other for other in alive):
                    user.node.replace_input_with(user.idx, None)
