"""How much to scale each channel of an activation down, and the weights that read it up, before both are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration.channels import KEPT_ROWS, ChannelStatistics
from onnxq.calibration.signed_scales import scale_rows
from onnxq.passes.smooth_activations import Group
from onnxq.scheme import Spec
from onnxq.targets import Placement

Array = np.ndarray[Any, Any]

JUDGED_OUTPUTS = 4096
SMALLEST_SHARE = 1e-6  # of the largest power: what is below it is silent
TINY = float(np.finfo(np.float32).tiny)
SMALLEST = 1e-5  # of a maximum: below it a channel is as good as always zero


def weight_specs(placement: Placement) -> dict[ir.Node, Spec]:
    """How the weight of each node is going to be quantized."""
    sites = [site for site in placement.sites if graphs.is_constant(site.value)]
    return {node: site.spec for site in sites for node, _ in site.uses}


def migration(activations: Array, weights: Array, alpha: float) -> Array:
    """SmoothQuant's s = max|X|^α / max|W|^(1−α) per channel (arXiv 2211.10438, equation 4).

    Args:
        activations: The largest magnitude of each channel.
        weights: The largest magnitude of the weights that read it.
        alpha: How much of the difficulty goes to the weights.

    Returns:
        The scale of each channel; 1 where the channel or its weights are always zero.
    """
    known = (activations > SMALLEST) & (weights > SMALLEST)
    activations, weights = np.maximum(activations, SMALLEST), np.maximum(weights, SMALLEST)
    scale: Array = activations.astype(np.float64) ** alpha / weights.astype(np.float64) ** (1 - alpha)
    return np.asarray(np.where(known, np.clip(scale, SMALLEST, 1 / SMALLEST), 1.0))


def salience(magnitudes: Array, ratio: float) -> Array:
    """AWQ's s = mean|X|^r per channel, its extremes on either side of 1 (arXiv 2306.00978, equation 5).

    Args:
        magnitudes: The mean magnitude of each channel.
        ratio: r.
    """
    scale: Array = np.maximum(magnitudes.astype(np.float64) ** ratio, 1e-4)
    scale = np.where(magnitudes > 0, scale, 1.0)
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()))


def weight_maxima(group: Group) -> Array:
    """The largest magnitude of the weights that read each channel, over all layers of the group."""
    maxima: Array = np.max([np.abs(group.matrix(layer)).max(axis=0) for layer in group.layers], axis=0)
    return maxima


def least_output_error(
    group: Group,
    statistics: ChannelStatistics,
    candidates: Iterable[Array],
    specs: Mapping[ir.Node, Spec],
    activations: Spec | None,
) -> Array:
    """The scale with which the outputs of the group's layers come out best, once weights and activations are rounded.

    Args:
        group: Layers that read one value; with a convolution among them their error is an estimate.
        statistics: Of that value; its rows are the test.
        candidates: Scales to try.
        specs: How the weights of nodes are quantized; a node that is not there keeps its weight.
        activations: How the value is quantized; ``None`` keeps it float.
    """
    candidates = list(candidates)
    if activations is not None and any(layer.node.op_type == "Conv" for layer in group.layers):
        return min(candidates, key=lambda scale: expected_error(group, statistics, scale, specs, activations))
    errors, _ = output_errors(group, statistics, [(scale, False) for scale in candidates], specs, activations)
    return candidates[int(np.argmin(errors.sum(axis=1)))]


def output_errors(
    group: Group,
    statistics: ChannelStatistics,
    treatments: Sequence[tuple[Array, bool]],
    specs: Mapping[ir.Node, Spec],
    activations: Spec | None,
    rows: int = KEPT_ROWS,
) -> tuple[Array, Array]:
    """The squared errors of the layers' outputs, [treatments, rows], and their squared outputs, [rows].

    Args:
        group: Matrix products that read one value.
        statistics: Of that value; its rows are the test.
        treatments: The scale of each channel, and whether each row is rounded over its own range, as behind
            :class:`NormaliseTokens`.
        specs: How the weights of nodes are quantized; a node that is not there keeps its weight.
        activations: How the value is quantized; ``None`` keeps it float.
        rows: How many rows to judge on, at most.
    """
    given = statistics.rows[:: max(1, -(-len(statistics.rows) // rows))]
    errors, power = np.zeros((len(treatments), len(given))), np.zeros(len(given))
    inputs = [
        _round_activations(statistics, given, scale.astype(np.float32), activations, tokenwise)
        for scale, tokenwise in treatments
    ]
    for layer in group.layers:
        matrix, spec = _judged(group, layer), specs.get(layer.node)
        exact = given @ matrix.T
        power += np.square(exact).sum(axis=1, dtype=np.float64)
        for index, (scale, _) in enumerate(treatments):
            scaled = matrix * scale.astype(np.float32)
            rounded = scaled if spec is None else round_matrix(scaled, spec)
            errors[index] += np.square(inputs[index] @ rounded.T - exact).sum(axis=1, dtype=np.float64)
    return errors, power


def expected_error(
    group: Group,
    statistics: ChannelStatistics,
    scale: Array,
    specs: Mapping[ir.Node, Spec],
    activations: Spec,
) -> float:
    """The error that one scale leaves of the layers' outputs, as a share of each output channel's own power.

    Of its own, because what comes behind gives each channel a weight that its size does not tell. Errors of channels,
    and of the taps of a kernel, count as independent: then what rounding does to each channel of the value, times the
    squared weights that read it, and what it does to each weight, times the squared value, add up.

    Args:
        group: Layers that read one value, convolutions or products.
        statistics: Of that value; its rows are the test.
        scale: What each channel is divided by.
        specs: How the weights of nodes are quantized; a node that is not there keeps its weight.
        activations: How the value is quantized.
    """
    rows = statistics.rows.astype(np.float64)
    rounded = _round_activations(statistics, statistics.rows, scale.astype(np.float32), activations, False)
    noise = np.square(rounded * scale - rows).mean(axis=0)
    power = np.square(rows).mean(axis=0)
    total = 0.0
    for layer in group.layers:
        weight, spec = group.kernel(layer).astype(np.float64), specs.get(layer.node)  # [outputs, channels read, taps]
        read = group.channels_read(layer, len(weight))  # [outputs, channels they read]
        squared = np.square(weight).sum(axis=2)
        error, signal = (squared * noise[read]).sum(axis=1), (squared * power[read]).sum(axis=1)
        if spec is not None:
            scaled = weight * scale[read][:, :, None]
            codes = round_matrix(scaled.reshape(len(weight), -1), spec).reshape(weight.shape)
            error += (np.square((codes - scaled) / scale[read][:, :, None]).sum(axis=2) * power[read]).sum(axis=1)
        total += float((error / np.maximum(signal, SMALLEST_SHARE * signal.max() + TINY)).mean())
    return total


def _judged(group: Group, layer: layer_nodes.WeightedNode) -> Array:
    """The weight [output channels, channels]; of a layer as wide as a vocabulary, some outputs, evenly spread."""
    matrix = group.matrix(layer)
    judged: Array = matrix[:: -(-len(matrix) // JUDGED_OUTPUTS)].astype(np.float32)
    return judged


def _round_activations(
    statistics: ChannelStatistics, rows: Array, scale: Array, spec: Spec | None, tokenwise: bool
) -> Array:
    values: Array = rows / scale
    if spec is None or not spec.enabled:
        return values
    if tokenwise:
        largest = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        step, zero_point = scale_and_zero_point(-1.0, 1.0, spec.format, symmetric=spec.symmetric)
        return np.asarray(fake_quantize(values / largest, step, zero_point, spec.format) * largest)
    low, high = (statistics.low / scale).min(), (statistics.high / scale).max()
    step, zero_point = scale_and_zero_point(low, high, spec.format, symmetric=spec.symmetric)
    return fake_quantize(values, step, zero_point, spec.format)


def round_matrix(matrix: Array, spec: Spec) -> Array:
    """A weight [output channels, input channels] as its codes will mean it, scales from the extremes."""
    rows = as_rows(matrix, spec)
    scale, zero_point = scale_rows(rows, rows.min(axis=1), rows.max(axis=1), spec)
    return from_rows(fake_quantize(rows, scale, zero_point, spec.format, axis=0), matrix.shape)


def as_rows(matrix: Array, spec: Spec) -> Array:
    """The numbers that share a scale, one row for each; a last block that is cut short is filled with zeros."""
    if spec.granularity == "tensor":
        return matrix.reshape(1, -1)
    if spec.granularity == "channel" or not spec.block_size:
        return matrix
    padding = -matrix.shape[1] % spec.block_size
    return np.pad(matrix, ((0, 0), (0, padding))).reshape(-1, spec.block_size)


def from_rows(rows: Array, shape: Sequence[int]) -> Array:
    """The inverse of :func:`as_rows`."""
    if rows.size == shape[0] * shape[1]:
        return rows.reshape(shape)
    return rows.reshape(shape[0], -1)[:, : shape[1]]
