"""Large inner values as what is wanted of them: extremes, an even part, and means of channels, found in the graph.

The values of a picture of 512² between the layers of a decoder of latents are gigabytes together, and running again for
a few of them at a time takes as many runs. Reduced where they are made, they are gone again before the next ones come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.folding import new_initializer

Array = np.ndarray[Any, Any]

KEPT_VALUES = 1 << 15
LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Condensed:
    """What is left of a value.

    Attributes:
        lows: The smallest number of each row [rows], float32.
        highs: The largest.
        part: Evenly spaced numbers, as :func:`thinned` takes them.
        size: How many numbers the value has.
        means: Of each channel [channels], by the axis that they may lie along (see :func:`mean_axes`); if asked for.
    """

    lows: Array
    highs: Array
    part: Array
    size: int
    means: dict[int, Array] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """What the whole value takes, in float32."""
        return 4 * self.size


def thinned(values: Array | Condensed) -> Array:
    """An evenly spaced part of the values, few enough to keep for every tap; an odd step meets all columns.

    A copy, because an output keeps the whole memory arena of its session alive.
    """
    if isinstance(values, Condensed):
        return values.part.copy()
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // KEPT_VALUES) | 1].copy()


def condensed(values: Sequence[Array], axes: Sequence[int]) -> Condensed:
    """The results of :func:`condense` as one, the last of them means along these axes."""
    lows, highs, part, size, *means = values
    return Condensed(lows, highs, part, int(size), dict(zip(axes, means, strict=True)))


def mean_axes(rank: int) -> tuple[int, ...]:
    """The axes that a layer's input channels may lie along in a value of so many axes."""
    return (1, -1) if rank > 2 else (0, -1)


def can_be_condensed(value: ir.Value) -> bool:
    """Whether an op makes the value, of floats in rows."""
    return value.producer() is not None and graphs.is_float(value) and (graphs.rank(value) or 0) > 1


def condense(graph: ir.Graph, taps: Sequence[ir.Value], means: bool) -> dict[str, tuple[list[ir.Value], list[int]]]:
    """Add to a graph what reduces values right after they are made.

    Args:
        graph: Changed in place.
        taps: The values (see :func:`can_be_condensed`).
        means: Whether means of channels are wanted too.

    Returns:
        By the value's name its results, in the order that :func:`condensed` wants, and the axes of the means.
    """
    reduce = _Reduction(graph, graphs.Names(graph))
    found = {}
    for value in taps:
        axes = list(mean_axes(graphs.rank(value) or 0)) if means else []
        found[value.name or ""] = reduce(value, axes), axes
    return found


class _Reduction:
    def __init__(self, graph: ir.Graph, names: graphs.Names) -> None:
        self.graph, self.names = graph, names
        numbers = {
            "rows": [0, -1],
            "all": [-1],
            "first": [0],
            "along": [1],
            "end": [LAST],
            "one": 1,
            "kept": KEPT_VALUES,
        }
        self._constants = {
            name: new_initializer(graph, f"condensed_{name}", np.asarray(number, np.int64), ir.DataType.INT64, names)
            for name, number in numbers.items()
        }

    def __call__(self, value: ir.Value, axes: Sequence[int]) -> list[ir.Value]:
        tape, known = ir.tape.Tape(), self._constants
        producer, rank = value.producer(), graphs.rank(value) or 0
        assert producer is not None
        source = value
        if value.dtype != ir.DataType.FLOAT:
            source = tape.op("Cast", [value], {"to": ir.DataType.FLOAT})
        rows = tape.op("Reshape", [source, known["rows"]])
        flat = tape.op("Reshape", [source, known["all"]])
        size = tape.op("Size", [value])
        step = tape.op("BitwiseOr", [tape.op("Div", [size, known["kept"]]), known["one"]])  # thinned's, odd
        step = tape.op("Reshape", [step, known["all"]])
        made = [
            tape.op("ReduceMin", [rows, known["along"]], {"keepdims": 0}),
            tape.op("ReduceMax", [rows, known["along"]], {"keepdims": 0}),
            tape.op("Slice", [flat, known["first"], known["end"], known["first"], step]),
            size,
        ]
        for axis in axes:
            others = np.array([place for place in range(rank) if place != axis % rank], np.int64)
            over = new_initializer(self.graph, f"{value.name}_others", others, ir.DataType.INT64, self.names)
            made.append(tape.op("ReduceMean", [source, over], {"keepdims": 0}))
        for index, node in enumerate(tape.nodes):
            node.name = self.names.free(f"{value.name}_condensed_{index}")
            node.outputs[0].name = self.names.free(f"{value.name}_condensed_value_{index}")
        for result in made:
            result.type = ir.TensorType(ir.DataType.INT64 if result is size else ir.DataType.FLOAT)
        self.graph.insert_after(producer, tape.nodes)
        return made
