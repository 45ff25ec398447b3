"""What an input that may be a timestep becomes in a graph: waves, or rows of a table."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxq import graph as graphs

TIMESTEP_NAMES = ("t", "timestep", "timesteps", "time", "time_step", "sigma", "step")
BETWEEN_INPUT_AND_EMBEDDING = (
    "Cast", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Mul", "Div", "Add", "Sub", "Identity", "Flatten", "Neg",
    "Log", "Clip",
)  # fmt: skip
DEEPEST_EMBEDDING = 10


def becomes_waves(value: ir.Value) -> bool:
    """Whether sines or cosines are taken of the value: the usual embedding of time."""
    return bool(waves(value))


def waves(value: ir.Value) -> list[ir.Node]:
    """The sines and cosines that are taken of the value."""
    return [node for node, _ in _readers(value) if graphs.is_op(node, "Sin", "Cos")]


def table_rows(value: ir.Value) -> int | None:
    """Rows of the constant table that the value picks from, if it is an index."""
    for node, index in _readers(value):
        table = node.inputs[0]
        if graphs.is_op(node, "Gather") and index == 1 and table is not None and graphs.is_constant(table):
            rows = table.shape[0] if table.shape is not None and len(table.shape) == 2 else None
            if isinstance(rows, int):
                return rows
    return None


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """What reads the value, if only through conversions and arithmetic."""
    level = [value]
    for _ in range(DEEPEST_EMBEDDING):
        following: list[ir.Value] = []
        for item in level:
            for node, index in graphs.consumers(item):
                yield node, index
                if graphs.is_op(node, *BETWEEN_INPUT_AND_EMBEDDING):
                    following.append(node.outputs[0])
        level = following


def is_called_timestep(name: str | None) -> bool:
    """Whether exporters call a timestep so."""
    return (name or "").lower() in TIMESTEP_NAMES
