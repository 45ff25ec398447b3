"""How far a student's outputs are from its teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch.nn.functional as F
from torch import Tensor

from onnxq import graph as graphs
from onnxq.errors import OnnxqError
from onnxq.model import Kind, kind_of

Loss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

LOSSES = ("auto", "kl", "mse")


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) · T², averaged over all rows of logits.

    Source: G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531),
    section 2: T² keeps gradients of one size at any temperature.

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape.
        temperature: T.
    """
    found = F.log_softmax(student.flatten(0, -2) / temperature, dim=-1)
    wanted = F.log_softmax(teacher.flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean") * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the teacher's mean square: 0.01 is an SQNR of 20 dB, whatever the output's scale."""
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(1e-12)


def compared_outputs(model: ir.Model, kind: str = "auto") -> dict[str, str]:
    """The values to compare and how, ``kl`` or ``mse``: float outputs, and for a Softmax the logits before it.

    Args:
        model: The graph.
        kind: ``kl``, ``mse``, or ``auto``: KL where outputs are logits (a classifier's rows, a language model's
            tokens), squared error elsewhere.

    Raises:
        OnnxqError: there is no float output, or the kind is unknown.
    """
    if kind not in LOSSES:
        raise OnnxqError(f"expected a loss of {', '.join(LOSSES)}, found {kind!r}", hint="use --set loss=auto")
    of_model = kind_of(model)
    found = {}
    for output in model.graph.outputs:
        if not graphs.is_float(output):
            continue
        value, producer = output, output.producer()
        before = (
            producer.inputs[0] if producer is not None and graphs.is_op(producer, "Softmax", "LogSoftmax") else None
        )
        if before is not None:
            value = before
        classes = graphs.rank(value) == (3 if of_model == Kind.LANGUAGE else 2)
        logits = kind == "kl" or (kind == "auto" and of_model != Kind.DENOISER and (before is not None or classes))
        found[value.name or ""] = "kl" if logits else "mse"
    if not found:
        raise OnnxqError("expected a model with a float output to learn from, found none", hint="use --recipe default")
    return found


def distillation(outputs: Mapping[str, str], temperature: float = 1.0) -> Loss:
    """The sum over the outputs of :func:`compared_outputs`."""

    def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        parts = [
            divergence(student[name], teacher[name], temperature)
            if kind == "kl"
            else relative_error(student[name], teacher[name])
            for name, kind in outputs.items()
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    return loss
