"""Sizes of inputs that a model leaves free, where no data says them: made inputs and images must have some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from onnxq.calibration.batch_axis import whole_inputs
from onnxq.errors import OnnxqError

CHOSEN = "onnxq.shape"  # of a graph input, in memory only: the file keeps its free sizes


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Read ``--shapes``: ``x:1x3x640x640``, or the three of `onnxq build`, of which the usual one counts.

    Raises:
        OnnxqError: a text is of another form, or an input is named twice.
    """
    from onnxq.engines.shapes import parse_shapes as parse_profiles

    return {name: usual for name, (_, usual, _) in parse_profiles(list(texts)).items()}


def choose(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Have :func:`onnxq.calibration.data.input_specs` say these sizes; the graph itself keeps its free ones.

    Dimensions of one name have one size: what is given for one input holds for the others. A free batch stays free
    where 1 is given for it, unless the model has inputs without a batch axis, as a recurrent state [2, batch, 64].

    Args:
        model: The model.
        shapes: Whole shapes, batch included, by the names of inputs.

    Raises:
        OnnxqError: a name is not an input, or a shape does not fit it.
    """
    inputs = {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}
    has_states = any(inputs[name].shape for name in whole_inputs(list(inputs.values())))
    by_symbol: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in inputs:
            raise OnnxqError(
                f"expected shapes of the model's inputs, found one of {name!r}",
                hint=f"the inputs are: {', '.join(inputs)}",
            )
        own = list(inputs[name].shape or ())
        if len(own) != len(shape) or any(_is_fixed(a) and a != b for a, b in zip(own, shape, strict=True)):
            raise OnnxqError(
                f"expected a shape that fits input {name!r} of shape {spell(own)}, found {spell(shape)}",
                hint="give all its dimensions, the batch first; only those marked ? can be chosen",
            )
        for axis, (dimension, size) in enumerate(zip(own, shape, strict=True)):
            if isinstance(dimension, ir.SymbolicDim) and dimension.value and (axis or size > 1 or has_states):
                by_symbol[dimension.value] = size
    for name, value in inputs.items():
        own = list(value.shape or ())
        chosen = [by_symbol.get(size.value or "") if isinstance(size, ir.SymbolicDim) else None for size in own]
        for axis, size in enumerate(shapes.get(name, ())):
            if axis or size > 1 or has_states:
                chosen[axis] = size
        value.meta[CHOSEN] = tuple(chosen)


def dimensions_of(value: ir.Value) -> tuple[int | None, ...]:
    """An input's dimensions: the model's, else the chosen ones, else ``None``; some exporters write -1 for free."""
    own = list(value.shape or ())
    chosen = value.meta.get(CHOSEN) or [None] * len(own)
    return tuple(size if isinstance(size, int) and size > 0 else other for size, other in zip(own, chosen, strict=True))


def _is_fixed(dimension: int | ir.SymbolicDim) -> bool:
    return isinstance(dimension, int) and dimension > 0


def spell(dimensions: Iterable[int | ir.SymbolicDim]) -> str:
    """A shape as ``--shapes`` takes it, with ``?`` where it is free."""
    return "x".join(str(dimension) if _is_fixed(dimension) else "?" for dimension in dimensions)
