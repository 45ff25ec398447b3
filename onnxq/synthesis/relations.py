"""How channels of a feature relate to one another, and how far two networks differ in that (ZAQ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SMALLEST_NORM = 1e-2  # behind straight-through rounding a channel may be zero: a smaller bound explodes its gradient


def channel_relations(feature: Tensor) -> Tensor:
    """Cosine similarities of all pairs of channels, [samples, channels, channels] (ZAQ, arXiv 2103.15263, section 3.2).

    Ranges of channels cancel out, which differ between a float and a quantized network.

    Args:
        feature: [samples, channels, …].
    """
    flat = feature.flatten(2) if feature.ndim > 2 else feature[:, :, None]
    unit = flat / flat.norm(dim=2, keepdim=True).clamp(min=SMALLEST_NORM)
    return torch.bmm(unit, unit.transpose(1, 2))


def relation_gap(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], features: Sequence[str]) -> Tensor:
    """The mean absolute difference of channel relations, averaged over features."""
    gaps = [(channel_relations(student[name]) - channel_relations(teacher[name])).abs().mean() for name in features]
    return torch.stack(gaps).mean() if gaps else torch.zeros(())


def output_gap(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], outputs: Sequence[str]) -> Tensor:
    """The mean absolute difference of outputs."""
    return torch.stack([(student[name] - teacher[name]).abs().mean() for name in outputs]).mean()
