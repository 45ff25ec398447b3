"""Write a model at an older opset, for runtimes that know no newer one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.errors import OnnxqError
from onnxq.passes.lower_group_norm import LowerGroupNorm
from onnxq.passes.older_forms import OLDER_FORMS
from onnxq.scheme import Scheme

USUAL = 20
OLDEST = 13  # the first with a scale for each channel
NEWEST = 23
IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
"""The version of the file format that came with an opset."""
CHANGED = {"GroupNormalization": 21, "RoiAlign": 16}
"""Ops that mean something else from an opset on, with the same inputs and attributes."""
NEW_CHOICES = {
    ("GridSample", "mode", "linear"): 20, ("GridSample", "mode", "cubic"): 20,
    ("Pad", "mode", "wrap"): 19,
    ("Resize", "coordinate_transformation_mode", "half_pixel_symmetric"): 19,
    ("ScatterElements", "reduction", "max"): 18, ("ScatterElements", "reduction", "min"): 18,
    ("ScatterND", "reduction", "max"): 18, ("ScatterND", "reduction", "min"): 18,
}  # fmt: skip
"""What an attribute may be from an opset on."""


class LowerOpset(InPlacePass):
    """Step down to an older opset, where every node means the same there.

    By itself to opset 20: onnxruntime turns signed Q/DQ into unsigned ones while it optimises, but at opset 21 forgets
    the ``output_dtype`` of those that it moves past a Transpose or Slice, and then refuses the model. Opset 20 has no
    such attribute. What has block scales, 4- or 16-bit codes or a GroupNormalization stays where it is.

    Where an opset is asked for, ops that came later are written as those before them: axes of a Reduce and sizes of a
    Split where they were once, LayerNormalization, Gelu, HardSwish and Mish as the ops that they stand for.

    Args:
        opset: The opset.
        required: Whether it was asked for: then nodes are rewritten, and what cannot be is refused.

    Raises:
        OnnxqError: a node cannot be written there.
    """

    def __init__(self, opset: int = USUAL, *, required: bool = False) -> None:
        super().__init__()
        self.opset, self.required = opset, required

    def call(self, model: ir.Model) -> PassResult:
        """Lower the opset if every node allows it."""
        imports = model.graph.opset_imports
        current = imports.get("", 0)
        if self.required:
            model.ir_version = min(model.ir_version or IR_VERSIONS[self.opset], IR_VERSIONS[self.opset])
        if current <= self.opset:
            return PassResult(model, False)
        if self.required:
            LowerGroupNorm()(model)
            for graph in list(model.graphs()):
                for node in list(graph):
                    _drop_defaults(node, current, self.opset)
                    if not reads_the_same(node, current, self.opset) and node.op_type in OLDER_FORMS:
                        OLDER_FORMS[node.op_type](graph, node)
        left = [node for node in model.graph.all_nodes() if not reads_the_same(node, current, self.opset)]
        if left and not self.required:
            return PassResult(model, False)
        if left:
            least = next(o for o in range(self.opset, current + 1) if all(reads_the_same(n, current, o) for n in left))
            further = f" and {len(left) - 1} others" if len(left) > 1 else ""
            raise OnnxqError(
                f"expected a model that opset {self.opset} can express, found the {left[0].op_type} "
                f"{left[0].name!r}{further}, which need opset {least}",
                hint=f"take --opset {least}, or a runtime that reads it",
            )
        imports[""] = self.opset
        return PassResult(model, True)


def check_formats(scheme: Scheme, opset: int) -> None:
    """Refuse an opset that has no type for the codes, before anything is computed.

    Of narrower codes the target says later what holds them.

    Raises:
        OnnxqError: it came before that type.
    """
    for part in (scheme.weights, scheme.activations):
        if not part.enabled or (part.format.storage.bitwidth < 8 and not part.format.is_float):
            continue
        least = next(o for o in range(OLDEST, NEWEST + 1) if _holds(part.format.storage, o))
        if least > opset:
            raise OnnxqError(
                f"expected codes that opset {opset} has, found {part.format.name}, which needs opset {least}",
                hint=f"take --opset {least}, or int8",
            )


def _holds(storage: ir.DataType, opset: int) -> bool:
    return f"tensor({storage.name.lower()})" in onnx.defs.get_schema("DequantizeLinear", opset).inputs[0].types


def reads_the_same(node: ir.Node, current: int, older: int) -> bool:
    """Whether a node of one opset means the same at an older one, by ONNX's own schemas of the op."""
    if node.domain not in graphs.ONNX_DOMAINS or not onnx.defs.has(node.op_type):
        return True
    now, then = (_schema(node.op_type, opset) for opset in (current, older))
    if now is None or then is None:
        return False
    if now.since_version == then.since_version:
        return True
    if CHANGED.get(node.op_type, 0) > older:
        return False
    return _has_attributes(node, now, then, older) and all(
        _has_types(values, parameters)
        for values, parameters in ((node.inputs, then.inputs), (node.outputs, then.outputs))
    )


@functools.cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None


def _drop_defaults(node: ir.Node, current: int, older: int) -> None:
    """Leave out attributes that came later, where they say what is meant without them."""
    now, then = (_schema(node.op_type, opset) for opset in (current, older))
    if node.domain not in graphs.ONNX_DOMAINS or now is None or then is None:
        return
    for name, given in list(node.attributes.items()):
        if name in now.attributes and name not in then.attributes and _is_default(given, now.attributes[name]):
            node.attributes.pop(name)


def _is_default(given: ir.Attr, attribute: onnx.defs.OpSchema.Attribute) -> bool:
    proto = ir.to_proto(given)
    proto.ClearField("doc_string")
    return bool(proto.SerializeToString() == attribute.default_value.SerializeToString())


def _has_attributes(node: ir.Node, now: onnx.defs.OpSchema, then: onnx.defs.OpSchema, older: int) -> bool:
    """Whether the older schema knows every attribute, those that are left out with the same default."""
    for name, attribute in now.attributes.items():
        given = node.attributes.get(name)
        if given is not None and NEW_CHOICES.get((node.op_type, name, str(given.value)), 0) > older:
            return False
        if name not in then.attributes:
            if given is not None:
                return False
        elif given is None:
            defaults = {one.default_value.SerializeToString() for one in (attribute, then.attributes[name])}
            if len(defaults) > 1:
                return False
    return True


def _has_types(values: Sequence[ir.Value | None], parameters: Sequence[onnx.defs.OpSchema.FormalParameter]) -> bool:
    """Whether a schema has a place for each value, and takes its type there."""
    for index, value in enumerate(values):
        if value is None:
            continue
        is_variadic = bool(parameters) and parameters[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
        if index >= len(parameters) and not is_variadic:
            return False
        known = value.dtype is not None and graphs.is_tensor(value)
        allowed = parameters[min(index, len(parameters) - 1)].types
        if known and value.dtype is not None and f"tensor({value.dtype.name.lower()})" not in allowed:
            return False
    return True
