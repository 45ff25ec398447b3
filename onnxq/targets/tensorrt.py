"""TensorRT: Q/DQ on the inputs of convolutions and matrix products, symmetric, with constant scalar scales.

Placement follows the builder's fusions: nothing between Conv, BatchNormalization and Relu; nothing on outputs; one
branch of a residual Add, so that Conv + Add + Relu fuse with an INT8 shortcut. Weights are stored as codes with a
DequantizeLinear; a bias stays float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir

from onnxq import block_scales, layer_nodes, shapes
from onnxq import graph as graphs
from onnxq.attention import dividing_products, single_query_attention
from onnxq.errors import OnnxqError
from onnxq.passes.split_shortcuts import PARTIAL_SUM
from onnxq.scheme import Scheme, Spec, for_integer_products, parse_activations, parse_weights
from onnxq.targets.findings import Finding
from onnxq.targets.placement import Placement, Schemes, Site, choose, excluded, merged, schemes_of, weight_sites

DIVIDES = "its result divides, and codes make small divisors zero"
SINGLE_QUERY = "the compiler keeps attention of a single query in float, with its projections"
FP8 = Scheme(parse_weights("fp8"), parse_activations("fp8"))
NARROW_CHANNELS = 16  # below it the INT8 kernels pad channels and gain nothing

LEGAL_WEIGHTS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp8", "fp4", "float")
LEGAL_ACTIVATIONS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp8", "fp4", "float")


class TensorRT:
    """Explicit quantization as TensorRT 10, 11 and RTX compile it."""

    name = "tensorrt"
    packs_codes = False
    quantizes_attention = True
    quantizes_bodies = False
    multiplies_one_matrix = False
    computes_in_half = True

    def scheme(self, weights: str | None, activations: str | None) -> Scheme:
        """INT8 by default; FP8 activations ask for FP8 weights and the other way round.

        Raises:
            OnnxqError: the builder refuses the format, or reads it as another one.
        """
        if weights is None:
            weights = activations if activations in ("fp8", "fp4") else "int8"
        weight_spec = parse_weights(weights)
        if weight_spec.format.has_block_scales and weight_spec.block_size != block_scales.BLOCK:
            raise OnnxqError(
                f"expected FP4 weights in blocks of {block_scales.BLOCK}, as TensorRT's kernels read, found {weights}",
                hint=f"use --weights fp4, which means fp4:{block_scales.BLOCK}",
            )
        if activations is None:
            weight_only = weight_spec.granularity == "block" or weight_spec.format.name == "float"
            activations = "float" if weight_only else ("fp8" if weight_spec.format.name == "fp8" else "int8")
        activation_spec = parse_activations(activations)
        if activation_spec.dynamic:
            raise OnnxqError(
                "expected activations whose range is known when TensorRT builds, found dynamic ones",
                hint="use --target cpu; TensorRT's own are FP4 (--recipe fp4), or zeroquant's ranges of each token",
            )
        _check_legal("weights", weight_spec, LEGAL_WEIGHTS)
        _check_legal("activations", activation_spec, LEGAL_ACTIVATIONS)
        if activation_spec.enabled and weight_spec.enabled:
            kinds = [spec.format.name if spec.format.is_float else "int" for spec in (weight_spec, activation_spec)]
            if kinds[0] != kinds[1]:
                raise OnnxqError(
                    f"expected weights and activations of one kind for TensorRT, found {weight_spec.format.name} "
                    f"weights and {activation_spec.format.name} activations (rule E7)",
                    hint="use the same format for both, or --activations float",
                )
            weight_spec = for_integer_products(weight_spec)
        return Scheme(weight_spec, activation_spec)

    def prepare(self, model: ir.Model) -> None:
        """Take fused attention apart, and fold BatchNormalization and Pad, so that Conv → Relu are neighbours."""
        from onnxq.passes.change_precision import ChangePrecision
        from onnxq.passes.decompose_attention import DecomposeAttention
        from onnxq.passes.expand_attention import ExpandAttention
        from onnxq.passes.fold_affine import FoldAffine
        from onnxq.passes.fold_batchnorm import FoldBatchNorm
        from onnxq.targets.tensorrt_lint import reads_attention, unreadable

        ChangePrecision(ir.DataType.DOUBLE, ir.DataType.FLOAT)(model)  # TensorRT computes none
        attentions = [node for node in model.graph if graphs.is_op(node, "Attention")]
        whole = [node.name or "" for node in attentions if reads_attention(node)]
        if ExpandAttention()(model).modified | DecomposeAttention(whole)(model).modified:
            shapes.infer(model)
        for node in model.graph.all_nodes():
            if found := unreadable(node):
                raise OnnxqError(
                    f"{found}, at node {node.name!r}",
                    hint="take the model as it was exported, before onnxruntime's optimizer, or --target cpu",
                )
        FoldAffine()(model)
        FoldBatchNorm()(model)
        FoldAffine()(model)  # what stood behind a BatchNormalization

    def place(
        self,
        graph: ir.Graph,
        scheme: Scheme,
        exclude: Sequence[str] = (),
        exceptions: Mapping[str, Scheme] = MappingProxyType({}),
    ) -> Placement:
        """Q/DQ on the inputs of weighted ops (rule P1), and on the shortcut of residual Adds (rule P5)."""
        skipped = excluded(graph, exclude)
        scheme_of = _fp8_beside_fp4(schemes_of(scheme, exceptions))
        reasons: dict[ir.Node, str] = {}
        if scheme.activations.enabled:
            reasons |= dict.fromkeys(dividing_products(graph), DIVIDES)
            reasons |= dict.fromkeys(single_query_attention(graph), SINGLE_QUERY)
        chosen, left_float = choose(
            graph, skipped, lambda item: reasons.get(item.node) or _why_float(item, scheme_of(item.node))
        )
        sites = weight_sites(chosen, scheme_of)
        sites += _activation_sites(chosen, scheme_of)
        if scheme.activations.enabled:
            shortcuts = FP8 if scheme.activations.format.has_block_scales else scheme
            sites += _shortcut_sites(graph, chosen, shortcuts.activations, skipped)
        return Placement(merged(sites), left_float)

    def lower(self, model: ir.Model) -> None:
        """Weights become codes, zero points a shift, and the opset one that onnxruntime optimises without a fault."""
        from onnxq.passes.lower_fp4 import LowerFp4
        from onnxq.passes.lower_opset import LowerOpset
        from onnxq.passes.lower_weights import LowerWeights
        from onnxq.passes.shift_to_symmetric import ShiftToSymmetric

        LowerWeights()(model)
        LowerFp4()(model)
        ShiftToSymmetric()(model)
        LowerOpset()(model)

    def lint(self, model: ir.Model, sm: int | None = None) -> list[Finding]:
        """Rules E1–E12 and P1–P10."""
        from onnxq.targets.tensorrt_lint import lint

        return lint(model, sm)


def _fp8_beside_fp4(scheme_of: Schemes) -> Schemes:
    """The same schemes, but FP8 where FP4 has no kernel: convolutions, attention, rows that are no whole blocks."""

    def chosen(node: ir.Node) -> Scheme:
        scheme, layer = scheme_of(node), layer_nodes.weighted(node)
        if layer is None or not scheme.activations.format.has_block_scales or _has_blocks(layer):
            return scheme
        return FP8

    return chosen


def _has_blocks(layer: layer_nodes.WeightedNode) -> bool:
    """Whether the last axis of an activation is what a product with a constant weight sums over, in whole blocks."""
    node, weight = layer.node, layer.weight
    if node.op_type not in ("Gemm", "MatMul") or layer.weight_index != 1 or weight is None or weight.shape is None:
        return False
    rows = weight.shape[layer.reduction_axis]
    whole = isinstance(rows, int) and rows % block_scales.BLOCK == 0
    return whole and node.attributes.get_int("transA", 0) == 0


def _check_legal(what: str, spec: Spec, legal: Sequence[str]) -> None:
    if spec.format.name not in legal:
        raise OnnxqError(
            f"expected {what} that TensorRT compiles, found {spec.format.name}",
            hint=f"use one of {', '.join(legal)}; or --target cpu",
        )


def _why_float(item: layer_nodes.WeightedNode, scheme: Scheme) -> str:
    """Why this node gains nothing from quantization, or an empty string."""
    node, weight = item.node, item.weight
    if not (scheme.weights.enabled or scheme.activations.enabled):
        return "its scheme is float"
    if node.op_type == "ConvTranspose":
        return "TensorRT compiles a ConvTranspose with Q/DQ as float"
    if item.weight_index is None:
        return _why_product_float(item, scheme)
    if weight is None or not graphs.is_constant(weight):
        return "the weight is computed"
    if item.weight_index == 0:
        return "the weight is the left operand"
    if not graphs.is_float(weight) or weight.shape is None:
        return "the weight is not a float tensor"
    sizes = [int(size) for size in weight.shape if isinstance(size, int)]
    if item.reduction_axis < len(sizes) and scheme.activations.enabled:
        groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        narrowest = min(sizes[item.channel_axis], sizes[item.reduction_axis] * groups)
        if narrowest < NARROW_CHANNELS:
            return f"only {narrowest} channels (rule P10)"
    if scheme.weights.granularity == "block":
        if node.op_type in ("Conv", "ConvTranspose"):
            return "block scales are for matrix products"
        if sizes[item.reduction_axis] % (scheme.weights.block_size or 1):
            return f"{sizes[item.reduction_axis]} rows do not divide into blocks of {scheme.weights.block_size}"
    return ""


def _why_product_float(item: layer_nodes.WeightedNode, scheme: Scheme) -> str:
    """Why a product of two activations stays in float.

    Left in float, an attention product makes the compiler pull the slices of a joint q/k/v projection through its
    MatMul, whose weight it then multiplies in float too (rules P7 and P8).
    """
    if not scheme.activations.enabled:
        return "both operands are activations, which stay in float"
    if layer_nodes.lookup_behind(item) is not None:
        return "its matrix is looked up, as weights of experts are: codes would be made of it anew in every run"
    for value in item.node.inputs[:2]:
        dimensions = None if value is None else graphs.rank(value)
        if value is None or not graphs.is_float(value) or dimensions is None or dimensions < 2:
            return "an operand of the product has no known rank"
        if graphs.is_constant(value):
            return "a matrix-vector product"
    return ""


def _activation_sites(items: Sequence[layer_nodes.WeightedNode], scheme_of: Schemes) -> list[Site]:
    """One pair for each value, read by the chosen consumers alone (rule P6)."""
    sites = []
    for item in items:
        spec = scheme_of(item.node).activations
        if not spec.enabled:
            continue
        indices = (0, 1) if item.weight_index is None else (item.activation_index,)
        for index in indices:
            value = item.node.inputs[index]
            if value is not None:
                use = (item.node, index)
                joint = item.weight_index is None
                sites.append(_before_movement(value, use, spec) if joint else Site(value, (use,), spec))
    return sites


def _before_movement(value: ir.Value, use: tuple[ir.Node, int], spec: Spec) -> Site:
    """The pair for one operand of a product: before the slices and transposes that cut it out of a joint projection.

    After them the compiler would pull the slices through the projection instead, and run that in float.
    """
    start = value
    while (producer := start.producer()) is not None and graphs.is_op(producer, *graphs.DATA_MOVEMENT):
        source = producer.inputs[0]
        if source is None or not graphs.is_float(source):
            break
        use, start = (producer, 0), source
    return Site(start, (use,), spec)


def _shortcut_sites(
    graph: ir.Graph, chosen: Sequence[layer_nodes.WeightedNode], spec: Spec, skipped: set[str]
) -> list[Site]:
    """The shortcut of ``Add(Conv(…), shortcut)``, where a quantized op reads the sum."""
    quantized = {item.node for item in chosen}
    order = {node: index for index, node in enumerate(graph)}
    sites = []
    for node in graph:
        if not graphs.is_op(node, "Add") or node.name in skipped or PARTIAL_SUM in node.metadata_props:
            continue
        operands = [value for value in node.inputs if value is not None and not graphs.is_constant(value)]
        if len(operands) != 2 or operands[0] is operands[1] or not _feeds(node, quantized):
            continue
        convolutions = [
            (order[producer], index)
            for index, value in enumerate(node.inputs)
            if value is not None
            and (producer := value.producer()) in quantized
            and producer is not None
            and producer.op_type == "Conv"
            and len(value.uses()) == 1
        ]
        if not convolutions:
            continue
        fused = max(convolutions)[1]  # the later convolution takes the Add as its epilogue
        shortcut = 1 - fused
        value = node.inputs[shortcut]
        if value is not None and graphs.is_float(value):
            sites.append(Site(value, ((node, shortcut),), spec))
    return sites


def _feeds(node: ir.Node, quantized: set[ir.Node], depth: int = 0) -> bool:
    """Whether a quantized op reads the node's output, if only through Relu, pooling or another Add."""
    for reader, _ in graphs.consumers(node.outputs[0]):
        if reader in quantized:
            return True
        if (
            depth < 6
            and graphs.is_op(reader, "Relu", "Clip", "Add", *graphs.DATA_MOVEMENT)
            and _feeds(reader, quantized, depth + 1)
        ):
            return True
    return False
