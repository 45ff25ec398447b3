"""What TensorRT compiles, but slower or less exact than the graph could be: rules P1–P11, all warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.targets.reading import Operand, Product, Quantizer, Reading, name_of

Broken = Iterator[tuple[ir.Node, str]]
Rule = Callable[[Reading], Broken]

FP8 = ir.DataType.FLOAT8E4M3FN
EPILOGUES = ("BatchNormalization", "Relu", "Clip")  # they fuse into the product before them
INTEGER_READERS = ("Add", "Sum", "Concat", "AveragePool", "GlobalAveragePool")
NORMALISATIONS = (
    "InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization",
    "SimplifiedLayerNormalization", "Sigmoid", "Swish", "Softmax", "Gelu", "Erf", "Tanh", "Exp",
)  # fmt: skip

# Between DequantizeLinear and a product, these make the product float.
BLOCKERS = (
    "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "AveragePool",
    "GlobalAveragePool", "Resize", "Upsample", "Cast", "Mul", "Div", "Add", "Sub",
)  # fmt: skip

NARROW_CHANNELS = 16
FP8_HEADS = range(32, 257)
INT8_HEADS = (16, 32, 64)
LONGEST_INT8_ATTENTION = 512
SCALE_MARGIN = 1.5  # a softmax output is at most 1: a scale this far above 1 / largest code wastes codes


def inputs_only(reading: Reading) -> Broken:
    """P1: Q/DQ stand on the inputs of products, not on outputs that nothing quantized reads."""
    for quantizer in _pairs(reading):
        producer = _producer(quantizer)
        if not graphs.is_op(producer, *layer_nodes.WEIGHTED_OPS) or producer is None:
            continue
        if not any(reading.is_known(value) for value in producer.inputs):
            continue  # the second product of an attention may have them (P8)
        readers = list(_readers(reading, quantizer.node.outputs[0]))
        if any(graphs.is_op(reader, *EPILOGUES) for reader in readers):
            continue  # P2
        if not any(_reads_codes(reading, reader) for reader in readers):
            yield (
                quantizer.node,
                f"expected Q/DQ on inputs of products only, found them on the output of {producer.op_type} "
                f"{name_of(producer)}, which no quantized op reads",
            )


def fused_epilogue(reading: Reading) -> Broken:
    """P2: nothing is quantized between Conv, BatchNormalization and Relu, which are one kernel."""
    for quantizer in _pairs(reading):
        producer = _producer(quantizer)
        if not _is_product(producer) or producer is None:
            continue
        for reader, _ in graphs.consumers(quantizer.node.outputs[0]):
            if graphs.is_op(reader, *EPILOGUES):
                yield (
                    quantizer.node,
                    f"expected {producer.op_type} {name_of(producer)} and {reader.op_type} {name_of(reader)} to be "
                    "neighbours, found Q/DQ between them",
                )


def quantized_last(reading: Reading) -> Broken:
    """P3: between DequantizeLinear and a product stand only ops that move codes; quantize after the others."""
    for product, operand in _float_activations(reading):
        value, blocker = operand.value, None
        for _ in range(8):
            source = reading.operand(value)
            if source.quantizer is not None:
                break
            node = _origin(source)
            if node is None or not graphs.is_op(node, *BLOCKERS) or len(_varying(reading, node)) != 1:
                blocker = None
                break
            blocker, value = blocker or node, _varying(reading, node)[0]
        else:
            blocker = None
        if blocker is not None:
            yield (
                product.node,
                f"expected QuantizeLinear after {blocker.op_type} {name_of(blocker)}, found it before: "
                f"{product.node.op_type} stays float",
            )


def concat_scales(reading: Reading) -> Broken:
    """P4: a Concat read by a quantized product has one Q/DQ after it, or inputs of one scale."""
    for product, operand in _float_activations(reading):
        node = _origin(reading.operand(operand.value))
        if node is None or not graphs.is_op(node, "Concat"):
            continue
        parts = [reading.operand(value).quantizer for value in node.inputs if value is not None]
        quantized = [part for part in parts if part is not None]
        if not quantized:
            continue
        if len(quantized) < len(parts):
            yield node, f"expected Q/DQ after the Concat, found it on {len(quantized)} of {len(parts)} inputs"
        elif not all(_same_scale(part, quantized[0]) for part in quantized):
            scales = ", ".join(f"{float(part.scale.max()):.4g}" for part in quantized if part.scale is not None)
            yield (
                node,
                f"expected Q/DQ after the Concat or equal scales before it, found scales {scales}: "
                f"{product.node.op_type} {name_of(product.node)} stays float",
            )


def one_branch(reading: Reading) -> Broken:
    """P5: of a residual Add only the shortcut is quantized, so that the Add fuses into the other branch."""
    for node in reading.nodes:
        if not graphs.is_op(node, "Add") or any(reading.is_known(value) for value in node.inputs):
            continue
        branches = [reading.operand(value).quantizer for value in node.inputs if value is not None]
        producers = [_producer(reading.quantizers[source]) for source in map(_quantize_of, branches) if source]
        if len(producers) == 2 and any(_is_product(producer) for producer in producers):
            yield node, "expected Q/DQ on the shortcut of the Add alone, found it on both branches"


def float_normalisation(reading: Reading) -> Broken:
    """P6: normalisations and their activations read floats: Q/DQ belong to the products alone, per consumer."""
    for quantizer in reading.quantizers.values():
        if quantizer.is_quantize or reading.is_known(quantizer.node.inputs[0]):
            continue
        for reader in _readers(reading, quantizer.node.outputs[0]):
            if graphs.is_op(reader, *NORMALISATIONS):
                yield reader, f"expected a float input of {reader.op_type}, found Q/DQ ({name_of(quantizer.node)})"


@dataclass(frozen=True)
class Attention:
    """``softmax(q · k) · v``: its two products and the softmax between them."""

    softmax: ir.Node
    scores: Product
    context: Product

    @property
    def quantized(self) -> dict[str, Quantizer | None]:
        """What Q/DQ there is on q, k, the softmax output and v."""
        operands = (*self.scores.operands, *self.context.operands)
        names = ("q", "k", "the softmax output", "v")
        return {name: operand.quantizer for name, operand in zip(names, operands, strict=True)}

    @property
    def is_complete(self) -> bool:
        """Whether all four are quantized."""
        return None not in self.quantized.values()

    @property
    def is_fp8(self) -> bool:
        """Whether the formats are FP8."""
        return any(quantizer is not None and quantizer.format == FP8 for quantizer in self.quantized.values())

    @property
    def head_size(self) -> int | None:
        """Features of a head, if known."""
        return _last(self.scores.operands[0].value)


def whole_attention(reading: Reading) -> Broken:
    """P7: attention fuses if q, k, v and the softmax output are quantized; FP8 also asks for float16, head 32–256."""
    for attention in _attentions(reading):
        without = [name for name, quantizer in attention.quantized.items() if quantizer is None]
        quantized = [name for name, quantizer in attention.quantized.items() if quantizer is not None]
        if quantized and without:
            yield (
                attention.softmax,
                f"expected Q/DQ on q, k, the softmax output and v, or on none, found none on {', '.join(without)}",
            )
        elif quantized and attention.is_fp8:
            dtype = attention.context.node.outputs[0].dtype
            if dtype == ir.DataType.FLOAT:
                yield attention.softmax, "expected FP8 attention between float16 values, found float32"
            if attention.head_size is not None and attention.head_size not in FP8_HEADS:
                yield attention.softmax, f"expected FP8 attention heads of 32 to 256, found {attention.head_size}"


def integer_attention(reading: Reading) -> Broken:
    """P8: INT8 attention fuses with Q/DQ on its output, heads of 16, 32 or 64, and at most 512 keys."""
    for attention in _attentions(reading):
        if not attention.is_complete or attention.is_fp8:
            continue
        readers = list(_readers(reading, attention.context.node.outputs[0]))
        if not any(graphs.is_quantize(reader) for reader in readers):
            yield attention.context.node, "expected Q/DQ on the output of INT8 attention, found none"
        if attention.head_size is not None and attention.head_size not in INT8_HEADS:
            yield attention.softmax, f"expected INT8 attention heads of 16, 32 or 64, found {attention.head_size}"
        keys = _last(attention.softmax.outputs[0])
        if keys is not None and keys > LONGEST_INT8_ATTENTION:
            yield attention.softmax, f"expected INT8 attention over at most {LONGEST_INT8_ATTENTION} keys, found {keys}"


def softmax_scale(reading: Reading) -> Broken:
    """P9: the scale of a softmax output is 1/127 (INT8) or 1/448 (FP8), for the output never exceeds 1."""
    for quantizer in _pairs(reading):
        if not graphs.is_op(_producer(quantizer), "Softmax") or quantizer.scale is None or not quantizer.scale.size:
            continue
        largest_code = {ir.DataType.INT8: 127, FP8: 448}.get(quantizer.format or ir.DataType.UNDEFINED)
        scale = float(np.max(quantizer.scale.astype(np.float32)))
        if largest_code is not None and scale * largest_code > SCALE_MARGIN:
            yield quantizer.node, f"expected a softmax scale of about 1/{largest_code}, found {scale:.4g}"


def wide_enough(reading: Reading) -> Broken:
    """P10: convolutions of fewer than 16 channels and products with a vector gain nothing from low precision."""
    for product in reading.products:
        weight = product.weight
        shape = None if weight is None else weight.value.shape
        if not product.is_quantized or shape is None or not all(isinstance(size, int) for size in shape):
            continue
        sizes = [int(size) for size in shape]  # type: ignore[arg-type]
        if product.node.op_type == "Conv":
            narrowest = min(sizes[0], sizes[1] * product.node.attributes.get_int("group", 1))
            if narrowest < NARROW_CHANNELS:
                yield product.node, f"expected at least {NARROW_CHANNELS} channels, found {narrowest}"
        elif product.node.op_type in ("Gemm", "MatMul") and 1 in (sizes[-2:] if len(sizes) > 1 else [1]):
            yield product.node, f"expected a matrix, found a vector of shape {sizes}"


def both_factors(reading: Reading) -> Broken:
    """P11: Q/DQ on an activation alone round it and gain nothing: the product stays float."""
    for product in reading.products:
        if product.node.op_type == "ConvTranspose":
            continue  # E11
        quantized = [operand for operand in product.operands if operand.quantizer is not None]
        floating = [operand for operand in product.operands if operand.quantizer is None]
        if len(quantized) == 1 and not quantized[0].is_weight:
            yield (
                product.node,
                f"expected Q/DQ on both inputs or none, found them on {quantized[0].value.name} alone, not on "
                f"{floating[0].value.name}: {product.node.op_type} stays float",
            )


ADVICE: dict[str, Rule] = {
    "P1": inputs_only,
    "P2": fused_epilogue,
    "P3": quantized_last,
    "P4": concat_scales,
    "P5": one_branch,
    "P6": float_normalisation,
    "P7": whole_attention,
    "P8": integer_attention,
    "P9": softmax_scale,
    "P10": wide_enough,
    "P11": both_factors,
}


def _pairs(reading: Reading) -> Iterator[Quantizer]:
    """The DequantizeLinear of every pair on an activation, with what its QuantizeLinear reads as producer."""
    for quantizer in reading.quantizers.values():
        codes = quantizer.node.inputs[0]
        if not quantizer.is_quantize and not reading.is_known(codes) and _quantize_of(quantizer) is not None:
            yield quantizer


def _quantize_of(quantizer: Quantizer | None) -> ir.Node | None:
    codes = None if quantizer is None else quantizer.node.inputs[0]
    source = None if codes is None else codes.producer()
    return source if graphs.is_quantize(source) else None


def _producer(quantizer: Quantizer) -> ir.Node | None:
    """What makes the float value that the pair quantizes."""
    quantize = quantizer.node if quantizer.is_quantize else _quantize_of(quantizer)
    value = None if quantize is None else quantize.inputs[0]
    return None if value is None else value.producer()


def _is_product(node: ir.Node | None) -> bool:
    """A product, or the BatchNormalization after one."""
    if node is not None and graphs.is_op(node, "BatchNormalization") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return graphs.is_op(node, *layer_nodes.WEIGHTED_OPS)


def _readers(reading: Reading, value: ir.Value) -> Iterator[ir.Node]:
    """Who reads the value, also through ops that move codes."""
    for reader, index in graphs.consumers(value):
        if index == 0 and reading.moves_codes(reader):
            for output in reader.outputs:
                yield from _readers(reading, output)
        else:
            yield reader


def _reads_codes(reading: Reading, node: ir.Node) -> bool:
    if graphs.is_op(node, *layer_nodes.WEIGHTED_OPS):
        return True
    return graphs.is_op(node, *INTEGER_READERS) and not any(reading.is_known(value) for value in node.inputs)


def _float_activations(reading: Reading) -> Iterator[tuple[Product, Operand]]:
    """Products whose weight is quantized and whose activation is not read from DequantizeLinear."""
    for product in reading.products:
        weight = product.weight
        if weight is None or weight.quantizer is None:
            continue
        for operand in product.operands:
            if operand.quantizer is None and not operand.is_weight:
                yield product, operand


def _origin(operand: Operand) -> ir.Node | None:
    """The node before the ops that only move values."""
    return (operand.path[0].inputs[0] if operand.path else operand.value).producer()  # type: ignore[union-attr]


def _varying(reading: Reading, node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and not reading.is_known(value)]


def _same_scale(first: Quantizer, second: Quantizer) -> bool:
    if first.node.inputs[1] is second.node.inputs[1]:
        return True
    return first.scale is not None and second.scale is not None and np.array_equal(first.scale, second.scale)


def _last(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


def _attentions(reading: Reading) -> Iterator[Attention]:
    by_node = {product.node: product for product in reading.products}
    for node in reading.nodes:
        if graphs.is_op(node, "Softmax") and node.inputs[0] is not None:
            scores = _scores(reading, by_node, node.inputs[0])
            context = _context(by_node, node.outputs[0])
            if scores is not None and context is not None:
                yield Attention(node, scores, context)


def _scores(reading: Reading, by_node: dict[ir.Node, Product], value: ir.Value, depth: int = 0) -> Product | None:
    """The product of two activations that a softmax normalises, through scaling and masking."""
    node = value.producer()
    if node is None or depth > 8:
        return None
    if node in by_node:
        product = by_node[node]
        return None if product.weight is not None else product
    if not graphs.is_op(node, "Mul", "Div", "Add", "Where", "Cast", "Reshape", *_PAIR):
        return None
    data = node.inputs[:1] if graphs.is_op(node, "Cast", "Reshape", *_PAIR) else node.inputs
    found = (_scores(reading, by_node, source, depth + 1) for source in data if source is not None)
    return next((product for product in found if product is not None), None)


def _context(by_node: dict[ir.Node, Product], value: ir.Value, depth: int = 0) -> Product | None:
    """The product that a softmax output goes into."""
    for reader, index in graphs.consumers(value):
        if reader in by_node and graphs.is_op(reader, "MatMul") and index == 0:
            return by_node[reader]
        if depth < 6 and graphs.is_op(reader, "Cast", "Dropout", "Identity", "Reshape", *_PAIR):
            found = _context(by_node, reader.outputs[0], depth + 1)
            if found is not None:
                return found
    return None


_PAIR = ("QuantizeLinear", "DequantizeLinear")
