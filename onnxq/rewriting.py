"""Make a node of a graph another one, or several, with ops before it, or give it an input of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.folding import new_initializer


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_read(node: ir.Node, index: int) -> bool:
    """Whether anything reads an output."""
    if index >= len(node.outputs):
        return False
    return bool(node.outputs[index].uses()) or node.outputs[index].is_graph_output()


class Before:
    """Ops to insert before a node, each with a result of the type and shape of the node's own.

    Args:
        graph: The node's graph.
        node: The node, which is going to read them.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self._tape, self._names = ir.tape.Tape(), graphs.Names(graph)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: float) -> ir.Value:
        """The result of a new op."""
        output, suffix = self.node.outputs[0], op_type.lower()
        made = self._tape.op(op_type, inputs, attributes, name=self._names.free(f"{self.node.name}_{suffix}"))
        made.name = self._names.free(f"{output.name}_{suffix}")
        made.type, made.shape = output.type, output.shape
        return made

    def insert(self) -> None:
        """Put the ops into the graph."""
        self.graph.insert_before(self.node, self._tape.nodes)


class InPlaceOf:
    """Ops that take the place of a node, named after it.

    Args:
        graph: The node's graph.
        node: The node.
        names: The graph's names, where many nodes are replaced.

    Attributes:
        dtype: The type of the numbers that the node computes with: that of the nearest floats before it.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, names: graphs.Names | None = None) -> None:
        self.graph, self.node = graph, node
        self.dtype = _float_type(node)
        self._names = names or graphs.Names(graph)
        self._tape = ir.tape.Tape()

    def op(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The result of a new op."""
        return self.ops(name, op_type, inputs, attributes, domain=domain)[0]

    def ops(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        results: int = 1,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """The results of a new op."""
        name = self._names.free(f"{self.node.name}_{name}")
        made = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=results, name=name, domain=domain)
        for index, value in enumerate(made):
            value.name = self._names.free(f"{name}_{index}" if results > 1 else f"{name}_result")
        return made

    def main(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        named_after: ir.Node | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The result of the op that does the node's work and gets its name, or that of another that goes with it."""
        made = self.op("main", op_type, inputs, attributes, domain)
        self._tape.nodes[-1].name = (named_after or self.node).name
        return made

    def number(self, name: str, number: float) -> ir.Value:
        """A constant of the node's own type."""
        return self._constant(name, np.asarray(number, self.dtype.numpy()), self.dtype)

    def lowest(self) -> ir.Value:
        """The lowest finite number of the node's type, which hides a score from a Softmax."""
        return self.number("lowest", float(ml_dtypes.finfo(self.dtype.numpy()).min))

    def as_type(self, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value as another type."""
        made = self.op(name, "Cast", [value], {"to": dtype})
        made.type = ir.TensorType(dtype)
        return made

    def integers(self, name: str, numbers: Sequence[int] | int) -> ir.Value:
        """A constant of whole numbers, as shapes are."""
        return self._constant(name, np.asarray(numbers, np.int64), ir.DataType.INT64)

    def _constant(self, name: str, array: np.ndarray[Any, Any], dtype: ir.DataType) -> ir.Value:
        return new_initializer(self.graph, f"{self.node.name}_{name}", array, dtype, self._names)

    def take_over(self, *results: ir.Value | None) -> None:
        """Put the ops into the graph in the node's place, with these results for its outputs, which keep their names.

        Args:
            results: One of the new ops' results for each output, or ``None`` for an output that nothing reads.
        """
        outputs = list(self.node.outputs)
        self.graph.insert_before(self.node, self._tape.nodes)
        named = [(output, result) for output, result in zip(outputs, results, strict=False) if result is not None]
        for output, result in named:
            result.type, result.shape = output.type or result.type, output.shape or result.shape
            ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        names = [output.name for output, _ in named]
        self.graph.remove(self.node, safe=True)
        for name, (_, result) in zip(names, named, strict=True):
            result.name = name


def _float_type(node: ir.Node) -> ir.DataType:
    """The type of the floats that a node reads, also where inference did not arrive."""
    seen, reached = {node}, [node]
    for current in reached:  # grows meanwhile
        for value in current.inputs:
            if value is None:
                continue
            if graphs.is_float(value) and value.dtype is not None:
                return value.dtype
            maker = value.producer()
            if maker is not None and maker not in seen:
                seen.add(maker)
                reached.append(maker)
    return ir.DataType.FLOAT


def become(node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "") -> None:
    """Make the node another op with other inputs; its outputs, name and attributes stay."""
    node.op_type, node.domain = op_type, domain
    inputs = list(inputs)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def dequantize_apart(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
) -> ir.Node:
    """Give one reader of a DequantizeLinear another one, for itself alone.

    Args:
        graph: The graph.
        node: The reader.
        index: Which of its inputs comes from the DequantizeLinear.
        inputs: What the new one reads.
        attributes: And its attributes.

    Returns:
        The new one.
    """
    shared = node.inputs[index]
    pair = None if shared is None else shared.producer()
    assert shared is not None and pair is not None
    tape = ir.tape.Tape()
    own = tape.op("DequantizeLinear", inputs, attributes, name=f"{pair.name}_{node.name}")
    own.name, own.type, own.shape = f"{shared.name}_{node.name}", shared.type, shared.shape
    tape.nodes[0].metadata_props.update(pair.metadata_props)
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(index, own)
    return tape.nodes[0]
