"""The quantizers of a Q/DQ graph as learning sees them: what they read, what they make, where their parameters are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxq import graph as graphs
from onnxq.arithmetic import storable_scale
from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.autograd.ops.operands import narrowed
from onnxq.passes.insert_qdq import CLIP, FORMAT, spec_of

SCALE = 1  # which input of a QuantizeLinear


@dataclass(frozen=True)
class Quantizer:
    """One Q/DQ pair, with the Clip before it where the width is odd.

    Attributes:
        source: The float value: an activation, or the name of a weight's initializer.
        output: What the pair makes of it.
        scale: The scale's initializer.
        zero_point: The zero point's initializer.
        low: The smallest code.
        high: The largest code.
        axis: The axis of scales per channel or block, ``None`` for one scale.
        block_size: Elements of ``axis`` that share a scale, ``None`` without blocks.
        clip: The initializers of the Clip's bounds, if there is one.
        is_weight: Whether the source is constant.
        float_type: What codes are where they are floating-point numbers (FP8, FP4), ``None`` for integers.
        symmetric: Whether the zero point stays in the middle of the codes.
    """

    source: str
    output: str
    scale: str
    zero_point: str
    low: float
    high: float
    axis: int | None
    block_size: int | None
    clip: tuple[str, str] | None
    is_weight: bool
    float_type: ir.DataType | None = None
    symmetric: bool = True


def find(graph: ir.Graph) -> list[Quantizer]:
    """Every Q/DQ pair of the graph, in order."""
    found = []
    for node in graph:
        if not graphs.is_quantize(node) or FORMAT not in node.metadata_props:
            continue
        source, scale, zero_point = node.inputs[:3]
        assert source is not None and scale is not None and zero_point is not None
        reader = next(reader for reader, _ in graphs.consumers(node.outputs[0]) if graphs.is_dequantize(reader))
        spec = spec_of(node)
        number_format = spec.format
        clip = None
        producer = source.producer()
        if producer is not None and CLIP in producer.metadata_props:
            clip = (_name(producer.inputs[1]), _name(producer.inputs[2]))
            source = producer.inputs[0]
        per_tensor = scale.const_value is None or not scale.const_value.shape
        found.append(
            Quantizer(
                source=_name(source),
                output=_name(reader.outputs[0]),
                scale=_name(scale),
                zero_point=_name(zero_point),
                low=number_format.low,
                high=number_format.high,
                axis=None if per_tensor else node.attributes.get_int("axis", 1),
                block_size=node.attributes.get_int("block_size", 0) or None,
                clip=clip,
                is_weight=graphs.is_constant(source),
                float_type=number_format.storage if number_format.is_float else None,
                symmetric=spec.symmetric,
            )
        )
    return found


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name


def as_float(quantizers: Iterable[Quantizer]) -> dict[str, Replacement]:
    """Replacements that make the Q/DQ graph compute what the float graph does."""
    return {item.output: Replacement((item.source,), _identity) for item in quantizers}


def _identity(value: Tensor) -> Tensor:
    return value


def round_through(value: Tensor, float_type: ir.DataType | None = None) -> Tensor:
    """Round to the nearest code (see :func:`nearest_codes`); the gradient passes through."""
    return value + (nearest_codes(value, float_type) - value).detach()


def nearest_codes(steps: Tensor, float_type: ir.DataType | None) -> Tensor:
    """Multiples of the step as codes, half to even: integers, or numbers of FP8 or FP4."""
    return steps.round() if float_type is None else narrowed(steps, float_type).to(steps.dtype)


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """The value as it is, with its gradient times a factor."""
    return value.detach() + factor * (value - value.detach())


class Grid:
    """The numbers that a weight quantizer can make: scale and zero point in the shape of the weight.

    Args:
        graph: Where the initializers are.
        quantizer: A weight's quantizer.
    """

    def __init__(self, graph: TorchGraph, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.weight = read(graph, quantizer.source)
        self.scale = read(graph, quantizer.scale)
        self.low, self.high = quantizer.low, quantizer.high
        self.zero_point = self.spread(read(graph, quantizer.zero_point).to(torch.float32))

    def spread(self, parameter: Tensor) -> Tensor:
        """A scale or zero point so that it broadcasts against the weight."""
        axis, block = self.quantizer.axis, self.quantizer.block_size
        if axis is None:
            return parameter.reshape(())
        axis %= self.weight.ndim
        if block is not None:
            return parameter.repeat_interleave(block, axis).narrow(axis, 0, self.weight.shape[axis])
        return parameter.reshape([-1 if index == axis else 1 for index in range(self.weight.ndim)])

    def nearest(self, weight: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """The weight rounded to the nearest numbers of the grid, with straight-through gradients."""
        step = self.spread(self.scale if scale is None else scale)
        steps = (self.weight if weight is None else weight) / step
        codes = round_through(steps, self.quantizer.float_type) + self.zero_point
        return (codes.clamp(self.low, self.high) - self.zero_point) * step


def read(graph: TorchGraph, name: str) -> Tensor:
    """An initializer's tensor, detached."""
    return graph.run({}, [name])[name].detach()


def store(graph: TorchGraph, tensors: dict[str, Tensor] | dict[str, np.ndarray]) -> None:
    """Write tensors into the model's initializers by name."""
    for name, tensor in tensors.items():
        value = graph.model.graph.initializers[name]
        assert value.dtype is not None
        array = tensor.detach().cpu().numpy() if isinstance(tensor, Tensor) else tensor
        if any(graphs.is_quantize(node) and index == SCALE for node, index in graphs.consumers(value)):
            array = storable_scale(array, value.dtype)
        array = array.astype(value.dtype.numpy(), order="C")
        value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
    graph.reload(tensors)


def clip_bounds(quantizer: Quantizer, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """The Clip's bounds that belong to a scale and zero point, by name; nothing where there is no Clip."""
    if quantizer.clip is None:
        return {}
    low, high = quantizer.clip
    return {low: (quantizer.low - zero) * scale, high: (quantizer.high - zero) * scale}


def of_values(quantizers: Sequence[Quantizer], keep: Callable[[Quantizer], bool]) -> list[Quantizer]:
    """Those that fulfil a condition, each scale once."""
    seen: set[str] = set()
    found = []
    for item in quantizers:
        if keep(item) and item.scale not in seen:
            seen.add(item.scale)
            found.append(item)
    return found
