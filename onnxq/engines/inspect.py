"""Which compiled layer ran each ONNX node, in which number format, and whether the graph had promised that.

Two readings are compared:

* the graph: a Conv, ConvTranspose, Gemm or MatMul whose two inputs come from DequantizeLinear asks for integer
  (or FP8) arithmetic; one whose weight alone does asks for a small weight;
* the compiler's own list of layers, which it logs when it has finished, with the types of what each layer reads and
  the ONNX nodes that it stands for.

The proof is about structure, not speed: it shows that a layer reads and multiplies low-precision operands. It cannot
show which kernel a GPU will choose for that layer, nor what happens inside an attention kernel between its two
products, and a node inside a local function is not looked at. Where the list is silent about a node, the node counts
as float.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes

LOW_PRECISION = frozenset({"int8", "fp8", "int4", "fp4"})

# What keeps a promise when it stands between DequantizeLinear and the product: it moves codes, it does not change them.
MOVES = ("Transpose", "Reshape", "Slice", "MaxPool", "Pad", "Identity", "Flatten", "Squeeze", "Unsqueeze")

# Kinds of compiled layers that multiply matrices; what else names a node only prepares or finishes its work.
_PRODUCT = re.compile(r"correlation|conv|gemm|matmul|matrixmultiply|fullyconnected|fusion|mha|attention", re.IGNORECASE)

_TYPES = {
    "int8": "int8",
    "fp8": "fp8",
    "int4": "int4",
    "fp4": "fp4",
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
    "uint8": "uint8",
}
_TYPE = re.compile(r"\b(BFloat16|BF16|Float|FP32|Half|FP16|Int8|FP8|Int4|FP4|Int32|Int64|Bool|UInt8)", re.IGNORECASE)
_DATATYPE = re.compile(r"Datatype: ([^,}]*)")
_WEIGHTS = re.compile(r'Weights: \{"Type": "(\w+)"')
_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), ")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\s\x1e,]*(?:\[|$))")

WishKind = Literal["product", "weight", "none"]


@dataclass(frozen=True)
class CompiledLayer:
    """One layer of a compiled engine.

    Attributes:
        name: The compiler's name for it.
        kind: The compiler's kind: ``correlation``, ``gemm``, ``kgen`` (generated pointwise code), …
        input_types: Number formats of what it reads from other layers: ``int8``, ``fp8``, ``float32``, …
        weight_types: Number formats of its constants; the weight is the first one.
        output_types: Number formats of what it writes.
        nodes: The ONNX nodes that it stands for.
    """

    name: str
    kind: str
    input_types: tuple[str, ...]
    weight_types: tuple[str, ...]
    output_types: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def is_product(self) -> bool:
        """Whether this layer multiplies matrices (or convolves)."""
        return bool(_PRODUCT.search(self.kind)) or self.is_attention

    @property
    def is_attention(self) -> bool:
        """Whether this layer is a whole attention: two products with a softmax between them."""
        return "mha" in self.name

    @property
    def is_low_precision(self) -> bool:
        """Whether both operands of the product are low precision."""
        read = sum(name in LOW_PRECISION for name in self.input_types)
        held = sum(name in LOW_PRECISION for name in self.weight_types)
        return self.is_product and read >= 1 and read + held >= 2


@dataclass(frozen=True)
class Wish:
    """What the graph asks of one Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        node: The node's name, as the compiler knows it.
        kind: ``product`` (both inputs quantized), ``weight`` (only a constant one) or ``none``.
        dequantize: The DequantizeLinear of a quantized constant input.
    """

    node: str
    kind: WishKind
    dequantize: str = ""


@dataclass(frozen=True)
class Proof:
    """What became of the graph's wishes. The first three lists together are all weighted nodes.

    Attributes:
        low_precision_nodes: Their product runs in INT8, FP8, INT4 or FP4.
        weight_only_nodes: Float arithmetic on a weight that the engine holds in low precision, as the graph asks.
        float_nodes: All others.
        promised_but_float: Of those, the ones that the graph wanted quantized.
    """

    low_precision_nodes: tuple[str, ...]
    weight_only_nodes: tuple[str, ...]
    float_nodes: tuple[str, ...]
    promised_but_float: tuple[str, ...]


def wishes(model: ir.Model) -> list[Wish]:
    """What each weighted node of ``model`` asks for, subgraphs included, in graph order."""
    return [_wish(node) for graph in model.graphs() for node in graph if graphs.is_op(node, *layer_nodes.WEIGHTED_OPS)]


def _wish(node: ir.Node) -> Wish:
    sources = [_dequantize(value) for value in node.inputs[:2]]
    constant = next((source for source in sources if source is not None and _is_stored(source)), None)
    dequantize = "" if constant is None else node_name(constant)
    kind: WishKind = "none"
    if len(sources) == 2 and all(source is not None for source in sources):
        kind = "product"
    elif constant is not None:
        kind = "weight"
    return Wish(node_name(node), kind, dequantize)


def node_name(node: ir.Node) -> str:
    """The node's name, or the one that TensorRT's parser gives to a nameless node."""
    return node.name or f"node_of_{node.outputs[0].name}"


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that ``value`` comes from, through ops that only move codes."""
    node = None if value is None else value.producer()
    while node is not None and graphs.is_op(node, *MOVES):
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node if graphs.is_dequantize(node) else None


def _is_stored(dequantize: ir.Node) -> bool:
    """Whether what is dequantized is known when the engine is built."""
    value = dequantize.inputs[0]
    while value is not None and not graphs.is_constant(value):
        node = value.producer()
        if graphs.is_op(node, "Constant"):
            return True
        if node is None or not graphs.is_op(node, "QuantizeLinear", *MOVES):
            return False
        value = node.inputs[0]
    return value is not None


def prove(asked: Sequence[Wish], layers: Sequence[CompiledLayer]) -> Proof:
    """Compare what the graph asks for with what the compiler made of it."""
    by_node: dict[str, list[CompiledLayer]] = {}
    for layer in layers:
        for name in layer.nodes:
            by_node.setdefault(name, []).append(layer)
    low, weight_only, floating, broken = [], [], [], []
    for wish in asked:
        products = [layer for layer in by_node.get(wish.node, ()) if layer.is_product]
        if products and all(_is_proof(layer, wish) for layer in products):
            low.append(wish.node)
        elif wish.kind == "weight" and _holds_small_weight(wish, by_node):
            weight_only.append(wish.node)
        else:
            floating.append(wish.node)
            if wish.kind != "none":
                broken.append(wish.node)
    return Proof(tuple(low), tuple(weight_only), tuple(floating), tuple(broken))


def _is_proof(layer: CompiledLayer, wish: Wish) -> bool:
    """An attention kernel may run one of its products in low precision: then only what was asked for can be it."""
    return layer.is_low_precision and (wish.kind == "product" or not layer.is_attention)


def _holds_small_weight(wish: Wish, by_node: Mapping[str, Sequence[CompiledLayer]]) -> bool:
    """Dequantized inside the product, or by a small kernel before it: the engine holds the codes either way."""
    layers = [*by_node.get(wish.node, ()), *by_node.get(wish.dequantize, ())]
    return any(name in LOW_PRECISION for layer in layers for name in layer.weight_types)


def parse_layers(log: str) -> list[CompiledLayer]:
    """The compiled layers from the list that a verbose build with detailed profiling logs under ``Layers:``.

    Both spellings are read: TensorRT-RTX's and TensorRT 11's ``Datatype: Int8`` with a ``Constants`` section, and
    TensorRT 10's ``Format/Datatype: Row major Int8 format`` with ``Weights: {"Type": "Int8", …}``.
    """
    return list(_layers(log.split("\n")))  # splitlines also breaks at the \x1e inside metadata


def _layers(lines: Sequence[str]) -> Iterator[CompiledLayer]:
    inside = False
    for line in lines:
        if line.rstrip().endswith("Layers:"):
            inside = True
        elif line.startswith(("I/O Tensors", "Bindings:")):
            inside = False
        found = _LAYER.match(line) if inside else None
        if found is None:
            continue
        body, _, metadata = line[found.end() :].partition(", Metadata: ")
        weights = _section_types(body, "Constants") + tuple(map(_type, _WEIGHTS.findall(body)))
        yield CompiledLayer(
            name=found["name"],
            kind=found["kind"],
            input_types=_section_types(body, "Inputs"),
            weight_types=weights,
            output_types=_section_types(body, "Outputs"),
            nodes=tuple(dict.fromkeys(_NODE.findall(metadata))) or _nodes_of_name(found["name"]),
        )


def _nodes_of_name(name: str) -> tuple[str, ...]:
    """Layers of TensorRT 10 may carry no metadata; their name joins those of their nodes, if it is no made-up one."""
    return () if name.startswith("__my") else tuple(name.split(" + "))


def _section_types(body: str, section: str) -> tuple[str, ...]:
    start = body.find(f"{section}: [ {{")
    if start < 0:
        return ()
    end = body.find(" }]", start)
    return tuple(_type(text) for text in _DATATYPE.findall(body[start : end if end >= 0 else None]))


def _type(text: str) -> str:
    """``int8`` from ``Int8`` or ``Row major Int8 format``; what is not known stays as it is."""
    found = _TYPE.search(text)
    return _TYPES[found[1].lower()] if found else text.strip()
