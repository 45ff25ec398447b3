"""How many numbers inner values have, and how many of them are held at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import shapes
from onnxq.runtime import Feed

LARGEST_VALUE = 1 << 28  # numbers of one inner value of all samples of a run
TAPPED_VALUES = 2 << 20  # numbers of inner values that are returned at once


def tapped_together(values: Iterable[ir.Value]) -> Iterator[list[ir.Value]]:
    """Values in groups of a few MiB: running again is cheaper than holding all at once."""
    group: list[ir.Value] = []
    size = 0
    for value in values:
        elements = elements_of(value)
        if group and size + elements > TAPPED_VALUES:
            yield group
            group, size = [], 0
        group.append(value)
        size += elements
    if group:
        yield group


def elements_of(value: ir.Value) -> int:
    """How many elements one sample of a value has, as far as its shape is known."""
    return math.prod(length if isinstance(length, int) else 1 for length in value.shape or ())


def rows_that_fit(graph: ir.Graph, most: int) -> int:
    """How many samples run at once, so that no inner value takes more than a GiB, as far as shapes are known.

    Scores of attention over a picture of 64² latents are half of one, for each sample.
    """
    largest = max((elements_of(value) for node in graph for value in node.outputs), default=1)
    return max(1, min(most, LARGEST_VALUE // max(largest, 1)))


def elements_in(model: ir.Model, names: Sequence[str], feed: Feed) -> int:
    """How many numbers inner values have together when the model reads ``feed``; a size that is not known counts as 1.

    Args:
        model: A model with shapes.
        names: Names of values.
        feed: What it reads, whose sizes tell what the model leaves free.
    """
    values = graphs.values(model.graph)
    if any(not isinstance(size, int) for name in names for size in (values[name].shape or ("",))[1:]):
        fixed = model.clone()
        for value in fixed.graph.inputs:
            if (read := feed.get(value.name or "")) is not None:
                value.shape = ir.Shape(read.shape)
        shapes.infer(fixed)
        values = graphs.values(fixed.graph)
    rows = max((len(array) for array in feed.values() if array.ndim), default=1)
    first = [(values[name].shape or (1,))[:1] for name in names]
    return sum(
        elements_of(values[name]) * (1 if axes and isinstance(axes[0], int) else rows)
        for name, axes in zip(names, first, strict=True)
    )
