"""How differently a transformer treats the patches of an image: the entropy of their similarities.

Source: Z. Li, L. Ma, M. Chen, J. Xiao, Q. Gu, Patch Similarity Aware Data-Free Quantization for Vision Transformers,
ECCV 2022 (arXiv 2203.02250), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxq import graph as graphs
from onnxq.attention import attention_products
from onnxq.passes.decompose_attention import DecomposeAttention

DENSITY_FLOOR = 1e-4
NARROWEST_GRID = 4.0  # bandwidths; equal similarities would else have an entropy of 0, above that of a narrow peak
BINS_OF_A_BANDWIDTH = 4
WHOLE = 2**36  # what one value counts for
MOST_PATCHES = 576  # of a 384² picture; the similarities of more are judged by as many of them, spread evenly
MOST_EXTRA_TOKENS = 2  # a class token, and one for distillation


def attention_outputs(model: ir.Model) -> list[str]:
    """The values ``softmax(q · kᵀ) · v`` of a graph in its order: products whose left side is a Softmax.

    Those of Attention nodes (opset 23) are found once :class:`DecomposeAttention` has taken them apart.
    """
    names = [node.outputs[0].name for node in attention_products(taken_apart(model).graph)]
    return [name for name in names if name]


def taken_apart(model: ir.Model) -> ir.Model:
    """The model with its Attention nodes as products and Softmax; itself where it has none."""
    if not any(graphs.is_op(node, "Attention") for node in model.graph):
        return model
    model = model.clone()
    DecomposeAttention()(model)
    return model


def patch_similarities(values: Tensor, samples: int) -> Tensor:
    """The cosine similarity of every pair of patches, [samples, windows · patches²].

    Args:
        values: An attention's output, [samples · windows, heads, tokens, features] or, where an export has merged
            heads into the batch, [samples · heads, tokens, features].
        samples: How many inputs there were; what the first axis has beyond that are windows of one input.
    """
    if values.ndim == 3:
        values = values.reshape(samples, -1, *values.shape[1:])
    patches = values.mean(1)  # over heads
    patches = patches[:, _extra_tokens(patches.shape[1]) :]
    if patches.shape[1] > MOST_PATCHES:
        patches = patches[:, torch.linspace(0, patches.shape[1] - 1, MOST_PATCHES, device=patches.device).long()]
    unit = torch.nn.functional.normalize(patches, dim=-1)
    return (unit @ unit.transpose(1, 2)).reshape(samples, -1)


def _extra_tokens(tokens: int) -> int:
    """How many tokens in front are no patches: those without which the rest is a square."""
    for extra in range(MOST_EXTRA_TOKENS + 1):
        if tokens > extra and math.isqrt(tokens - extra) ** 2 == tokens - extra:
            return extra
    return 0


def differential_entropy(values: Tensor, bandwidth: float, points: int) -> Tensor:
    """The entropy of each row's density in nats, [rows].

    The density is a sum of Gaussian kernels at ``points`` places between the least and the largest value of all rows,
    through which no gradient flows.

    Args:
        values: [rows, values].
        bandwidth: The kernels' standard deviation, in the values' unit.
        points: Where the density is evaluated, at least two.
    """
    low, high = float(values.detach().min()), float(values.detach().max())
    missing = max(0.0, NARROWEST_GRID * bandwidth - (high - low)) / 2
    grid = torch.linspace(low - missing, high + missing, points, device=values.device)
    norm = bandwidth * math.sqrt(2 * math.pi)
    density: Tensor = _Kernels.apply(values, grid, bandwidth) / norm  # type: ignore[no-untyped-call]
    floored = density + DENSITY_FLOOR
    return torch.trapezoid(-floored * floored.log(), grid, dim=1)


class _Kernels(torch.autograd.Function):
    """The mean of Gaussian kernels around the values of a row, at each point of a grid, [rows, points].

    Each value counts for the two bins around it, by its distance: there are patches² values for each point, and few
    bins. Counts are whole numbers, whose sums are the same in any order on every device.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
        count = 1 + math.ceil(float(grid[-1] - grid[0]) / bandwidth * BINS_OF_A_BANDWIDTH)
        bins = torch.linspace(float(grid[0]), float(grid[-1]), count, device=values.device, dtype=values.dtype)
        width = bins[1] - bins[0]
        place = (values - bins[0]) / width
        lower = place.long().clamp_(0, count - 2)
        upper_share = ((place - lower).double() * WHOLE).round_().long()
        counts = torch.zeros(len(values), count, dtype=torch.int64, device=values.device)
        counts.scatter_add_(1, lower, WHOLE - upper_share).scatter_add_(1, lower + 1, upper_share)
        kernels = torch.exp(-0.5 * ((bins[:, None] - grid) / bandwidth).square())
        context.save_for_backward(lower, kernels, width)
        return (counts.double() / (WHOLE * values.shape[1])).to(values.dtype) @ kernels

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        lower, kernels, width = context.saved_tensors
        slopes = (gradients[0] @ kernels.T).diff(dim=1) / (width * lower.shape[1])
        return slopes.gather(1, lower), None, None


@dataclass(frozen=True)
class PatchEntropy:
    """The negative sum over attentions of the entropy of patch similarities (PSAQ-ViT, equations 5 to 8).

    Patches of a real image are foreground or background and answer differently; those of noise answer alike.

    Attributes:
        outputs: The values that attentions return.
        bandwidth: Of the density's kernels. The authors' code has 0.01 and 10 points, which lie further apart than
            the kernels are wide, so that most pairs have no gradient; here the density is smooth.
        points: Where the density is evaluated.
    """

    outputs: Sequence[str]
    bandwidth: float = 0.05
    points: int = 50

    def __call__(self, inputs: Tensor, taps: Mapping[str, Tensor]) -> Tensor:
        """The term, a scalar."""
        return -torch.stack(self.entropies(taps, len(inputs))).sum()

    def entropies(self, taps: Mapping[str, Tensor], samples: int) -> list[Tensor]:
        """The mean entropy over samples, in nats, for each attention."""
        found = []
        for name in self.outputs:
            similarities = patch_similarities(taps[name], samples)
            found.append(differential_entropy(similarities, self.bandwidth, self.points).mean())
        return found
