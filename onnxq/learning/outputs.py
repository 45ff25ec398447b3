"""Which outputs of a network tell how far a quantized one is from it, and in what measure."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.errors import OnnxqError
from onnxq.model import Kind, kind_of

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
