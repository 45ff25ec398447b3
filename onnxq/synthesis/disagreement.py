"""How far two classifiers disagree about a sample, as AdaDFQ measures it, and how far a generator should let them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onnxq.synthesis.game import Move


def entropy(logits: Tensor) -> Tensor:
    """The entropy of each sample's classes, [samples], in nats.

    Args:
        logits: [samples, classes].
    """
    logarithms = functional.log_softmax(logits, dim=-1)
    return -(logarithms.exp() * logarithms).sum(-1)


def agreement(difference: Tensor) -> Tensor:
    """How far two networks agree about each sample, [samples]: 1 where their logits differ by a constant.

    The entropy of the softmax of the difference between their logits, between the least of the batch (0) and log C (1)
    (AdaDFQ, section 3.2): what they do not disagree about leaves all classes alike.

    Args:
        difference: The float network's logits less the quantized one's, [samples, classes].
    """
    found = entropy(difference)
    least = found.min()
    return (found - least) / (math.log(difference.shape[-1]) - least).clamp(min=1e-3)


@dataclass(frozen=True)
class Band:
    """Keeps agreement between two bounds: below are samples too hard for the student, above such as teach it nothing.

    Source: AdaDFQ, arXiv 2303.06869, section 3.3.

    Attributes:
        logits: The value with the logits, in both networks.
        lower: The lower bound.
        upper: The upper one.
    """

    logits: str
    lower: float = 0.1
    upper: float = 0.8

    def __call__(self, move: Move) -> Tensor:
        """The term, a scalar."""
        found = agreement(move.teacher[self.logits] - move.student[self.logits])
        return ((self.lower - found).clamp(min=0) + (found - self.upper).clamp(min=0)).mean()


@dataclass(frozen=True)
class Balance:
    """Cross-entropy of the sample's class with what the networks disagree about, or agree about, in nats.

    The first asks for samples whose class the quantized network misses, the second for such as both know.

    Source: AdaDFQ, arXiv 2303.06869, section 3.3.

    Attributes:
        logits: The value with the logits, in both networks.
        sign: −1 takes the difference of the logits, 1 their sum.
    """

    logits: str
    sign: int

    def __call__(self, move: Move) -> Tensor:
        """The term, a scalar."""
        logits = move.teacher[self.logits] + self.sign * move.student[self.logits]
        return functional.cross_entropy(logits, move.labels)


def disagreement(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """What AdaDFQ's student minimises: −T² times the mean entropy of softmax((teacher − student) / T).

    It is least, −T² log C, where logits differ by a constant, which no class prediction depends on.

    Args:
        student: Logits [samples, classes].
        teacher: Logits of the same shape.
        temperature: T.
    """
    return -(temperature**2) * torch.mean(entropy((teacher - student) / temperature))
