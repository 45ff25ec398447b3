"""Which outputs of a network tell how far a quantized one is from it, and in what measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.errors import OnnxqError
from onnxq.kinds import Kind, kind_of

Array = np.ndarray[Any, Any]

LOSSES = ("auto", "kl", "mse")


@dataclass(frozen=True)
class Compared:
    """An output to compare.

    Attributes:
        output: Its name.
        value: The value to compare: the output, or the logits before it where it ends in a Softmax.
        kind: ``kl`` for logits, ``mse`` for anything else.
        normalised: What the output itself holds: ``""`` the value, ``Softmax`` or ``LogSoftmax`` of it.
    """

    output: str
    value: str
    kind: str
    normalised: str = ""


def compared(model: ir.Model, kind: str = "auto") -> list[Compared]:
    """The float outputs of a float graph.

    Args:
        model: The graph, before Q/DQ are inserted.
        kind: ``kl``, ``mse``, or ``auto``: KL where outputs are logits (a classifier's rows, a language model's
            tokens), squared error elsewhere.

    Raises:
        OnnxqError: there is no float output, or the kind is unknown.
    """
    if kind not in LOSSES:
        raise OnnxqError(f"expected a loss of {', '.join(LOSSES)}, found {kind!r}", hint="use auto")
    of_model = kind_of(model)
    found = []
    for output in model.graph.outputs:
        if not graphs.is_float(output):
            continue
        value, normalised, producer = output, "", output.producer()
        if producer is not None and graphs.is_op(producer, "Softmax", "LogSoftmax") and producer.inputs[0] is not None:
            value, normalised = producer.inputs[0], producer.op_type
        classes = graphs.rank(value) == (3 if of_model == Kind.LANGUAGE else 2)
        logits = kind == "kl" or (kind == "auto" and of_model != Kind.DENOISER and (bool(normalised) or classes))
        found.append(Compared(output.name or "", value.name or "", "kl" if logits else "mse", normalised))
    if not found:
        raise OnnxqError("expected a model with a float output to learn from, found none", hint="use --recipe default")
    return found


def difference(item: Compared, expected: Array, found: Array) -> float:
    """KL(expected ‖ found) per row of classes in nats, or the squared error over the mean square."""
    if item.kind == "mse":
        reference = expected.astype(np.float64)
        error = float(np.mean((reference - found) ** 2))
        return error / max(float(np.mean(reference**2)), 1e-12)
    wanted, is_there = (_log_probabilities(array, item.normalised) for array in (expected, found))
    return float(np.mean(np.sum(np.exp(wanted) * (wanted - is_there), axis=-1)))


def _log_probabilities(values: Array, normalised: str) -> Array:
    values = values.astype(np.float64)
    if normalised == "LogSoftmax":
        return values
    if normalised == "Softmax":
        return np.asarray(np.log(np.maximum(values, 1e-12)))
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
