"""A result that computes in float16 or bfloat16 between its codes: what has to stay float32 for it, and the change.

TensorRT runs layers without codes twice as fast so, and does not fuse FP8 attention between float32 values (rule P7).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.errors import OnnxqError
from onnxq.passes.change_precision import ChangePrecision
from onnxq.runtime import Feed, Session
from onnxq.value_sizes import tapped_together

LARGEST = 2.0**14  # a quarter of what float16 holds: other inputs reach further than those that were seen
ANGLES = ("Sin", "Cos")


def to_half(model: ir.Model, dtype: ir.DataType, feeds: Sequence[Feed], device: str = "cpu") -> None:
    """Change a Q/DQ model with float weights to a half as wide type, in place; its inputs and outputs keep theirs.

    In float32 stay nodes that make angles: the sine of a position or timestep needs more digits. With float16 also
    those that read or make numbers beyond a quarter of what it holds, such as the squares in norms that an exporter
    took apart; bfloat16 holds what float32 does, with 8 binary digits instead of 11.

    Args:
        model: The model, before its weights become codes.
        dtype: float16 or bfloat16.
        feeds: Inputs to see how large values get.
        device: Where to run it.

    Raises:
        OnnxqError: the model has If, Loop or Scan.
    """
    keep = _behind_angles(model.graph)
    if dtype == ir.DataType.FLOAT16:
        keep |= _overflowing(model, feeds, device)
    if not ChangePrecision(ir.DataType.FLOAT, dtype, keep)(model).modified:
        raise OnnxqError(
            f"expected a float32 model without If, Loop and Scan for --base {dtype.name.lower()}, found another one",
            hint="leave --base out: a model that is float16 or bfloat16 already stays so",
        )


def _overflowing(model: ir.Model, feeds: Sequence[Feed], device: str) -> set[str]:
    values = [
        value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT and value.name
    ]
    session = Session(model, taps=[value.name or "" for value in values], optimize=False, device=device, arena=False)
    large: set[ir.Value] = set()
    for group in tapped_together(values):
        for feed in feeds:
            for value, found in zip(group, session.run(feed, [value.name or "" for value in group]), strict=True):
                if found.size and not np.abs(found[np.isfinite(found)]).max(initial=0.0) < LARGEST:
                    large.add(value)
    return {
        node.name or ""
        for node in model.graph
        if any(value in large for value in (*node.inputs, *node.outputs) if value is not None)
    }


def _behind_angles(graph: ir.Graph) -> set[str]:
    """Sines, cosines and what makes their angles, back to the nearest layers."""
    found: set[str] = set()
    open_ = [node for node in graph if graphs.is_op(node, *ANGLES)]
    while open_:
        node = open_.pop()
        if node.name in found or layer_nodes.weighted(node) is not None:
            continue
        found.add(node.name or "")
        open_ += [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    return found
