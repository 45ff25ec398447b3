"""How far a student's outputs are from its teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch.nn.functional as F
from torch import Tensor

from onnxq.learning.outputs import compared

Loss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


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
    """The values to compare and how, ``kl`` or ``mse`` (see :func:`onnxq.learning.outputs.compared`)."""
    return {item.value: item.kind for item in compared(model, kind)}


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
