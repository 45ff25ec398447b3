"""Change the type that a model computes in; its inputs and outputs stay as they are, unless told otherwise."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import array_of

Array = np.ndarray[Any, Any]

# Inputs that are float32 whatever the others are.
FLOAT32_INPUTS = {"Resize": (1, 2), "Upsample": (1,), "NonMaxSuppression": (1, 3, 4)}
CASTING = {"Cast": "to", "RandomNormalLike": "dtype", "RandomUniformLike": "dtype", "EyeLike": "dtype"}
SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class ChangePrecision(InPlacePass):
    """Let a float32 model compute in float16, or the other way round.

    Before::

        x float32 ─► node ─► y float32

    After::

        x float32 ─► Cast ─► node, in float16 ─► Cast ─► y float32

    Constants become the nearest finite numbers; one that is not zero stays so, because others divide by it. Scales of
    Q/DQ change with the rest: codes have to be written after this, or they would belong to other scales. Models with
    If, Loop or Scan are left alone.

    Args:
        source: The type to leave.
        target: The type to change to.
        keep: Names of nodes that stay as they are, a Cast before and behind them.
        outside: Whether inputs and outputs change too.
    """

    def __init__(
        self, source: ir.DataType, target: ir.DataType, keep: Collection[str] = (), *, outside: bool = False
    ) -> None:
        super().__init__()
        self.source, self.target, self.keep, self.outside = source, target, set(keep), outside

    def call(self, model: ir.Model) -> PassResult:
        """Change every value."""
        graph = model.graph
        nodes = list(graph)
        if any(attribute.type in SUBGRAPHS for node in nodes for attribute in node.attributes.values()):
            return PassResult(model, False)
        inner = [value for node in nodes for value in node.outputs if value.dtype == self.source]
        constants = [value for value in graph.initializers.values() if value.dtype == self.source]
        given = [value for value in graph.inputs if value.dtype == self.source and not value.is_initializer()]
        if not inner and not constants and not (given and self.outside):
            return PassResult(model, False)
        for value in given:
            if self.outside:
                value.type = ir.TensorType(self.target)
            else:
                self._cast_readers(graph, value, graphs.consumers(value), self.target, before=nodes[0])
        for value in inner:
            value.type = ir.TensorType(self.target)  # a new one: values share theirs, the input with what reads it
        for value in constants:
            self._convert(graph, value)
        for node in nodes:
            self._change_attributes(node)
            for index, read in enumerate(node.inputs):
                if read is not None and read.dtype == self.target and self._reads_source(node, index):
                    self._cast_readers(graph, read, [(node, index)], self.source, before=node)
            if node.name in self.keep:
                for value in node.outputs:
                    if value.dtype == self.target:
                        value.type = ir.TensorType(self.source)
                        others = [use for use in graphs.consumers(value) if use[0].name not in self.keep]
                        self._cast_readers(graph, value, others, self.target, after=node)
        for index, value in enumerate(list(graph.outputs)):
            if value.dtype == self.target and value in inner and not self.outside:
                self._cast_output(graph, index, value)
        return PassResult(model, True)

    def _reads_source(self, node: ir.Node, index: int) -> bool:
        return node.name in self.keep or (
            self.source == ir.DataType.FLOAT and index in FLOAT32_INPUTS.get(node.op_type, ())
        )

    def _cast_readers(
        self,
        graph: ir.Graph,
        value: ir.Value,
        readers: list[tuple[ir.Node, int]],
        dtype: ir.DataType,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
    ) -> None:
        """Let some readers of a value read it in another type."""
        if not readers:
            return
        tape = ir.tape.Tape()
        cast = tape.op("Cast", [value], {"to": dtype})
        names = graphs.Names(graph)
        cast.name = tape.nodes[0].name = names.free(f"{value.name}_{dtype.name.lower()}")
        cast.dtype, cast.shape = dtype, value.shape
        if after is not None:
            graph.insert_after(after, tape.nodes)
        else:
            assert before is not None
            graph.insert_before(before, tape.nodes)
        for node, index in readers:
            node.replace_input_with(index, cast)

    def _cast_output(self, graph: ir.Graph, index: int, value: ir.Value) -> None:
        producer = value.producer()
        assert producer is not None
        tape = ir.tape.Tape()
        cast = tape.op("Cast", [value], {"to": self.source})
        name = value.name or ""
        value.name = tape.nodes[0].name = graphs.Names(graph).free(f"{name}_{self.target.name.lower()}")
        cast.name, cast.dtype, cast.shape = name, self.source, value.shape
        graph.insert_after(producer, tape.nodes)
        graph.outputs[index] = cast

    def _convert(self, graph: ir.Graph, value: ir.Value) -> None:
        """Write a constant in the other type; readers that want the first keep it."""
        uses = graphs.consumers(value)
        if uses and all(self._reads_source(node, index) for node, index in uses):
            return
        array = array_of(value)
        if any(index == 1 and (graphs.is_quantize(node) or graphs.is_dequantize(node)) for node, index in uses):
            array = np.maximum(array, ml_dtypes.finfo(self.target.numpy()).tiny)  # below, scales lose digits (rule E2)
        value.const_value = nearest(array, self.target, value.name)
        value.type = ir.TensorType(self.target)

    def _change_attributes(self, node: ir.Node) -> None:
        if node.name in self.keep:
            return
        name = CASTING.get(node.op_type, "")
        if name and node.attributes.get_int(name, 0) == self.source:
            node.attributes[name] = ir.AttrInt64(name, int(self.target))
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype == self.source:
                node.attributes["value"] = ir.AttrTensor("value", nearest(tensor.numpy(), self.target))


def nearest(array: Array, dtype: ir.DataType, name: str | None = None) -> ir.TensorProtocol:
    """The nearest finite numbers of a type; one that is not zero stays so."""
    limits = ml_dtypes.finfo(dtype.numpy())
    inside = np.clip(array, limits.min, limits.max)
    changed = np.where(np.isinf(array), array, inside).astype(dtype.numpy())
    smallest = np.copysign(limits.smallest_subnormal, array).astype(dtype.numpy())
    changed = np.where((changed == 0) & (array != 0), smallest, changed)
    return ir.Tensor(changed, dtype=dtype, name=name)
