"""Where windows of convolutions and pools lie: pads, automatic pads, rounded-up sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def pad_ends(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """``x`` with its spatial axes padded, or cropped where a pad is negative."""
    sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return F.pad(x, sides, value=value) if any(sides) else x


def pads_of(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> tuple[list[int], list[int]]:
    """Pads at the beginnings and at the ends of the spatial axes."""
    axes = x.ndim - 2
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
            smaller = total // 2
            before.append(smaller if auto_pad == "SAME_UPPER" else total - smaller)
            after.append(total - before[-1])
        return before, after
    if pads is None or auto_pad == "VALID":
        return [0] * axes, [0] * axes
    return list(pads[:axes]), list(pads[axes:])


def rounded_up_ends(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> list[int]:
    """End pads that make the last, cut-off window whole; a window has to begin before the end pad."""
    ends = []
    for size, width, stride, dilation, first, last in zip(
        x.shape[2:], kernel, strides, dilations, before, after, strict=True
    ):
        reach = (width - 1) * dilation + 1
        count = -(-(size + first + last - reach) // stride) + 1
        if (count - 1) * stride >= size + first:
            count -= 1
        ends.append((count - 1) * stride + reach - size - first)
    return ends
