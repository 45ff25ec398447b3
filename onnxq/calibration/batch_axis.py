"""Which inputs of a model have a row for each sample, and which are the same whole thing for a batch."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

COLOURS = 3
LEAST_SIDE = 16  # pixels; of what is taken for one picture


def whole_inputs(inputs: Sequence[ir.Value]) -> set[str]:
    """Names of the inputs without a batch axis.

    They are told by how they differ from the first input that has several axes, whose first one is the batch:

    * a single number (rank 0), as the timestep of some denoisers;
    * a first axis that is fixed to another size, as positions [16, 3] beside [batch, 16, 64] (FLUX), or a size [2]
      beside [1, 256, 64, 64] (SAM);
    * a first axis of 1 of a switch beside a free batch, as ``use_cache_branch`` [1];
    * a free first axis that is a later one of another input, as ``cache_position`` [sequence] beside
      [batch, sequence].

    An only input [3, height, width] is one picture, as torchvision's detectors read it.
    """
    shapes = {value.name or "": [_size(size) for size in value.shape] for value in inputs if value.shape is not None}
    whole = {name for name, shape in shapes.items() if not shape}
    leading = next((name for name, shape in shapes.items() if len(shape) > 1), None)
    if leading is None:
        return whole
    if len(inputs) == 1:
        channels, *sides = shapes[leading]
        is_picture = channels == COLOURS and len(sides) == 2
        small = any(isinstance(side, int) and side < LEAST_SIDE for side in sides)
        return {leading} if is_picture and not small else whole
    batch = shapes[leading][0]
    switches = {value.name for value in inputs if value.dtype == ir.DataType.BOOL}
    for name, (first, *_) in ((name, shape) for name, shape in shapes.items() if shape):
        elsewhere = {size for other, shape in shapes.items() if other != name for size in shape[1:]}
        if first not in (1, None, batch) and (isinstance(first, int) or first in elsewhere):
            whole.add(name)
        if name in switches and shapes[name] == [1] and not isinstance(batch, int):
            whole.add(name)
    return whole


def _size(size: int | ir.SymbolicDim) -> int | str | None:
    """A fixed size, the name of a free one, or ``None``; some exporters write -1 or 0 for what is free."""
    if isinstance(size, int):
        return size if size > 0 else None
    return size.value or None
