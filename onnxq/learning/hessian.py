"""What a layer's inputs look like together: E[x·xᵀ], summed batch by batch from what the layer reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from onnxq import graph as graphs

UNFOLDED_VALUES = 1 << 24  # of an im2col matrix that exist at once


@dataclass(frozen=True)
class Layer:
    """A weighted node as products of matrices: ``groups`` times [rows, columns] with inputs of ``columns`` numbers.

    Attributes:
        item: The node, in the Q/DQ graph.
        shape: The shape of its weight.
        groups: 1, but for grouped convolutions.
    """

    item: graphs.WeightedNode
    shape: tuple[int, ...]
    groups: int

    @property
    def activation(self) -> str:
        """The name of the value that the layer reads, behind its Q/DQ if it has one."""
        return self.item.activation.name or ""

    @property
    def geometry(self) -> tuple[object, ...]:
        """What its inputs depend on: layers of one geometry that read one value share a Hessian."""
        attributes = self.item.node.attributes
        names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides", "transA")
        kernel = self.shape[2:] if self.item.node.op_type == "Conv" else ()
        kind = (self.item.node.op_type == "Conv", self.item.activation_index, kernel)
        return (self.activation, *kind, *(attributes[name].value if name in attributes else None for name in names))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or anything of its shape, as [groups, rows, columns]."""
        if self.item.node.op_type == "Conv":
            return weight.reshape(self.groups, self.shape[0] // self.groups, -1)
        return (weight if self.item.channel_axis == 0 else weight.mT)[None]

    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        if self.item.node.op_type == "Conv":
            return matrix.reshape(self.shape)
        return matrix[0] if self.item.channel_axis == 0 else matrix[0].mT.contiguous()

    def inputs(self, activation: Tensor) -> Tensor:
        """What the products are taken with: [groups, positions, columns]."""
        if self.item.node.op_type == "Conv":
            return unfold(activation, self.item.node, self.shape)
        transposed = self.item.node.op_type == "Gemm" and bool(self.item.node.attributes.get_int("transA", 0))
        if transposed or self.item.activation_index == 1:  # X of W·X has its channels in rows
            activation = activation.mT
        return activation.reshape(1, -1, activation.shape[-1])


def layer(item: graphs.WeightedNode) -> Layer | None:
    """The layer of a node whose weight is a matrix or a kernel, or ``None``."""
    weight, node = item.weight, item.node
    if weight is None or weight.shape is None or not weight.shape.is_static():
        return None
    shape = tuple(weight.shape.numpy())
    if node.op_type == "Conv":
        return Layer(item, shape, node.attributes.get_int("group", 1))
    return Layer(item, shape, 1) if node.op_type in ("Gemm", "MatMul") and len(shape) == 2 else None


def unfold(activation: Tensor, node: ir.Node, shape: tuple[int, ...]) -> Tensor:
    """The im2col matrix of a convolution over any number of axes: [groups, positions, columns].

    Args:
        activation: [batch, channels, spatial …].
        node: The Conv.
        shape: Its weight's shape, [out, channels / groups, kernel …].
    """
    kernel, rank = shape[2:], len(shape) - 2
    strides = list(node.attributes.get_ints("strides", [1] * rank))
    dilations = list(node.attributes.get_ints("dilations", [1] * rank))
    begin, end = _pads(node, activation.shape[2:], kernel, strides, dilations)
    pairs = [size for axis in reversed(range(rank)) for size in (begin[axis], end[axis])]
    padded = functional.pad(activation, pairs)
    windows = padded
    for axis in range(rank):
        windows = windows.unfold(2 + axis, (kernel[axis] - 1) * dilations[axis] + 1, strides[axis])
    for axis, dilation in enumerate(dilations):
        taken = torch.arange(0, windows.shape[2 + rank + axis], dilation, device=windows.device)
        windows = windows.index_select(2 + rank + axis, taken) if dilation > 1 else windows
    groups = node.attributes.get_int("group", 1)
    split = windows.reshape(windows.shape[0], groups, -1, *windows.shape[2:])
    order = [1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank)]  # groups, batch, positions, columns
    return split.permute(order).reshape(groups, -1, shape[1] * math.prod(kernel))


def _pads(
    node: ir.Node, sizes: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    rank = len(kernel)
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic not in ("SAME_UPPER", "SAME_LOWER"):
        pads = list(node.attributes.get_ints("pads", [0] * 2 * rank)) if automatic != "VALID" else [0] * 2 * rank
        return pads[:rank], pads[rank:]
    totals = [
        max(0, (-(-sizes[axis] // strides[axis]) - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1 - size)
        for axis, size in enumerate(sizes)
    ]
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (less, more) if automatic == "SAME_UPPER" else (more, less)


class Hessian:
    """E[x·xᵀ] and E[x] of what one or more layers read, summed batch by batch: memory does not grow with samples."""

    def __init__(self) -> None:
        self.products: Tensor | None = None  # [groups, columns, columns]
        self.sums: Tensor | None = None  # [groups, columns]
        self.count = 0

    def update(self, layer: Layer, activation: Tensor) -> None:
        """Add a batch of what the layer reads."""
        per_sample = max(1, activation[:1].numel()) * math.prod(layer.shape[2:])
        rows = activation.shape[0] if layer.item.node.op_type != "Conv" else max(1, UNFOLDED_VALUES // per_sample)
        for part in torch.split(activation.to(torch.float32), rows):
            inputs = layer.inputs(part)
            products = (inputs.mT @ inputs).to(torch.float64)
            sums = inputs.sum(dim=1, dtype=torch.float64)
            self.products = products if self.products is None else self.products.add_(products)
            self.sums = sums if self.sums is None else self.sums.add_(sums)
            self.count += inputs.shape[1]

    def merge(self, other: Hessian) -> None:
        """Add what another one has seen."""
        if other.products is None or other.sums is None:
            return
        self.products = other.products.clone() if self.products is None else self.products.add_(other.products)
        self.sums = other.sums.clone() if self.sums is None else self.sums.add_(other.sums)
        self.count += other.count

    @property
    def value(self) -> Tensor:
        """E[x·xᵀ], [groups, columns, columns] in float64."""
        if self.products is None:
            raise RuntimeError("update() comes before value")
        return self.products / max(1, self.count)

    @property
    def mean(self) -> Tensor:
        """E[x], [groups, columns] in float64."""
        if self.sums is None:
            raise RuntimeError("update() comes before mean")
        return self.sums / max(1, self.count)

    @property
    def covariance(self) -> Tensor:
        """E[x·xᵀ] − E[x]·E[x]ᵀ: the error that is left once the layer's bias has taken back its mean."""
        mean = self.mean
        return self.value - mean[:, :, None] * mean[:, None, :]
