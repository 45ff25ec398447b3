"""Write an Attention node as the two products and the Softmax that it stands for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.folding import new_initializer

Array = np.ndarray[Any, Any]


class DecomposeAttention(InPlacePass):
    """Take Attention (opset 23) apart, so that its products can be quantized.

    Before::

        y = Attention(q, k, v, mask)

    After, with heads cut out of the last axis where there are three, and shared heads of k and v repeated::

        y = MatMul(Softmax(MatMul(q, Transpose(k)) * scale + mask), v)

    What is masked gets the lowest finite number, so that a row in which nothing may be seen, as in padding, is the mean
    of all values and not NaN. A node with a cache, a soft cap, unknown numbers of heads, or whose scores are an output
    stays as it is.

    Args:
        keep: Names of nodes to leave.
    """

    def __init__(self, keep: Collection[str] = ()) -> None:
        super().__init__()
        self.keep = set(keep)

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every Attention that is not kept."""
        modified = False
        for node in list(model.graph):
            if graphs.is_op(node, "Attention") and node.name not in self.keep and (heads := _heads(node)) is not None:
                _Decomposition(model.graph, node, *heads).write()
                modified = True
        return PassResult(model, modified)


def _heads(node: ir.Node) -> tuple[int, int, int] | None:
    """Heads of the queries and of the keys, and the size of one; ``None`` for a form that is left alone."""
    inputs, attributes = list(node.inputs), node.attributes
    if any(value is not None for value in inputs[4:]) or len([out for out in node.outputs if out.uses()]) > 1:
        return None
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return None
    if attributes.get_float("softcap", 0.0) or len(inputs) < 3 or any(value is None for value in inputs[:3]):
        return None
    shapes = [value.shape for value in inputs[:3] if value is not None]
    if any(shape is None or len(shape) != len(shapes[0] or ()) for shape in shapes):
        return None
    query, key = shapes[0], shapes[1]
    assert query is not None and key is not None
    queries, keys, size = attributes.get_int("q_num_heads", 0), attributes.get_int("kv_num_heads", 0), 0
    if len(query) == 4:
        queries, keys, size = (known if isinstance(known, int) else 0 for known in (query[1], key[1], query[3]))
    elif len(query) == 3 and isinstance(query[2], int) and queries:
        size = query[2] // queries
    if not queries or not keys or not size or queries % keys:
        return None
    return queries, keys, size


class _Decomposition:
    """The nodes that one Attention becomes."""

    def __init__(self, graph: ir.Graph, node: ir.Node, queries: int, keys: int, size: int) -> None:
        self.graph, self.node = graph, node
        self.queries, self.keys, self.size = queries, keys, size
        self.dtype = node.inputs[0].dtype if node.inputs[0] is not None and node.inputs[0].dtype else ir.DataType.FLOAT
        self.tape = ir.tape.Tape()

    def write(self) -> None:
        """Replace the node."""
        node, three = self.node, graphs.rank(self.node.inputs[0]) == 3  # type: ignore[arg-type]
        q, k, v = (self._in_heads(value, count, three) for value, count in self._operands())
        k, v = self._repeated(k), self._repeated(v)
        scores = self._op("scores", "MatMul", [q, self._op("keys", "Transpose", [k], {"perm": [0, 1, 3, 2]})])
        scale = node.attributes.get_float("scale", 0.0) or self.size**-0.5
        scores = self._op("scaled", "Mul", [scores, self._constant("scale", np.asarray(scale))])
        shares = self._op("shares", "Softmax", [self._masked(scores, q, k)], {"axis": -1})
        mixed = self._op("mixed", "MatMul", [shares, v])
        if three:
            mixed = self._op("tokens", "Transpose", [mixed], {"perm": [0, 2, 1, 3]})
            mixed = self._op("joined", "Reshape", [mixed, self._integers("joined_shape", [0, 0, -1])])
        output = node.outputs[0]
        mixed.type, mixed.shape = output.type, output.shape
        self.graph.insert_before(node, self.tape.nodes)
        ir.convenience.replace_all_uses_with(output, mixed, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        mixed.name = output.name

    def _operands(self) -> list[tuple[ir.Value, int]]:
        q, k, v = self.node.inputs[:3]
        assert q is not None and k is not None and v is not None
        return [(q, self.queries), (k, self.keys), (v, self.keys)]

    def _in_heads(self, value: ir.Value, heads: int, three: bool) -> ir.Value:
        if not three:
            return value
        cut = self._op(
            f"{value.name}_cut", "Reshape", [value, self._integers(f"{value.name}_cut_shape", [0, 0, heads, -1])]
        )
        return self._op(f"{value.name}_heads", "Transpose", [cut], {"perm": [0, 2, 1, 3]})

    def _repeated(self, value: ir.Value) -> ir.Value:
        """Each shared head as often as queries read it."""
        times = self.queries // self.keys
        if times == 1:
            return value
        apart = self._op(f"{value.name}_apart", "Unsqueeze", [value, self._integers("apart_axis", [2])])
        wide = self._op(f"{value.name}_wide", "Expand", [apart, self._integers("times", [1, 1, times, 1, 1])])
        shape = self._integers("repeated_shape", [0, self.queries, -1, self.size])
        return self._op(f"{value.name}_repeated", "Reshape", [wide, shape])

    def _masked(self, scores: ir.Value, q: ir.Value, k: ir.Value) -> ir.Value:
        lowest = self._constant("lowest", np.asarray(np.finfo(self.dtype.numpy()).min))
        mask = self.node.inputs[3] if len(self.node.inputs) > 3 else None
        if mask is not None and mask.dtype == ir.DataType.BOOL:
            scores = self._op("masked", "Where", [mask, scores, lowest])
        elif mask is not None:
            scores = self._op("masked", "Add", [scores, mask])
        if self.node.attributes.get_int("is_causal", 0):
            sizes = [
                self._op(f"{name}_size", "Shape", [value], {"start": 2, "end": 3})
                for name, value in (("q", q), ("k", k))
            ]
            square = self._op("square", "Concat", sizes, {"axis": 0})
            seen = self._op("all", "Expand", [self._constant("true", np.asarray(1)), square])
            seen = self._op("seen", "Trilu", [seen], {"upper": 0})
            seen = self._op("is_seen", "Cast", [seen], {"to": ir.DataType.BOOL})
            scores = self._op("causal", "Where", [seen, scores, lowest])
        return scores

    def _op(self, name: str, op: str, inputs: list[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Value:
        output = self.tape.op(op, inputs, attributes)
        self.tape.nodes[-1].name = output.name = f"{self.node.name}_{name}"
        return output

    def _constant(self, name: str, array: Array) -> ir.Value:
        return new_initializer(self.graph, f"{self.node.name}_{name}", array.astype(self.dtype.numpy()), self.dtype)

    def _integers(self, name: str, numbers: list[int]) -> ir.Value:
        return new_initializer(self.graph, f"{self.node.name}_{name}", np.asarray(numbers), ir.DataType.INT64)
