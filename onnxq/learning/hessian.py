"""What a layer's inputs look like together: E[x·xᵀ], summed batch by batch from what the layer reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from onnxq import layer_nodes

UNFOLDED_VALUES = 1 << 24  # of an im2col matrix that exist at once


@dataclass(frozen=True)
class Layer:
    """A weighted node as products of matrices: ``groups`` times [rows, columns] with inputs of ``columns`` numbers.

    Attributes:
        item: The node, in the Q/DQ graph.
        shape: The shape of its weight.
        groups: 1, but for grouped convolutions.
    """

    item: layer_nodes.WeightedNode
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
        """What the products are taken with: [groups, columns, positions]."""
        if self.item.node.op_type == "Conv":
            return unfold(activation, self.item.node, self.shape)
        transposed = self.item.node.op_type == "Gemm" and bool(self.item.node.attributes.get_int("transA", 0))
        if transposed or self.item.activation_index == 1:  # X of W·X has its channels in rows
            activation = activation.mT
        return activation.reshape(1, -1, activation.shape[-1]).mT


def layer(item: layer_nodes.WeightedNode) -> Layer | None:
    """The layer of a node whose weight is a matrix or a kernel, or ``None``."""
    weight, node = item.weight, item.node
    if weight is None or weight.shape is None or not weight.shape.is_static():
        return None
    shape = tuple(weight.shape.numpy())
    if node.op_type == "Conv":
        return Layer(item, shape, node.attributes.get_int("group", 1))
    return Layer(item, shape, 1) if node.op_type in ("Gemm", "MatMul") and len(shape) == 2 else None


def unfold(activation: Tensor, node: ir.Node, shape: tuple[int, ...]) -> Tensor:
    """The im2col matrix of a convolution over any number of axes: [groups, columns, positions].

    Positions come last because they lie beside each other in memory: whole rows of a map are copied.

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
    order = [1, 2, *range(3 + rank, 3 + 2 * rank), 0, *range(3, 3 + rank)]  # groups, columns, batch, positions
    return split.permute(order).reshape(groups, shape[1] * math.prod(kernel), -1)


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
    """E[x·xᵀ] and E[x] of what one or more layers read, summed batch by batch: memory does not grow with samples.

    Where the float network's inputs x' are given too, also the drift d = x' − x from them, as E[d·xᵀ] and E[d].
    """

    def __init__(self) -> None:
        self.count = 0
        self._products: Tensor | None = None  # [groups, columns, columns]
        self._sums: Tensor | None = None  # [groups, columns]
        self._drift_products: Tensor | None = None
        self._drift_sums: Tensor | None = None

    def update(self, layer: Layer, activation: Tensor, exact: Tensor | None = None) -> None:
        """Add a batch of what the layer reads, and of what it reads in the float network."""
        per_sample = max(1, activation[:1].numel()) * math.prod(layer.shape[2:])
        rows = activation.shape[0] if layer.item.node.op_type != "Conv" else max(1, UNFOLDED_VALUES // per_sample)
        drift = None if exact is None else exact.to(torch.float32) - activation.to(torch.float32)
        for start in range(0, activation.shape[0], rows):
            part = slice(start, start + rows)
            inputs = layer.inputs(activation[part].to(torch.float32))
            self._products = _add(self._products, (inputs @ inputs.mT).to(torch.float64))
            self._sums = _add(self._sums, inputs.sum(dim=2).to(torch.float64))
            self.count += inputs.shape[2]
            if drift is not None:
                drifts = layer.inputs(drift[part])
                self._drift_products = _add(self._drift_products, (drifts @ inputs.mT).to(torch.float64))
                self._drift_sums = _add(self._drift_sums, drifts.sum(dim=2).to(torch.float64))

    def merge(self, other: Hessian) -> None:
        """Add what another one has seen."""
        self._products = _add(self._products, other._products)
        self._sums = _add(self._sums, other._sums)
        self._drift_products = _add(self._drift_products, other._drift_products)
        self._drift_sums = _add(self._drift_sums, other._drift_sums)
        self.count += other.count

    @property
    def value(self) -> Tensor:
        """E[x·xᵀ], [groups, columns, columns] in float64."""
        return self._mean_of(self._products)

    @property
    def mean(self) -> Tensor:
        """E[x], [groups, columns] in float64."""
        return self._mean_of(self._sums)

    @property
    def covariance(self) -> Tensor:
        """E[x·xᵀ] − E[x]·E[x]ᵀ: the error that is left once the layer's bias has taken back its mean."""
        return self.value - self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def drift(self) -> Tensor | None:
        """E[d·xᵀ], [groups, columns, columns] in float64; ``None`` where the float network was not looked at."""
        return None if self._drift_products is None else self._mean_of(self._drift_products)

    @property
    def mean_drift(self) -> Tensor:
        """E[d], [groups, columns] in float64; 0 where the float network was not looked at."""
        return torch.zeros_like(self.mean) if self._drift_sums is None else self._mean_of(self._drift_sums)

    @property
    def centred_drift(self) -> Tensor | None:
        """E[d·xᵀ] − E[d]·E[x]ᵀ."""
        drift = self.drift
        return None if drift is None else drift - self.mean_drift[:, :, None] * self.mean[:, None, :]

    def _mean_of(self, sums: Tensor | None) -> Tensor:
        if sums is None:
            raise RuntimeError("update() comes first")
        return sums / max(1, self.count)


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part.clone() if total is None and part is not None else total
    return total.add_(part)
