"""Random windows of large maps, so that a step of learning costs the same at 224² as at 32².

A block of convolutions computes the middle of a window as it computes the middle of the whole map: what lies near the
window's border reads padding instead of neighbours and is left out, unless the border is the map's own. Blocks with
anything else in them (global pooling, attention, a gate) need whole maps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from onnxq import graph as graphs
from onnxq.autograd.blocks import ELEMENTWISE, Block

WINDOWED = ("Conv", "MaxPool", "AveragePool")
POINTWISE = (*ELEMENTWISE, "Clip", "QuantizeLinear", "DequantizeLinear")
BY_CHANNEL = ("QuantizeLinear", "DequantizeLinear", "BatchNormalization")  # whose vectors go with channels
AXES = 2


@dataclass(frozen=True)
class _Axis:
    """How a value lies to the block's inputs along one axis.

    Attributes:
        stride: Inputs from one value to the next.
        before: Values at the start of a window that are not what they are in the whole map.
        after: The same at its end.
    """

    stride: int = 1
    before: int = 0
    after: int = 0

    def through(self, kernel: int, stride: int, start: int, end: int) -> _Axis | None:
        """Behind a kernel with padding, or ``None`` where a window's values would not lie on the map's."""
        if not 0 < kernel - start - end <= stride:
            return None
        before = -(-(self.before + start) // stride)
        after = -(-(self.after + kernel - start) // stride) - 1
        return _Axis(self.stride * stride, before, max(after, 0))

    def joined(self, other: _Axis) -> _Axis | None:
        """Of a sum of both."""
        if self.stride != other.stride:
            return None
        return _Axis(self.stride, max(self.before, other.before), max(self.after, other.after))


@dataclass(frozen=True)
class Windows:
    """Where windows of a block's inputs may lie, and which part of what they give is exact.

    Attributes:
        sizes: Height and width of the block's inputs.
        sides: Height and width of a window.
        axes: How the block's output lies to them.
    """

    sizes: tuple[int, int]
    sides: tuple[int, int]
    axes: tuple[_Axis, _Axis]

    def draw(self, choice: np.random.Generator) -> Window:
        """A window at random, anywhere in the map."""
        starts = [
            int(choice.integers(0, (size - side) // axis.stride + 1)) * axis.stride
            for size, side, axis in zip(self.sizes, self.sides, self.axes, strict=True)
        ]
        return Window(self, (starts[0], starts[1]))


@dataclass(frozen=True)
class Window:
    """One window."""

    windows: Windows
    starts: tuple[int, int]

    @property
    def read(self) -> tuple[slice, slice]:
        """Rows and columns of the block's inputs."""
        rows, columns = (
            slice(start, start + side) for start, side in zip(self.starts, self.windows.sides, strict=True)
        )
        return rows, columns

    @property
    def expected(self) -> tuple[slice, slice]:
        """Rows and columns of the block's output in the whole map that the window gives exactly."""
        rows, columns = (self._exact(index, self.starts[index] // self.windows.axes[index].stride) for index in (0, 1))
        return rows, columns

    def exact(self, found: Tensor) -> Tensor:
        """That part of what the block makes of the window."""
        rows, columns = self._exact(0, 0), self._exact(1, 0)
        return found[..., rows, columns]

    def _exact(self, index: int, offset: int) -> slice:
        start, side, size = self.starts[index], self.windows.sides[index], self.windows.sizes[index]
        axis = self.windows.axes[index]
        first = axis.before if start > 0 else 0  # the map's own border is padded as it should be
        last = side // axis.stride - (axis.after if start + side < size else 0)
        return slice(offset + first, offset + last)


def windows_of(
    graph: ir.Graph, block: Block, names: Collection[str], shapes: Mapping[str, tuple[int, ...]], side: int
) -> Windows | None:
    """The windows of a block, or ``None`` where it needs whole maps or they are hardly larger than a window.

    Args:
        graph: The Q/DQ graph.
        block: The block.
        names: All values inside it.
        shapes: Of the block's inputs.
        side: Height and width of a window, in the block's inputs; rounded up to what its strides allow.
    """
    sizes = {shapes[name][2:] for name in block.inputs}
    if len(sizes) != 1 or any(len(shapes[name]) != AXES + 2 for name in block.inputs):
        return None
    height, width = sizes.pop()
    axes = _axes(graph, block, names)
    if axes is None or any(size % axis.stride for size, axis in zip((height, width), axes, strict=True)):
        return None
    sides = [-(-side // axis.stride) * axis.stride for axis in axes]
    if height * width < 2 * sides[0] * sides[1] or sides[0] > height or sides[1] > width:
        return None
    if any(2 * (axis.before + axis.after) > length // axis.stride for length, axis in zip(sides, axes, strict=True)):
        return None  # most of what is computed would be left out
    return Windows((height, width), (sides[0], sides[1]), axes)


def _axes(graph: ir.Graph, block: Block, names: Collection[str]) -> tuple[_Axis, _Axis] | None:
    """How the block's output lies to its inputs; ``None`` where it holds more than windows can be taken through."""
    known: dict[str, tuple[_Axis, _Axis]] = {name: (_Axis(), _Axis()) for name in block.inputs}
    for node in graph:
        outputs = [value.name or "" for value in node.outputs]
        read = [value.name for value in node.inputs if value is not None and value.name in known]
        if not read or outputs[0] not in names:
            continue
        found = [known[name] for name in read if name is not None]
        if graphs.is_op(node, *WINDOWED) and len(found) == 1:
            made = _through(node, found[0])
        elif graphs.is_op(node, *POINTWISE) and all(_is_pointwise(node, value, known) for value in node.inputs):
            made = found[0]
            for other in found[1:]:
                made = None if made is None else _both(made[0].joined(other[0]), made[1].joined(other[1]))
        else:
            made = None
        if made is None:
            return None
        known[outputs[0]] = made
    return known.get(block.output)


def _through(node: ir.Node, axes: tuple[_Axis, _Axis]) -> tuple[_Axis, _Axis] | None:
    attributes = node.attributes
    if attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or attributes.get_int("ceil_mode", 0) != 0:
        return None
    weight = node.inputs[1] if node.op_type == "Conv" else None
    default = [] if weight is None or weight.shape is None else [int(size) for size in weight.shape.numpy()[2:]]
    kernel = attributes.get_ints("kernel_shape", default)
    strides = attributes.get_ints("strides", [1] * AXES)
    dilations = attributes.get_ints("dilations", [1] * AXES)
    pads = attributes.get_ints("pads", [0] * (2 * AXES))
    if len(kernel) != AXES:
        return None
    made = [
        axis.through((kernel[index] - 1) * dilations[index] + 1, strides[index], pads[index], pads[index + AXES])
        for index, axis in enumerate(axes)
    ]
    return _both(made[0], made[1])


def _both(first: _Axis | None, second: _Axis | None) -> tuple[_Axis, _Axis] | None:
    return None if first is None or second is None else (first, second)


def _is_pointwise(node: ir.Node, value: ir.Value | None, known: Collection[str]) -> bool:
    """Whether an input of an elementwise op is part of the maps, or the same at every place of them."""
    if value is None or value.name in known:
        return True
    if not graphs.is_constant(value) or value.shape is None or not value.shape.is_static():
        return False
    sizes = value.shape.numpy()
    if len(sizes) == 1 and node.op_type in BY_CHANNEL:
        return True
    return int(np.prod(sizes)) == 1 or (len(sizes) > AXES and tuple(sizes[-AXES:]) == (1, 1))
