"""onnxruntime's CPU provider: uint8 activations and int8 weights, so that whole regions run on integer kernels.

The provider replaces ``DequantizeLinear → op → QuantizeLinear`` by one integer kernel, so a convolution is fast only
where its output is quantized too, and every op between two convolutions must either have an integer kernel or only
move data; a single float op in between costs two conversions. Matrix products also have a kernel that reads codes
and writes floats, so a transformer keeps its LayerNorm, Gelu and residual stream in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.errors import OnnxqError
from onnxq.passes.pad_codes import PadCodes
from onnxq.scheme import Scheme, for_integer_products, parse_activations, parse_weights
from onnxq.targets.cpu_float_layers import layers_better_in_float
from onnxq.targets.cpu_lstm import place_lstms
from onnxq.targets.cpu_regions import Regions
from onnxq.targets.findings import Finding
from onnxq.targets.placement import Placement, Schemes, Site, choose, excluded, merged, schemes_of, weight_sites

NARROW_CHANNELS = 16  # below it a product of rows, or a depthwise convolution, takes 1.1 to 4 times as long with codes
NARROW_GROUP = 4  # channels that a group reads: 2 take four times as long with codes as in float, 4 up to twice
MOST_OF_ONE = 1  # results of each channel in a depthwise convolution: 2 take three to seven times as long with codes

LEGAL_WEIGHTS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "uint8", "uint4", "float")
LEGAL_ACTIVATIONS = (
    "uint8", "int8", "int16", "uint16", "float",
    "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "int2", "int3", "int4", "int5", "int6", "int7",
)  # fmt: skip


class Cpu:
    """The CPU execution provider of onnxruntime."""

    name = "cpu"
    packs_codes = True
    quantizes_attention = False
    quantizes_bodies = True
    multiplies_one_matrix = True
    computes_in_half = False

    def scheme(self, weights: str | None, activations: str | None) -> Scheme:
        """uint8 activations (asymmetric) and int8 weights per channel by default.

        Raises:
            OnnxqError: there is no kernel for the format.
        """
        weight_spec = parse_weights(weights or "int8")
        if activations is None:
            weight_only = weight_spec.granularity == "block" or weight_spec.format.name == "float"
            activations = "float" if weight_only else "uint8"
        # With a free zero point a ReLU's output uses all codes, and the ReLU is absorbed by the kernel before it.
        activation_spec = replace(parse_activations(activations), symmetric=False)
        for what, spec, legal in (
            ("weights", weight_spec, LEGAL_WEIGHTS),
            ("activations", activation_spec, LEGAL_ACTIVATIONS),
        ):
            if spec.format.name not in legal:
                raise OnnxqError(
                    f"expected {what} that onnxruntime's CPU provider runs, found {spec.format.name}",
                    hint=f"use one of {', '.join(legal)}",
                )
        if activation_spec.dynamic and not weight_spec.enabled:
            raise OnnxqError(
                "expected weights of up to 8 bits beside dynamic activations, found float",
                hint="use --weights int8: codes alone on one side gain nothing",
            )
        if activation_spec.enabled and weight_spec.enabled:
            weight_spec = for_integer_products(weight_spec)
        in_blocks = weight_spec.granularity == "block" and weight_spec.symmetric and not weight_spec.format.is_float
        weight_spec = replace(weight_spec, signed_scales=in_blocks)
        return Scheme(weight_spec, activation_spec)

    def prepare(self, model: ir.Model) -> None:
        """Compute in float32, fold BatchNormalization and Pad, write the rest in ops that integer kernels match."""
        from onnxq.passes.change_precision import ChangePrecision
        from onnxq.passes.fold_affine import FoldAffine
        from onnxq.passes.fold_batchnorm import FoldBatchNorm
        from onnxq.passes.fuse_activations import FuseActivations
        from onnxq.passes.lower_prelu import ShareSlopes
        from onnxq.passes.pool_means import PoolMeans
        from onnxq.passes.split_gemm_bias import SplitGemmBias

        for other in (ir.DataType.FLOAT16, ir.DataType.DOUBLE):
            ChangePrecision(other, ir.DataType.FLOAT)(model)  # which alone integer kernels read
        ChangePrecision(ir.DataType.BFLOAT16, ir.DataType.FLOAT, outside=True)(model)  # which numpy does not have
        if graphs.is_bfloat16(model):
            raise OnnxqError(
                "expected a bfloat16 model without If, Loop and Scan for --target cpu, found one with such a node",
                hint="export it in float32: onnxruntime has no kernels of bfloat16 on a CPU",
            )
        FoldAffine()(model)
        FoldBatchNorm()(model)
        FoldAffine()(model)  # what stood behind a BatchNormalization
        FuseActivations()(model)
        ShareSlopes()(model)
        PoolMeans()(model)
        SplitGemmBias()(model)

    def place(
        self,
        graph: ir.Graph,
        scheme: Scheme,
        exclude: Sequence[str] = (),
        exceptions: Mapping[str, Scheme] = MappingProxyType({}),
    ) -> Placement:
        """Q/DQ around every op with an integer kernel, as long as the region they form pays."""
        skipped = excluded(graph, exclude)
        scheme_of = _one_scale_for_batches(schemes_of(scheme, exceptions))
        chosen, left_float = choose(graph, skipped, lambda item: _why_float(item, scheme_of(item.node)))
        if scheme.activations.is_calibrated:
            left_float |= layers_better_in_float(graph, chosen, skipped)
            chosen = [item for item in chosen if item.node.name not in left_float]
        sites = weight_sites(chosen, scheme_of)
        lstm_sites, reasons = place_lstms(graph, skipped, scheme_of)
        sites += lstm_sites
        left_float = {name: reason for name, reason in (left_float | reasons).items() if reason}
        if scheme.activations.is_calibrated:
            sites += Regions(graph, chosen, skipped).sites(scheme_of, scheme.activations)
        sites += _dynamic_sites(chosen, scheme_of)
        return Placement(sites, left_float)

    def lower(self, model: ir.Model) -> None:
        """Weights become codes, Pads move to codes, scales after a Clip stay inside it, and biases stay apart.

        A Clip is absorbed by the kernel before it only if its bounds are never cut by the quantizer's own range. What
        bias correction gave a Gemm is split off again. Blocks that no kernel would read otherwise are packed. Layers
        that stay in float between codes are kept from being rounded by onnxruntime, and pools behind them from reading
        codes.
        """
        from onnxq.passes.keep_biases_apart import KeepBiasesApart
        from onnxq.passes.keep_layers_float import KeepLayersFloat
        from onnxq.passes.keep_pools_float import KeepPoolsFloat
        from onnxq.passes.lower_group_norm import LowerGroupNorm
        from onnxq.passes.lower_hard_swish import LowerHardSwish
        from onnxq.passes.lower_integer_products import LowerIntegerProducts
        from onnxq.passes.lower_levelled_gates import LowerLevelledGates
        from onnxq.passes.lower_lstm import LowerLstm
        from onnxq.passes.lower_packed_blocks import LowerPackedBlocks
        from onnxq.passes.lower_prelu import LowerPRelu
        from onnxq.passes.lower_softplus import LowerSoftplus
        from onnxq.passes.lower_weights import LowerWeights
        from onnxq.passes.pad_channels import PadChannels
        from onnxq.passes.split_gemm_bias import SplitGemmBias

        SplitGemmBias()(model)
        LowerWeights()(model)
        LowerPackedBlocks(only_missed=True)(model)
        LowerIntegerProducts()(model)
        LowerLstm()(model)
        KeepBiasesApart()(model)
        LowerHardSwish()(model)
        LowerLevelledGates()(model)
        LowerPRelu()(model)
        LowerSoftplus()(model)
        LowerGroupNorm()(model)
        PadCodes()(model)
        PadChannels()(model)
        KeepLayersFloat()(model)
        KeepPoolsFloat()(model)
        _keep_ranges_inside_clips(model.graph)

    def lint(self, model: ir.Model, sm: int | None = None) -> list[Finding]:
        """What keeps a kernel from running on integers."""
        from onnxq.targets.cpu_lint import lint

        return lint(model)


def _one_scale_for_batches(scheme_of: Schemes) -> Schemes:
    """The same schemes, but one scale where a MatMul has several matrices as its weight (experts, say).

    The integer kernels know scales per column of a single matrix alone, and refuse to run otherwise.
    """

    def chosen(node: ir.Node) -> Scheme:
        scheme = scheme_of(node)
        if scheme.weights.granularity != "channel" or not scheme.activations.enabled:
            return scheme
        if not layer_nodes.multiplies_several(node):
            return scheme
        return replace(scheme, weights=replace(scheme.weights, granularity="tensor"))

    return chosen


def _dynamic_sites(chosen: Sequence[layer_nodes.WeightedNode], scheme_of: Schemes) -> list[Site]:
    """What products read whose ranges are found while the model runs; others that read it have it in float."""
    sites = []
    for item in chosen:
        spec = scheme_of(item.node).activations
        if spec.dynamic:
            sites.append(Site(item.activation, ((item.node, item.activation_index),), spec))
    return merged(sites)


def _why_float(item: layer_nodes.WeightedNode, scheme: Scheme) -> str:
    """Why this node stays in float, or an empty string."""
    node, weight = item.node, item.weight
    if not (scheme.weights.enabled or scheme.activations.enabled):
        return "its scheme is float"
    if node.op_type == "ConvTranspose":
        return "onnxruntime has no integer ConvTranspose"
    if weight is None or not graphs.is_constant(weight):
        return "both operands are activations"
    if scheme.activations.dynamic and node.op_type == "Conv":
        return "convolutions of codes need ranges that are known before"
    if item.weight_index == 0:
        return "the weight is the left operand"
    if not graphs.is_float(weight) or weight.shape is None:
        return "the weight is not a float tensor"
    if node.op_type == "Gemm" and node.attributes.get_float("beta", 1.0) != 1.0:
        return "the integer Gemm has no beta"
    if scheme.weights.granularity == "block" and node.op_type == "Conv":
        return "block scales are for matrix products"
    if scheme.activations.enabled and node.op_type == "Conv" and (groups := node.attributes.get_int("group", 1)) > 1:
        width = int(weight.shape.numpy()[1])
        if 1 < width <= NARROW_GROUP:
            return f"groups of {width} channels are faster in float"
        if width == 1 and int(weight.shape.numpy()[0]) > groups * MOST_OF_ONE:
            return "several results of each channel are faster in float"
        if width == 1 and groups < NARROW_CHANNELS:
            return f"only {groups} channels, which are faster in float"
    if scheme.activations.enabled and node.op_type == "MatMul":
        rows, narrowest = graphs.rank(item.activation), int(min(weight.shape.numpy()[-2:]))
        if rows is not None and rows > 2 and narrowest < NARROW_CHANNELS:  # one row costs nothing either way
            return f"only {narrowest} channels, which are faster in float"
    return ""


def _keep_ranges_inside_clips(graph: ir.Graph) -> None:
    """Lower a scale by one float where rounding took the largest code past the Clip before it."""
    for node in graph:
        source = node.inputs[0] if graphs.is_quantize(node) else None
        clip = None if source is None else source.producer()
        if clip is None or not graphs.is_op(clip, "Clip") or len(clip.inputs) < 3:
            continue
        scale, zero_point, bound = node.inputs[1], node.inputs[2], clip.inputs[2]
        if scale is None or zero_point is None or bound is None or not graphs.is_constant(bound):
            continue
        assert scale.const_value and zero_point.const_value and bound.const_value and scale.dtype
        step = scale.const_value.numpy()
        limit = bound.const_value.numpy()
        codes = np.iinfo(zero_point.const_value.numpy().dtype)
        largest = np.float32(codes.max) - zero_point.const_value.numpy().astype(np.float32)
        if not np.any(limit < largest * step) or np.any(limit * 1.001 < largest * step):
            continue  # inside already, or so far outside that it was meant
        while np.any(largest * step > limit):
            step = np.nextafter(step, np.float32(0))
        scale.const_value = ir.Tensor(np.asarray(step), dtype=scale.dtype, name=scale.name)
