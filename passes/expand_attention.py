"""Write onnxruntime's attention with caches, masks and rotary positions as ops of the ONNX domain."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import array_of
from onnxq.passes.decompose_attention import WrittenAttention
from onnxq.rewriting import InPlaceOf, is_read, operand


class ExpandAttention(InPlacePass):
    """Take MultiHeadAttention, GroupQueryAttention and RotaryEmbedding of ``com.microsoft`` apart.

    Before::

        q, k, v, mask, past ─► MultiHeadAttention ─► y, present

    After::

        present = Concat(past, k);  y = MatMul(Softmax(MatMul(q, Transpose(present)) * scale + mask), ...)

    For TensorRT, which has no op of that domain, and for torch. onnxruntime keeps them: they have no weights, and their
    kernels neither repeat shared heads nor copy caches.

    Departures: what is masked gets the lowest finite number, where onnxruntime leaves the key out; a cache grows by
    what is new, also where onnxruntime would write into a larger one (``past_present_share_buffer``), and holds the
    same number of tokens for each sample of a batch. A node with a form besides these stays as it is: packed or ragged
    batches, sinks, quantized caches, and heads whose size is not known.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Expand every node of a known form, in the graph's order."""
        found = [node for node in model.graph if layer_nodes.is_fused_attention(node)]
        names, modified = graphs.Names(model.graph) if found else None, False
        for node in found:
            made = InPlaceOf(model.graph, node, names)
            if EXPANSIONS[node.op_type](made, node):
                modified = True
        return PassResult(model, modified)


def with_attention_apart(model: ir.Model) -> ir.Model:
    """The model, or, if it has such attention, a copy without, in which all values keep their names."""
    if not any(layer_nodes.is_fused_attention(node) for node in model.graph):
        return model
    copy = model.clone()
    return copy if ExpandAttention()(copy).modified else model


def _width(value: ir.Value | None) -> int | None:
    """The size of the last axis, also where shape inference did not arrive: behind layers and sums of constants."""
    for _ in range(8):
        if value is None:
            return None
        if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
            return value.shape[-1]
        node = value.producer()
        if graphs.is_op(node, "Split") and node is not None and graphs.is_constant(operand(node, 1)):
            return int(array_of(operand(node, 1))[value.index() or 0])
        if graphs.is_op(node, "Add", "MatMul") and node is not None:
            value = next((other for other in node.inputs if other is not None and graphs.is_constant(other)), None)
        elif node is not None and layer_nodes.is_fused_attention(node) and node.op_type == "RotaryEmbedding":
            value = node.inputs[0]
        else:
            return None
    return None


def _multi_head(made: InPlaceOf, node: ir.Node) -> bool:
    q, k, v, bias, mask, added, past_k, past_v = (operand(node, index) for index in range(8))
    heads, width = node.attributes.get_int("num_heads", 0), _width(q)
    others = [operand(node, index) for index in range(8, len(node.inputs))]
    three = graphs.rank(q) in (3, None) and graphs.rank(k or q) in (3, 4, None)  # type: ignore[arg-type]
    if any(value is not None for value in others) or is_read(node, 3) or not three or v is None or k is None:
        return False
    if not heads or width is None or width % heads or (mask is not None and graphs.rank(mask) not in (1, 2, 3)):
        return False
    if bias is not None and (bias.shape is None or not isinstance(bias.shape[0], int)):
        return False
    written = WrittenAttention(made, heads, heads, width // heads)
    if bias is not None and bias.shape is not None:
        sizes = made.integers("bias_sizes", [width, width, int(str(bias.shape[0])) - 2 * width])
        parts = made.ops("biases", "Split", [bias, sizes], {"axis": 0}, results=3)
        sums = (made.op("with_bias", "Add", [value, part]) for value, part in zip((q, k, v), parts, strict=True))
        q, k, v = sums
    q = written.in_heads(q, heads)  # type: ignore[arg-type]
    if graphs.rank(k) != 4:
        k, v = written.in_heads(k, heads), written.in_heads(v, heads)
    k, v = written.with_past(k, v, past_k, past_v)
    masks = [added] if added is not None else []
    if mask is not None:
        masks.append(_padding(made, mask, k, node.attributes.get_float("mask_filter_value", -10000.0)))
    if node.attributes.get_int("unidirectional", 0):
        masks.append(written.causal_mask(q, k, past_k))
    mixed = written.attend(q, k, v, masks, scale=node.attributes.get_float("scale", 0.0))
    made.take_over(written.joined(mixed), k if is_read(node, 1) else None, v if is_read(node, 2) else None)
    return True


def _count(made: InPlaceOf, value: ir.Value) -> ir.Value:
    """How many tokens a value in heads has."""
    return made.op("count", "Squeeze", [made.op("size", "Shape", [value], {"start": 2, "end": 3})])


def _numbers(made: InPlaceOf, value: ir.Value) -> ir.Value:
    """The numbers of the tokens of a value in heads, from 0."""
    return made.op("numbers", "Range", [made.integers("zero", 0), _count(made, value), made.integers("one", 1)])


def _padding(made: InPlaceOf, mask: ir.Value, k: ir.Value, hidden: float) -> ir.Value:
    """What is added to scores: nothing where the mask has ones, or where keys are below its lengths."""
    rank = graphs.rank(mask)
    if rank == 1:
        lengths = made.op("lengths", "Unsqueeze", [_whole(made, mask), made.integers("behind", [1])])
        seen, axes = made.op("seen_keys", "Less", [_numbers(made, k), lengths]), [1, 2]
    else:
        seen, axes = made.as_type("seen_keys", mask, ir.DataType.BOOL), [1, 2] if rank == 2 else [1]
    added = made.op("hidden", "Where", [seen, made.number("nothing", 0.0), made.number("hidden_by", hidden)])
    return made.op("hidden_keys", "Unsqueeze", [added, made.integers("axes", axes)])


def _whole(made: InPlaceOf, value: ir.Value) -> ir.Value:
    return made.as_type("int64", value, ir.DataType.INT64)


def _group_query(made: InPlaceOf, node: ir.Node) -> bool:
    q, k, v, past_k, past_v, lengths, _, cos, sin, positions, added = (operand(node, index) for index in range(11))
    attributes = node.attributes
    queries, keys = attributes.get_int("num_heads", 0), attributes.get_int("kv_num_heads", 0)
    size, width = _width(past_k), _width(q)
    if size is None and width is not None and queries and keys:
        size = width // (queries + 2 * keys if k is None else queries)
    other = [operand(node, index) for index in range(11, len(node.inputs))]
    special = any(attributes.get_int(name, 0) for name in ("smooth_softmax", "qk_output"))
    if any(value is not None for value in other) or special or is_read(node, 3):
        return False
    if q is None or lengths is None or not size or not queries or not keys or queries % keys:
        return False
    rotary = bool(attributes.get_int("do_rotary", 0))
    if rotary and (cos is None or sin is None or _width(cos) is None):
        return False
    if k is None or v is None:
        sizes = made.integers("sizes", [queries * size, keys * size, keys * size])
        q, k, v = made.ops("part", "Split", [q, sizes], {"axis": -1}, results=3)
    written = WrittenAttention(made, queries, keys, size)
    q, k, v = (written.in_heads(value, count) for value, count in ((q, queries), (k, keys), (v, keys)))
    last = _whole(made, lengths)
    if graphs.rank(lengths) != 1:
        last = made.op("lasts", "Reshape", [last, made.integers("flat", [-1])])
    everything = made.op("all", "Add", [last, made.integers("one", 1)])
    before = made.op("before", "Sub", [everything, _count(made, q)])  # tokens in the cache
    column = made.op("before_column", "Unsqueeze", [before, made.integers("behind", [1])])
    own = made.op("places", "Add", [column, _numbers(made, q)])
    if rotary and cos is not None and sin is not None:
        angles = own if positions is None else positions
        interleaved = bool(attributes.get_int("rotary_interleaved", 0))
        q = _turned(made, "q", q, cos, sin, angles, size, interleaved)
        k = _turned(made, "k", k, cos, sin, angles, size, interleaved)
    k, v = written.with_past(k, v, past_k, past_v)
    numbers = _numbers(made, k)
    column = made.op("places_column", "Unsqueeze", [own, made.integers("column", [1, 3])])
    seen = made.op("seen", "LessOrEqual", [numbers, column])
    window = attributes.get_int("local_window_size", -1)
    if window > 0:
        first = made.op("first_seen", "Sub", [column, made.integers("window", window)])
        seen = made.op("in_window", "And", [seen, made.op("near", "Greater", [numbers, first])])
    seen.type = ir.TensorType(ir.DataType.BOOL)
    masks = [seen] if added is None else [added, seen]
    scale, softcap = attributes.get_float("scale", 0.0), attributes.get_float("softcap", 0.0)
    mixed = written.attend(q, k, v, masks, scale=scale, softcap=softcap)
    made.take_over(written.joined(mixed), k if is_read(node, 1) else None, v if is_read(node, 2) else None)
    return True


def _rotary(made: InPlaceOf, node: ir.Node) -> bool:
    x, positions, cos, sin = node.inputs[:4]
    rank, heads = graphs.rank(x), node.attributes.get_int("num_heads", 0)  # type: ignore[arg-type]
    partly = node.attributes.get_int("rotary_embedding_dim", 0)
    width, half = _width(x), _width(cos)
    scale = node.attributes.get_float("scale", 1.0)
    packed = node.attributes.get_int("is_packed_batching", 0)
    if x is None or positions is None or cos is None or sin is None or half is None or packed or scale != 1:
        return False
    flat = rank == 3 or (rank is None and heads > 0)
    if flat and not heads and (width is None or partly):
        return False
    if flat:
        heads = heads or width // (2 * half)  # type: ignore[operator]
    size = width if not flat else width // heads if width is not None else None
    if (not flat and rank != 4) or size is None:
        return False
    written = WrittenAttention(made, heads, heads, size)
    value = written.in_heads(x, heads) if flat else x
    if graphs.rank(positions) != 2:  # one number: where the first token stands
        sums = made.op("places", "Add", [_whole(made, positions), _numbers(made, value)])
        positions = made.op("row", "Unsqueeze", [sums, made.integers("first", [0])])
    interleaved = bool(node.attributes.get_int("interleaved", 0))
    turned = _turned(made, "x", value, cos, sin, positions, size, interleaved)
    made.take_over(written.joined(turned) if flat else turned)
    return True


def _turned(
    made: InPlaceOf,
    name: str,
    x: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    places: ir.Value,
    size: int,
    interleaved: bool,
) -> ir.Value:
    """Rotary positions: pairs of numbers in a head turn by an angle that grows with the token's place.

    Args:
        made: Where the ops go.
        name: A name for them.
        x: ``(samples, heads, tokens, size)``.
        cos: Of the angles: ``(places, pairs)``; twice as many pairs as that turn, the rest of a head stays.
        sin: As ``cos``.
        places: ``(samples or 1, tokens)``.
        size: Numbers in a head.
        interleaved: Whether pairs are neighbours; otherwise halves of what turns.
    """
    pairs = _width(cos) or 0
    axis = made.integers("heads_axis", [1])
    angles = []
    for label, table in (("cos", cos), ("sin", sin)):
        rows = made.op(f"{name}_{label}_rows", "Gather", [table, places])
        angles.append(made.op(f"{name}_{label}", "Unsqueeze", [rows, axis]))
    rest = None
    if 2 * pairs < size:
        parts = made.integers(f"{name}_turning", [2 * pairs, size - 2 * pairs])
        x, rest = made.ops(f"{name}_part", "Split", [x, parts], {"axis": -1}, results=2)
    if interleaved:
        cut = made.integers("cut_in_pairs", [0, 0, 0, pairs, 2])
        apart = made.op(f"{name}_in_pairs", "Reshape", [x, cut])
        zero, one = made.integers("first_of_pair", 0), made.integers("second_of_pair", 1)
        first, second = (
            made.op(f"{name}_{label}", "Gather", [apart, index], {"axis": 4})
            for label, index in (("first", zero), ("second", one))
        )
    else:
        first, second = made.ops(f"{name}_half", "Split", [x], {"axis": -1, "num_outputs": 2}, results=2)

    def turned(label: str, op_type: str, values: tuple[ir.Value, ir.Value]) -> ir.Value:
        products = [
            made.op(f"{name}_{label}_product", "Mul", [value, angle])
            for value, angle in zip(values, angles, strict=True)
        ]
        return made.op(f"{name}_{label}_turned", op_type, products)

    results = [turned("first", "Sub", (first, second)), turned("second", "Add", (second, first))]
    if interleaved:
        last = made.integers("last_axis", [-1])
        columns = [made.op(f"{name}_column", "Unsqueeze", [value, last]) for value in results]
        pairs_again = made.op(f"{name}_pairs", "Concat", columns, {"axis": -1})
        whole = made.op(f"{name}_whole", "Reshape", [pairs_again, made.integers("joined_pairs", [0, 0, 0, 2 * pairs])])
        return whole if rest is None else made.op(f"{name}_with_rest", "Concat", [whole, rest], {"axis": -1})
    return made.op(f"{name}_whole", "Concat", results if rest is None else [*results, rest], {"axis": -1})


EXPANSIONS = {"MultiHeadAttention": _multi_head, "GroupQueryAttention": _group_query, "RotaryEmbedding": _rotary}
