"""Write the ops that onnxruntime's optimizer fuses as the ops of the ONNX domain that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.rewriting import InPlaceOf, is_read, operand

MASK_RANKS = (1, 2, 3)
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "": (), "Relu": (), "Tanh": (), "Sigmoid": (), "LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}  # fmt: skip
"""What is fused behind a layer, and the attributes that its numbers are."""


class ExpandFusions(InPlacePass):
    """Take fused ops of onnxruntime (``com.microsoft``) apart; the function stays as it was.

    Before, as files come from ``onnxruntime.transformers.optimizer``, from optimum, or from a session's
    ``optimized_model_path``::

        x, skip ─► SkipLayerNormalization ─► y              a, b ─► FusedMatMul(alpha) ─► y
        x ─► Attention(weights, bias, mask) ─► y            x ─► BiasGelu(bias) ─► y

    After::

        x, skip ─► Add ─► LayerNormalization ─► y           a, b ─► MatMul ─► Mul(alpha) ─► y
        x ─► MatMul ─► Add ─► Split ─► MultiHeadAttention   x ─► Add(bias) ─► Gelu ─► y

    onnxruntime fuses them again when it loads the model. In between every pass knows the ops, weights inside them get
    codes, shapes are inferred through them, and TensorRT has them. A node of a form that is not known, or whose
    results for training are read, stays as it is; attention in which nothing has weights stays too (see
    :class:`onnxq.passes.expand_attention.ExpandAttention`).
    """

    def call(self, model: ir.Model) -> PassResult:
        """Expand every fusion of a known form, in the graph itself and in those inside it."""
        modified = False
        for graph in model.graphs():
            found = [node for node in graph if node.domain == graphs.ONNXRUNTIME_DOMAIN and node.op_type in EXPANSIONS]
            names = graphs.Names(graph) if found else None
            for node in found:
                made = InPlaceOf(graph, node, names)
                results = EXPANSIONS[node.op_type](made, node)
                if results is None:
                    if node.op_type == "SimplifiedLayerNormalization":
                        node.domain = ""  # where onnxruntime has it
                    continue
                made.take_over(*results)
                modified = True
        return PassResult(model, modified)


Results = tuple[ir.Value | None, ...] | None
"""What takes the place of a node's outputs; ``None``: the node stays."""


def claim_simplified_norms(model: ir.Model) -> None:
    """Move SimplifiedLayerNormalization, which onnxruntime has in ONNX's own domain, to that of its fusions."""
    for node in model.graph.all_nodes():
        if graphs.is_op(node, "SimplifiedLayerNormalization"):
            node.domain = graphs.ONNXRUNTIME_DOMAIN
            model.graph.opset_imports.setdefault(graphs.ONNXRUNTIME_DOMAIN, 1)


def _gelu(made: InPlaceOf, node: ir.Node) -> Results:
    x, bias = node.inputs[0], operand(node, 1)
    if bias is not None:
        x = made.op("sum", "Add", [x, bias])
    attributes = {"approximate": "tanh"} if node.op_type == "FastGelu" else {}
    return (made.op("gelu", "Gelu", [x], attributes),)


def _quick_gelu(made: InPlaceOf, node: ir.Node) -> Results:
    alpha = made.number("alpha", node.attributes.get_float("alpha", 1.702))
    gate = made.op("gate", "Sigmoid", [made.op("steeper", "Mul", [node.inputs[0], alpha])])
    return (made.op("gated", "Mul", [node.inputs[0], gate]),)


def _norm(
    made: InPlaceOf, node: ir.Node, x: ir.Value | None, scale: ir.Value | None, bias: ir.Value | None
) -> ir.Value:
    """A LayerNormalization over the last axis, or by the root mean square alone."""
    epsilon = node.attributes.get_float("epsilon", 1e-12 if node.op_type.startswith(("Skip", "Embed")) else 1e-5)
    if "Simplified" not in node.op_type:
        inputs = [x, scale] if bias is None else [x, scale, bias]
        return made.op("norm", "LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon})
    kind = made.dtype
    if kind.bitwidth < 32:  # squares leave float16 early
        x, made.dtype = made.as_type("x", x, ir.DataType.FLOAT), ir.DataType.FLOAT  # type: ignore[arg-type]
    square = made.op("square", "Pow", [x, made.number("two", 2)])
    mean = made.op("mean", "ReduceMean", [square, made.integers("last", [-1])], {"keepdims": 1})
    root = made.op("root", "Sqrt", [made.op("above_zero", "Add", [mean, made.number("epsilon", epsilon)])])
    normal = made.op("normal", "Div", [x, root])
    if kind != made.dtype:
        normal, made.dtype = made.as_type("y", normal, kind), kind
    return made.op("scaled", "Mul", [normal, scale])


def _simplified_norm(made: InPlaceOf, node: ir.Node) -> Results:
    rank, axis = graphs.rank(node.inputs[0]), node.attributes.get_int("axis", -1)  # type: ignore[arg-type]
    if is_read(node, 1) or (axis != -1 and (rank is None or axis != rank - 1)):
        return None
    return (_norm(made, node, node.inputs[0], node.inputs[1], None),)


def _skip_norm(made: InPlaceOf, node: ir.Node) -> Results:
    if is_read(node, 1) or is_read(node, 2):
        return None
    simplified = "Simplified" in node.op_type
    total = made.op("sum", "Add", list(node.inputs[:2]))
    bias = operand(node, 3 if simplified else 4)
    if bias is not None:
        total = made.op("sum_with_bias", "Add", [total, bias])
    norm = _norm(made, node, total, node.inputs[2], None if simplified else operand(node, 3))
    return norm, None, None, total if is_read(node, 3) else None


def _embedding(made: InPlaceOf, node: ir.Node) -> Results:
    tokens, segments, words, positions, segment_words, scale, bias = node.inputs[:7]
    mask, indices = operand(node, 7), operand(node, 8)
    if is_read(node, 1) and mask is None:
        return None
    if words is not None and words.dtype is not None:
        made.dtype = words.dtype
    found = made.op("words", "Gather", [words, tokens])
    if indices is None:
        length = made.op("length", "Shape", [tokens], {"start": 1, "end": 2})
        ends = [made.integers("start", [0]), length, made.integers("axis", [0])]
        where = made.op("positions", "Slice", [positions, *ends])
    else:
        where = made.op("positions", "Gather", [positions, indices])
    total = made.op("sum", "Add", [found, where])
    if segments is not None:
        total = made.op("with_segments", "Add", [total, made.op("segments", "Gather", [segment_words, segments])])
    lengths = None
    if is_read(node, 1):
        lengths = made.op("lengths", "ReduceSum", [mask, made.integers("tokens", [1])], {"keepdims": 0})
    return _norm(made, node, total, scale, bias), lengths, total if is_read(node, 2) else None


def _matmul(made: InPlaceOf, node: ir.Node) -> Results:
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        return None
    flipped = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
    ranks = [graphs.rank(value) for value in node.inputs[:2]]  # type: ignore[arg-type]
    if any(flip and rank is None for flip, rank in zip(flipped, ranks, strict=True)):
        return None
    operands = [
        made.op("transposed", "Transpose", [value], {"perm": [*range(rank - 2), rank - 1, rank - 2]})
        if flip and rank is not None
        else value
        for value, flip, rank in zip(node.inputs[:2], flipped, ranks, strict=True)
    ]
    product, alpha = made.op("product", "MatMul", operands), node.attributes.get_float("alpha", 1.0)
    return (product if alpha == 1 else made.op("scaled", "Mul", [product, made.number("alpha", alpha)]),)


def _activated(made: InPlaceOf, value: ir.Value, name: str, numbers: list[float]) -> ir.Value:
    if not name:
        return value
    if name == "Clip":
        return made.op("clip", "Clip", [value, *(made.number("limit", limit) for limit in numbers)])
    return made.op("activated", name, [value], dict(zip(ACTIVATIONS[name], numbers, strict=False)))


def _conv(made: InPlaceOf, node: ir.Node) -> Results:
    activation, inputs = node.attributes.get_string("activation", ""), list(node.inputs)
    if activation not in ACTIVATIONS:
        return None
    other = {"activation", "activation_params"}
    attributes = {name: attribute.value for name, attribute in node.attributes.items() if name not in other}
    value = made.op("conv", "Conv", inputs[:3], attributes)
    if len(inputs) > 3 and inputs[3] is not None:
        value = made.op("sum", "Add", [value, inputs[3]])
    return (_activated(made, value, activation, list(node.attributes.get_floats("activation_params", []))),)


def _gemm(made: InPlaceOf, node: ir.Node) -> Results:
    activation = node.attributes.get_string("activation", "")
    if activation not in ACTIVATIONS:
        return None
    own = ("alpha", "beta", "transA", "transB")
    attributes = {name: attribute.value for name, attribute in node.attributes.items() if name in own}
    value = made.op("gemm", "Gemm", list(node.inputs), attributes)
    numbers = [
        attribute.as_float()
        for name in ("activation_alpha", "activation_beta", "activation_gamma")
        if (attribute := node.attributes.get(name)) is not None
    ]
    return (_activated(made, value, activation, numbers),)


def _attention(made: InPlaceOf, node: ir.Node) -> Results:
    """The product with the weights of queries, keys and values, and the attention behind it."""
    x, weights, bias, mask, past = (operand(node, index) for index in range(5))
    sizes = node.attributes.get_ints("qkv_hidden_sizes", [])
    width = weights.shape[-1] if weights is not None and weights.shape is not None else None
    if not sizes and isinstance(width, int):
        sizes = [width // 3] * 3
    other_mask = mask is not None and (graphs.rank(mask) not in MASK_RANKS or _has_ends(mask))
    shared = node.attributes.get_int("do_rotary", 0) or node.attributes.get_int("past_present_share_buffer", 0)
    if len(sizes) != 3 or other_mask or shared or operand(node, 6) is not None:
        return None
    product = made.op("projected", "MatMul", [x, weights])
    if bias is not None:
        product = made.op("with_bias", "Add", [product, bias])
    split = made.integers("sizes", sizes)
    parts = list(made.ops("projection", "Split", [product, split], {"axis": -1}, results=3))
    cache: list[ir.Value | None] = [None, None]
    if past is not None:
        cache = [made.op("past", "Gather", [past, made.integers("which", which)]) for which in range(2)]
    kept = ("num_heads", "scale", "mask_filter_value", "unidirectional")
    attributes = {name: attribute.value for name, attribute in node.attributes.items() if name in kept}
    inputs = [*parts, None, mask, operand(node, 5), *cache]
    while inputs[-1] is None:
        inputs.pop()
    results = 3 if is_read(node, 1) else 1
    found = made.ops("heads", "MultiHeadAttention", inputs, attributes, results, domain=graphs.ONNXRUNTIME_DOMAIN)
    if results == 1:
        return (found[0],)
    halves = [made.op("half", "Unsqueeze", [half, made.integers("first", [0])]) for half in found[1:]]
    return found[0], made.op("present", "Concat", halves, {"axis": 0})


def _has_ends(mask: ir.Value) -> bool:
    """Whether a mask of one axis may have other than one length for each sample."""
    if graphs.rank(mask) != 1:
        return False
    producer = mask.producer()
    return producer is None or not graphs.is_op(producer, "ReduceSum")


EXPANSIONS: dict[str, Callable[[InPlaceOf, ir.Node], Results]] = {
    "Gelu": _gelu, "FastGelu": _gelu, "BiasGelu": _gelu, "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _simplified_norm, "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm, "EmbedLayerNormalization": _embedding, "FusedMatMul": _matmul,
    "FusedConv": _conv, "FusedGemm": _gemm, "Attention": _attention,
}  # fmt: skip
