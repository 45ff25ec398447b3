"""Turn what was seen of activations, and weights themselves, into scales, and write them into the graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import block_scales
from onnxq import graph as graphs
from onnxq.arithmetic import scale_and_zero_point, storable_scale
from onnxq.calibration.let_through import Interval, let_through
from onnxq.calibration.observers import Observer, Range, Statistics, minmax, with_headroom
from onnxq.calibration.signed_scales import scale_rows
from onnxq.calibration.weight_ranges import Search
from onnxq.formats import NumberFormat, one_sided, parse_format
from onnxq.passes.insert_qdq import CLIP, FORMAT, STATISTICS, spec_of
from onnxq.passes.normalise_tokens import NORMALISED
from onnxq.scheme import Spec

Array = np.ndarray[Any, Any]


def set_activation_scales(model: ir.Model, statistics: dict[str, Statistics], observer: Observer) -> dict[str, Range]:
    """Write scale and zero point of every activation quantizer; returns the ranges by value name.

    A symmetric quantizer of fewer than 8 bits, whose values were never negative, gets the codes 0 … 2^b - 1: its
    container holds them, its zero point stays 0, and after a Relu that is one bit more.
    """
    ranges: dict[str, Range] = {}
    # A value may have quantizers of several formats, and readers that tell other values apart.
    chosen_ranges: dict[tuple[str, str, Interval], Range] = {}
    for node in model.graph:
        if not graphs.is_quantize(node) or graphs.is_constant(node.inputs[0]):
            continue
        name = node.metadata_props[STATISTICS]
        symmetric = spec_of(node).symmetric
        number_format = _format_for(node, statistics[name], symmetric)
        interval = let_through(node)
        key = (name, number_format.name, interval)
        if key not in chosen_ranges:
            rule = minmax if _is_normalised(node) else observer
            seen = statistics[name].between(*interval)
            chosen_ranges[key] = with_headroom(rule(seen, number_format, symmetric), seen, number_format)
        chosen = chosen_ranges[key]
        ranges.setdefault(name, chosen)
        if symmetric and not number_format.signed:
            scale, zero_point = scale_and_zero_point(0.0, chosen.high, number_format, symmetric=False)
        else:
            scale, zero_point = scale_and_zero_point(chosen.low, chosen.high, number_format, symmetric=symmetric)
        write_scales(node, scale, zero_point)
        write_clip(node, scale, zero_point, number_format)
    return ranges


def _is_normalised(quantizer: ir.Node) -> bool:
    """Whether tokens were divided by their largest magnitude: cut, each would lose its largest number."""
    producer = None if quantizer.inputs[0] is None else quantizer.inputs[0].producer()
    if producer is not None and CLIP in producer.metadata_props and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer is not None and NORMALISED in producer.metadata_props


def _format_for(node: ir.Node, statistics: Statistics, symmetric: bool) -> NumberFormat:
    """The format of an activation quantizer: one-sided where that is free, which its metadata then say."""
    number_format = spec_of(node).format
    zero_point = node.inputs[2]
    assert zero_point is not None and zero_point.dtype is not None
    if not symmetric or zero_point.dtype != ir.DataType.INT8 or number_format.bits >= 8:
        return replace(number_format, storage=zero_point.dtype)
    number_format = replace(parse_format(number_format.name.lstrip("u"))[0], storage=zero_point.dtype)
    if statistics.low >= 0:
        number_format = one_sided(number_format)
    pair = [node, *(reader for reader, _ in graphs.consumers(node.outputs[0]) if graphs.is_dequantize(reader))]
    for member in pair:
        member.metadata_props[FORMAT] = number_format.name
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    if producer is not None and CLIP in producer.metadata_props:
        producer.metadata_props[CLIP] = number_format.name
    return number_format


def set_weight_scales(model: ir.Model, search: Search | None = None) -> None:
    """Write scale and zero point of every weight quantizer from the weight itself.

    Args:
        model: A Q/DQ model whose weights are still float.
        search: From values [channels, elements], a format and symmetry to the clip [channels] at both ends;
            ``None`` takes the extremes.
    """
    for node in model.graph:
        weight = node.inputs[0] if graphs.is_quantize(node) else None
        if weight is None or not graphs.is_constant(weight) or weight.const_value is None:
            continue
        spec = spec_of(node)
        scale_value = node.inputs[1]
        assert scale_value is not None and scale_value.const_value is not None
        shape = scale_value.const_value.numpy().shape
        rows = rows_of(weight.const_value.numpy(), shape, node)
        low, high = _clip_of(rows, spec, search)
        scale, zero_point = scale_rows(rows, low, high, spec)
        del rows
        graphs.let_go(weight)
        write_scales(node, scale.reshape(shape), zero_point.reshape(shape))


def _clip_of(rows: Array, spec: Spec, search: Search | None) -> tuple[Array, Array]:
    low, high = (rows.min(axis=1), rows.max(axis=1)) if search is None else search(rows, spec.format, spec.symmetric)
    return np.minimum(low, 0), np.maximum(high, 0)


def rows_of(weight: Array, shape: tuple[int, ...], node: ir.Node) -> Array:
    """The weight as [scales, elements that share one]."""
    if not shape:
        return weight.reshape(1, -1)
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)
    if not block:
        return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    blocks = shape[axis]
    padding = blocks * block - weight.shape[axis]
    widths = [(0, padding if index == axis else 0) for index in range(weight.ndim)]
    padded = np.pad(weight, widths)
    split = padded.reshape(*weight.shape[:axis], blocks, block, *weight.shape[axis + 1 :])
    return np.moveaxis(split, axis + 1, -1).reshape(-1, block)


def write_scales(node: ir.Node, scale: Array, zero_point: Array) -> None:
    """Put new values into the initializers that a QuantizeLinear reads."""
    if node.attributes.get_int("block_size", 0) and spec_of(node).format.has_block_scales:
        scale = block_scales.rounded(scale)
    for value, array in zip(node.inputs[1:3], (scale, zero_point), strict=True):
        assert value is not None and value.dtype is not None and value.const_value is not None
        stored = np.asarray(storable_scale(array, value.dtype)).astype(value.dtype.numpy())
        shape = value.const_value.numpy().shape
        value.const_value = ir.Tensor(stored.reshape(shape), dtype=value.dtype, name=value.name)


def write_clip(node: ir.Node, scale: Array, zero_point: Array, number_format: NumberFormat) -> None:
    """Move the bounds of the Clip that narrows a quantizer to where its codes end."""
    source = node.inputs[0]
    producer = None if source is None else source.producer()
    if producer is None or CLIP not in producer.metadata_props:
        return  # a Clip of the model's own keeps its bounds
    offset = np.asarray(zero_point).astype(np.float32)
    for value, code in zip(producer.inputs[1:3], (number_format.low, number_format.high), strict=True):
        assert value is not None and value.dtype is not None
        bound = np.asarray((code - offset) * np.asarray(scale)).astype(value.dtype.numpy())
        value.const_value = ir.Tensor(bound, dtype=value.dtype, name=value.name)
