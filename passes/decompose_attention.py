"""Write an Attention node as the two products and the Softmax that it stands for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.rewriting import InPlaceOf, is_read, operand


class DecomposeAttention(InPlacePass):
    """Take Attention (opset 23) apart, so that its products can be quantized.

    Before::

        y = Attention(q, k, v, mask)

    After, with heads cut out of the last axis where there are three, and shared heads of k and v repeated::

        y = MatMul(Softmax(MatMul(q, Transpose(k)) * scale + mask), v)

    What is masked gets the lowest finite number, so that a row in which nothing may be seen, as in padding, is the mean
    of all values and not NaN. A node with ragged caches, windows, unknown numbers of heads, or whose scores are an
    output stays as it is.

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
                _write(model.graph, node, *heads)
                modified = True
        return PassResult(model, modified)


def _heads(node: ir.Node) -> tuple[int, int, int] | None:
    """Heads of the queries and of the keys, and the size of one; ``None`` for a form that is left alone."""
    inputs, attributes = list(node.inputs), node.attributes
    windowed = any(attributes.get_int(f"{side}_window_size", -1) >= 0 for side in ("left", "right"))
    if any(value is not None for value in inputs[6:]) or windowed or is_read(node, 3):
        return None
    if len(inputs) < 3 or any(value is None for value in inputs[:3]):
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
    values = shapes[2][-1] if shapes[2] is not None else None
    if queries != keys and values != (size if len(query) == 4 else keys * size):
        return None  # shared heads are repeated, at the size of the queries' own
    return queries, keys, size


def _write(graph: ir.Graph, node: ir.Node, queries: int, keys: int, size: int) -> None:
    """Replace one Attention."""
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None
    made = InPlaceOf(graph, node)
    written, apart = WrittenAttention(made, queries, keys, size), graphs.rank(q) == 4
    if not apart:
        q, k, v = (written.in_heads(value, count) for value, count in ((q, queries), (k, keys), (v, keys)))
    past, past_v = (operand(node, index) for index in (4, 5))
    k, v = written.with_past(k, v, past, past_v)
    masks = [mask for mask in node.inputs[3:4] if mask is not None]
    if node.attributes.get_int("is_causal", 0):
        masks.append(written.causal_mask(q, k, past))
    scale, softcap = (node.attributes.get_float(name, 0.0) for name in ("scale", "softcap"))
    mixed = written.attend(q, k, v, masks, scale=scale, softcap=softcap)
    present = [k if is_read(node, 1) else None, v if is_read(node, 2) else None]
    made.take_over(mixed if apart else written.joined(mixed), *present)


class WrittenAttention:
    """Attention written out as ops.

    Args:
        made: Where the ops go.
        queries: Heads of the queries.
        keys: Heads of keys and values, each shared by as many heads of the queries.
        size: Numbers in one head of the queries.
    """

    def __init__(self, made: InPlaceOf, queries: int, keys: int, size: int) -> None:
        self.made, self.queries, self.keys, self.size = made, queries, keys, size

    def attend(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        masks: Sequence[ir.Value],
        *,
        scale: float = 0.0,
        softcap: float = 0.0,
    ) -> ir.Value:
        """What each query gathers, of shape ``(samples, heads, queries, numbers)``, as ``q``, ``k`` and ``v`` are.

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            masks: Each says with booleans what may be seen, or is added to the scores.
            scale: What scores are multiplied with; 0: one over the root of a head's size.
            softcap: The largest score, which others come near to; 0: none.
        """
        k, v = self._repeated("k", k), self._repeated("v", v)
        scores = self.made.op("scores", "MatMul", [q, self.made.op("keys", "Transpose", [k], {"perm": [0, 1, 3, 2]})])
        scores = self.made.op("scaled", "Mul", [scores, self.made.number("scale", scale or self.size**-0.5)])
        if softcap:
            cap = self.made.number("cap", softcap)
            scores = self.made.op("bent", "Tanh", [self.made.op("by_cap", "Div", [scores, cap])])
            scores = self.made.op("capped", "Mul", [scores, cap])
        for mask in masks:
            seen = mask.dtype == ir.DataType.BOOL
            inputs = [mask, scores, self.made.lowest()] if seen else [scores, mask]
            scores = self.made.op("masked", "Where" if seen else "Add", inputs)
        return self.made.op("mixed", "MatMul", [self.made.op("shares", "Softmax", [scores], {"axis": -1}), v])

    def in_heads(self, value: ir.Value, heads: int) -> ir.Value:
        """Cut heads out of the last of three axes."""
        stem = str(value.name)
        cut = self.made.op(f"{stem}_cut", "Reshape", [value, self.made.integers(f"{stem}_cuts", [0, 0, heads, -1])])
        return self.made.op(f"{stem}_heads", "Transpose", [cut], {"perm": [0, 2, 1, 3]})

    def joined(self, mixed: ir.Value) -> ir.Value:
        """Put heads side by side again, on the last of three axes."""
        tokens = self.made.op("tokens", "Transpose", [mixed], {"perm": [0, 2, 1, 3]})
        return self.made.op("joined", "Reshape", [tokens, self.made.integers("joined_shape", [0, 0, -1])])

    def with_past(
        self, k: ir.Value, v: ir.Value, past_k: ir.Value | None, past_v: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Keys and values behind those that a cache holds, if there is one."""
        if past_k is None or past_v is None:
            return k, v
        return (
            self.made.op("present_key", "Concat", [past_k, k], {"axis": 2}),
            self.made.op("present_value", "Concat", [past_v, v], {"axis": 2}),
        )

    def causal_mask(self, q: ir.Value, k: ir.Value, past: ir.Value | None) -> ir.Value:
        """What each query may see, which is nothing behind it.

        Args:
            q: Queries in heads.
            k: Keys in heads, with those of the cache.
            past: The keys of the cache, all of which are seen.
        """
        sizes = [
            self.made.op(f"{name}_size", "Shape", [value], {"start": 2, "end": 3})
            for name, value in (("q", q), ("k", k))
        ]
        square = self.made.op("square", "Concat", sizes, {"axis": 0})
        everything: list[ir.Value | None] = [self.made.op("all", "Expand", [self.made.number("one", 1), square])]
        if past is not None:
            ahead = self.made.op("past_size", "Shape", [past], {"start": 2, "end": 3})
            everything.append(self.made.op("offset", "Squeeze", [ahead]))
        seen = self.made.op("seen", "Trilu", everything, {"upper": 0})
        return self.made.as_type("is_seen", seen, ir.DataType.BOOL)

    def _repeated(self, name: str, value: ir.Value) -> ir.Value:
        """Each shared head as often as queries read it."""
        times = self.queries // self.keys
        if times == 1:
            return value
        apart = self.made.op(f"{name}_apart", "Unsqueeze", [value, self.made.integers("apart_axis", [2])])
        counts = self.made.integers("times", [1, 1, times, 1, 1])
        wide = self.made.op(f"{name}_wide", "Expand", [apart, counts])
        shape = self.made.integers("repeated_shape", [0, self.queries, -1, self.size])
        return self.made.op(f"{name}_repeated", "Reshape", [wide, shape])
