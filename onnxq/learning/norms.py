"""The scales and shifts of normalisations, and how to move them so that a quantized block gives the float one's output.

Source: L. Li, Q. Li, B. Zhang, X. Chu, Norm Tweaking: High-performance Low-bit Quantization of Large Language Models,
AAAI 2024 (arXiv 2309.02784).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from onnxq import graph as graphs

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "GroupNormalization")
REGULARISATION = 0.01


def norm_parameters(graph: ir.Graph) -> dict[str, ir.Value]:
    """The value that each scale or shift of a norm makes, by the initializer's name; norms cut into ops count too."""
    found: dict[str, ir.Value] = {}
    for node in graph:
        if node.op_type in NORMS:
            names = [value for value in node.inputs[1:3] if graphs.is_constant(value)]
            found |= {value.name or "": node.outputs[0] for value in names if value is not None}
        elif graphs.is_op(node, "Mul"):
            for value, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
                if value is not None and graphs.is_constant(value) and graphs.rank(value) == 1 and _is_normed(other):
                    found[value.name or ""] = node.outputs[0]
                    found |= _shift(node.outputs[0])
    return found


def _is_normed(value: ir.Value | None) -> bool:
    """Whether the value is x / sqrt(…) or x · 1/sqrt(…)."""
    node = None if value is None else value.producer()
    if not graphs.is_op(node, "Mul", "Div") or node is None:
        return False
    divisors = [operand.producer() for operand in node.inputs if operand is not None]
    for divisor in divisors:
        if graphs.is_op(divisor, "Reciprocal") and divisor is not None and divisor.inputs[0] is not None:
            divisor = divisor.inputs[0].producer()
        if graphs.is_op(divisor, "Sqrt"):
            return True
    return False


def _shift(value: ir.Value) -> dict[str, ir.Value]:
    readers = graphs.consumers(value)
    if len(readers) != 1 or not graphs.is_op(readers[0][0], "Add"):
        return {}
    node, index = readers[0]
    shift = node.inputs[1 - index]
    if shift is None or not graphs.is_constant(shift) or graphs.rank(shift) != 1:
        return {}
    return {shift.name or "": node.outputs[0]}


def channel_distance(wanted: Tensor, found: Tensor) -> Tensor:
    """The mean over channels of |difference of means| + |difference of variances|, over tokens (equation 2).

    Args:
        wanted: [..., channels].
        found: Of the same shape.
    """
    first, second = wanted.flatten(0, -2), found.flatten(0, -2)
    means = (first.mean(dim=0) - second.mean(dim=0)).abs()
    variances = (first.var(dim=0) - second.var(dim=0)).abs()
    return (means + variances).mean()


def closed_form_scale(products: Tensor, exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> Tensor:
    """The factor of a norm's channels that takes the layers' outputs closest to those of their float weights.

    min over s of Σ ‖X·Wᵀ − X·diag(s)·Qᵀ‖², pulled towards 1: (G + λ)·s = diag(H·Σ Wᵀ·Q) + λ with G = H ∘ Σ Qᵀ·Q and
    λ a hundredth of G's mean diagonal.

    Args:
        products: H = E[xᵀ·x] of the norm's output, [channels, channels].
        exact: W of the layers that read it, each [outputs, channels].
        rounded: Q, alike.
    """
    hessian = products.to(torch.float64)
    pairs = [(weight.to(torch.float64), code.to(torch.float64)) for weight, code in zip(exact, rounded, strict=True)]
    curvature = hessian * torch.stack([code.mT @ code for _, code in pairs]).sum(dim=0)
    target = (hessian * torch.stack([code.mT @ weight for weight, code in pairs]).sum(dim=0)).sum(dim=1)
    pull = REGULARISATION * curvature.diagonal().mean()
    system = curvature + pull * torch.eye(len(curvature), dtype=torch.float64, device=curvature.device)
    solved: Tensor = torch.linalg.solve(system, target + pull)
    return solved
