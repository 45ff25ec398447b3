"""Channel attention of features, and how far a student's is from its teacher's (HAST)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SMALLEST_NORM = 1e-3


def channel_attention(feature: Tensor) -> Tensor:
    """The mean square of each channel, as a vector of norm 1 for each sample, [samples, channels].

    Source: HAST, arXiv 2303.13826, section 3.4.

    Args:
        feature: [samples, channels, …].
    """
    strength = feature.square().flatten(2).mean(2) if feature.ndim > 2 else feature.square()
    return torch.div(strength, strength.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM))


def attention_gap(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], features: Sequence[str]) -> Tensor:
    """The sum over features of the mean squared difference of channel attention."""
    gaps = [(channel_attention(student[name]) - channel_attention(teacher[name])).square().mean() for name in features]
    return torch.stack(gaps).sum() if gaps else torch.zeros(())
