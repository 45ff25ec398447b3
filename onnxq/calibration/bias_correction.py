"""Take back the shift that rounding the weights gives each output channel.

A layer y = W·x + b with rounded weights W' is off by (W' − W)·x. Its mean over the data, (W' − W)·E[x], is constant
per output channel, so the bias can take it back. It matters where a filter has few weights, as in depthwise
convolutions.

Source: M. Nagel et al., Data-free quantization through weight equalization and bias correction, ICCV 2019, eq. 17
(with E[x] from calibration inputs instead of BatchNormalization). Padding at the borders is ignored, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.arithmetic import fake_quantize
from onnxq.biases import BiasPlace, bias_place
from onnxq.folding import array_of
from onnxq.passes.insert_qdq import STATISTICS, spec_of
from onnxq.targets.placement import Site

Array = np.ndarray[Any, Any]

Rounding = Callable[[ir.Node, Array], Array]  # from a weight's quantizer and the weight to what the codes will mean


def channel_axes(graph: ir.Graph) -> dict[str, int]:
    """The axis of input channels of each float value that a quantized layer reads, by value name."""
    axes = {}
    for item in layer_nodes.weighted_nodes(graph):
        source = _source(item)
        if source is not None and item.weight is not None:
            is_transposed = item.node.op_type == "Gemm" and item.node.attributes.get_int("transA", 0) == 1
            axes[source] = 1 if item.node.op_type in ("Conv", "ConvTranspose") else 0 if is_transposed else -1
    return axes


def read_in_float(graph: ir.Graph, sites: Sequence[Site]) -> set[ir.Value]:
    """What layers with a bias read in float, of a float graph, though their weights are to get codes."""
    coded = {site.value for site in sites}
    return {
        item.activation
        for item in layer_nodes.weighted_nodes(graph)
        if item.weight in coded and item.activation not in coded and _has_bias(item)
    }


def _has_bias(item: layer_nodes.WeightedNode) -> bool:
    """Whether there is a bias to correct, or a place for one."""
    place = bias_place(item)
    return place is not None and (place.value is None or graphs.is_constant(place.value))


def correct_biases(model: ir.Model, means: Mapping[str, Array], rounding: Rounding | None = None) -> int:
    """Shift the bias of every layer whose weights are quantized; returns how many were corrected.

    Args:
        model: A Q/DQ model whose weights are still float.
        means: E[x] per input channel, by the name of the value that the layer's quantizer reads.
        rounding: How the weight quantizers of the model round; by default each by its scale, which is set.
    """
    corrected = 0
    for item in list(layer_nodes.weighted_nodes(model.graph)):
        source = _source(item)
        quantize = _weight_quantizer(item)
        if source is None or quantize is None or source not in means:
            continue
        shift = _shift(item, quantize, means[source], rounding or rounded_weight)
        if shift is not None and np.any(shift) and _add_to_bias(model.graph, item, -shift):
            corrected += 1
    return corrected


def corrected_apart(model: ir.Model, means: Mapping[str, Array]) -> dict[str, Array]:
    """What :func:`correct_biases` makes of biases, by initializer; the model keeps its own, new ones are zeros."""
    places = [place for item in layer_nodes.weighted_nodes(model.graph) if (place := bias_place(item)) is not None]
    before = [array_of(place.value) if graphs.is_constant(place.value) else None for place in places]
    correct_biases(model, means)
    corrected = {}
    for place, own in zip(places, before, strict=True):
        value = place.value
        if value is None or not graphs.is_constant(value):
            continue
        found = array_of(value)
        if own is None or not np.array_equal(found, own):
            corrected[value.name or ""] = found.astype(np.float32)  # as students learn
            value.const_value = ir.tensor(np.zeros_like(found) if own is None else own, name=value.name)
    return corrected


def _source(item: layer_nodes.WeightedNode) -> str | None:
    """The float value behind the layer's activation quantizer."""
    producer = item.activation.producer()
    if producer is None or not graphs.is_dequantize(producer):
        return item.activation.name
    quantize = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return None if quantize is None else quantize.metadata_props.get(STATISTICS)


def _weight_quantizer(item: layer_nodes.WeightedNode) -> ir.Node | None:
    dequantize = None if item.weight is None else item.weight.producer()
    if dequantize is None or not graphs.is_dequantize(dequantize) or dequantize.inputs[0] is None:
        return None
    quantize = dequantize.inputs[0].producer()
    if quantize is None or not graphs.is_constant(quantize.inputs[0]):
        return None
    return quantize


def _shift(item: layer_nodes.WeightedNode, quantize: ir.Node, means: Array, rounding: Rounding) -> Array | None:
    """(W' − W)·E[x] per output channel, with W' as the quantizer makes it."""
    weight_value = quantize.inputs[0]
    assert weight_value is not None and weight_value.const_value is not None
    weight = weight_value.const_value.numpy().astype(np.float32)
    graphs.let_go(weight_value)
    return mean_shift(item, rounding(quantize, weight).astype(np.float64) - weight, means)


def rounded_weight(quantize: ir.Node, weight: Array) -> Array:
    """A weight as its quantizer will mean it, by the scale, zero point and format that the quantizer has."""
    scale, zero_point = quantize.inputs[1:3]
    assert scale is not None and scale.const_value and zero_point is not None and zero_point.const_value
    per_tensor = not scale.const_value.shape
    return fake_quantize(
        weight,
        scale.const_value.numpy(),
        zero_point.const_value.numpy(),
        spec_of(quantize).format,
        axis=None if per_tensor else quantize.attributes.get_int("axis", 1),
        block_size=quantize.attributes.get_int("block_size", 0) or None,
    )


def mean_shift(item: layer_nodes.WeightedNode, error: Array, means: Array) -> Array | None:
    """The mean of what an error in a layer's weight adds to each output channel.

    Args:
        item: The layer.
        error: In the shape of its weight.
        means: E[x] per input channel.

    Returns:
        The shift, or ``None`` where the layer is of a kind that has none.
    """
    if item.node.op_type == "Conv":
        groups = item.node.attributes.get_int("group", 1)
        kernels = error.reshape(*error.shape[:2], -1).sum(axis=2)  # [out, in / groups]
        if means.size != kernels.shape[1] * groups:
            return None
        per_group = means.reshape(groups, 1, kernels.shape[1])
        shift: Array = (kernels.reshape(groups, -1, kernels.shape[1]) * per_group).sum(axis=2).reshape(-1)
        return shift
    if item.node.op_type in ("Gemm", "MatMul") and error.ndim == 2:
        matrix = error if item.channel_axis == 1 else error.T  # [in, out]
        return means @ matrix if means.size == matrix.shape[0] else None
    return None


def _add_to_bias(graph: ir.Graph, item: layer_nodes.WeightedNode, shift: Array) -> bool:
    """Add ``shift`` to the layer's bias, which may be an Add after it; a Conv or Gemm without one gets one."""
    place = bias_place(item)
    if place is None:
        return False
    if place.value is not None:
        return _replace_bias(graph, place, shift)
    output, weight = place.node.outputs[0], item.weight
    assert weight is not None
    dtype = output.dtype or weight.dtype or ir.DataType.FLOAT
    place.put(_initializer(graph, f"{output.name}_bias", shift, dtype))
    return True


def _replace_bias(graph: ir.Graph, place: BiasPlace, shift: Array) -> bool:
    bias = place.value
    if bias is None or not graphs.is_constant(bias) or bias.const_value is None or bias.dtype is None:
        return False
    values = bias.const_value.numpy()
    if values.shape[-1:] != shift.shape or values.size != shift.size:
        return False
    corrected = (values.astype(np.float64).reshape(-1) + shift).reshape(values.shape)
    place.put(_initializer(graph, f"{bias.name}_corrected", corrected, bias.dtype))
    return True


def _initializer(graph: ir.Graph, name: str, values: Array, dtype: ir.DataType) -> ir.Value:
    while name in graph.initializers:
        name += "_"
    array = values.astype(dtype.numpy())
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value
