"""Metrics of a quantized model against its float original. Each is ``update``, ``merge``, ``value``.

All of them stream: they keep sums, never samples, so batches, processes and machines give the same numbers.
``value`` is ``None`` while nothing has been seen. An infinite SQNR is a number here; :func:`json_safe` turns it
into the string ``"inf"`` or ``"-inf"``, which ``float()`` reads back, because JSON has no infinity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def padded_alike(expected: Array, found: Array) -> tuple[Array, Array]:
    """Two tensors of one rank with zeros where only the other has elements.

    The size of some outputs depends on their values: boxes that are kept, tokens that are written.
    """
    shape = np.maximum(expected.shape, found.shape)
    first, second = (
        np.pad(array, [(0, size - own) for size, own in zip(shape, array.shape, strict=True)])
        for array in (expected, found)
    )
    return first, second


@dataclass
class Sqnr:
    """Signal to quantization noise ratio, ``10 log10(sum y² / sum (y - q)²)`` in dB.

    Identical tensors give ``inf``. Where the float value itself is not finite (a mask of -inf, say) there is no
    signal to compare, and the element is left out; where only the quantized one is not finite, the noise is
    infinite and the ratio ``-inf``.

    Attributes:
        signal: Sum of squares of the float values.
        noise: Sum of squares of the differences.
        count: Elements compared.
        not_finite: Elements that are NaN or infinite in the quantized tensor only.
    """

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0
    not_finite: int = 0

    def update(self, expected: Array, found: Array) -> None:
        """Add the elements of two tensors of one shape: float first, quantized second."""
        reference = np.asarray(expected).astype(np.float64).ravel()
        quantized = np.asarray(found).astype(np.float64).ravel()
        usable = np.isfinite(reference)
        if not usable.all():
            reference, quantized = reference[usable], quantized[usable]
        broken = int(np.count_nonzero(~np.isfinite(quantized)))
        self.count += reference.size
        self.not_finite += broken
        self.signal += float(reference @ reference)
        if broken:
            self.noise = math.inf
        else:
            difference = reference - quantized
            self.noise += float(difference @ difference)

    def merge(self, other: Sqnr) -> None:
        """Add what another one has seen."""
        self.signal += other.signal
        self.noise += other.noise
        self.count += other.count
        self.not_finite += other.not_finite

    @property
    def value(self) -> float | None:
        """The ratio in dB, ``None`` if nothing was compared."""
        if self.count == 0:
            return None
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0 or math.isinf(self.noise):
            return -math.inf
        return 10.0 * (math.log10(self.signal) - math.log10(self.noise))


@dataclass
class OutputsSqnr:
    """SQNR of several outputs, each in its own size.

    Boxes in pixels would hide scores below 1, and the states of a recurrent network what it says, if all errors were
    added up.

    Attributes:
        each: By the output's name.
    """

    each: dict[str, Sqnr] = field(default_factory=dict)

    def update(self, name: str, expected: Array, found: Array) -> None:
        """Add an output of both models: float first, quantized second."""
        self.each.setdefault(name, Sqnr()).update(expected, found)

    def merge(self, other: OutputsSqnr) -> None:
        """Add what another one has seen."""
        for name, sqnr in other.each.items():
            self.each.setdefault(name, Sqnr()).merge(sqnr)

    @property
    def value(self) -> float | None:
        """Of the mean over the outputs of noise over signal, in dB; ``None`` if nothing was compared.

        Outputs that are zero throughout in float have no size, and count only where all are like that.
        """
        compared = [sqnr for sqnr in self.each.values() if sqnr.count]
        compared = [sqnr for sqnr in compared if sqnr.signal > 0] or compared
        ratios = [sqnr.value for sqnr in compared if sqnr.value is not None]
        if len(ratios) < 2:
            return ratios[0] if ratios else None
        mean = sum(10.0 ** (-ratio / 10.0) for ratio in ratios) / len(ratios)
        return -10.0 * math.log10(mean) if mean > 0 else math.inf

    @property
    def by_name(self) -> dict[str, float | None]:
        """The ratio of each output in dB, where there are several; otherwise none."""
        return {name: sqnr.value for name, sqnr in self.each.items()} if len(self.each) > 1 else {}

    @property
    def not_finite(self) -> int:
        """Elements that are NaN or infinite in a quantized output only."""
        return sum(sqnr.not_finite for sqnr in self.each.values())


@dataclass
class MeanError:
    """Mean of ``quantized - float``: a bias that more samples do not average away. Finite elements only."""

    total: float = 0.0
    count: int = 0

    def update(self, expected: Array, found: Array) -> None:
        """Add the elements of two tensors of one shape: float first, quantized second."""
        reference, quantized = np.asarray(expected).astype(np.float64), np.asarray(found).astype(np.float64)
        usable = np.isfinite(reference) & np.isfinite(quantized)
        self.total += float((quantized[usable] - reference[usable]).sum())
        self.count += int(np.count_nonzero(usable))

    def merge(self, other: MeanError) -> None:
        """Add what another one has seen."""
        self.total += other.total
        self.count += other.count

    @property
    def value(self) -> float | None:
        """The mean, ``None`` if nothing was compared."""
        return self.total / self.count if self.count else None


@dataclass
class Agreement:
    """How often two tensors say the same: the same class, or the same number where they are not float."""

    matches: int = 0
    count: int = 0

    def update(self, expected: Array, found: Array) -> None:
        """Add class scores, classes along the last axis; NaN scores never agree."""
        same = expected.argmax(-1) == found.argmax(-1)
        self._add(same & ~np.isnan(found).any(-1))

    def update_equal(self, expected: Array, found: Array) -> None:
        """Add tensors whose elements count as equal or not (integers, booleans, strings)."""
        self._add(np.asarray(expected == found))

    def _add(self, same: Array) -> None:
        self.matches += int(np.count_nonzero(same))
        self.count += same.size

    def merge(self, other: Agreement) -> None:
        """Add what another one has seen."""
        self.matches += other.matches
        self.count += other.count

    @property
    def value(self) -> float | None:
        """The fraction that agrees, ``None`` if nothing was compared."""
        return self.matches / self.count if self.count else None


@dataclass
class Accuracy:
    """Fraction of samples whose label is among the ``k`` highest scores."""

    k: int = 1
    hits: int = 0
    count: int = 0

    def update(self, scores: Array, labels: Array) -> None:
        """Add scores ``[batch, classes]`` with their labels ``[batch]``."""
        rows = np.arange(len(labels))
        own = scores[rows, labels][:, None]
        columns = np.arange(scores.shape[1])
        # Ties go to the lower class, as in argmax; a NaN row has no winner.
        ahead = (scores > own) | ((scores == own) & (columns < labels[:, None]))
        right = (np.count_nonzero(ahead, axis=1) < self.k) & ~np.isnan(scores).any(axis=1)
        self.hits += int(np.count_nonzero(right))
        self.count += len(labels)

    def merge(self, other: Accuracy) -> None:
        """Add what another one has seen (of the same ``k``)."""
        if other.k != self.k:
            raise ValueError(f"cannot merge top-{other.k} into top-{self.k}")
        self.hits += other.hits
        self.count += other.count

    @property
    def value(self) -> float | None:
        """The fraction, ``None`` if no labelled sample was seen."""
        return self.hits / self.count if self.count else None


@dataclass
class Perplexity:
    """``exp`` of the mean negative log-likelihood of every next token."""

    negative_log_likelihood: float = 0.0
    count: int = 0

    def update(self, logits: Array, tokens: Array, mask: Array | None = None) -> None:
        """Add one batch.

        Args:
            logits: ``[batch, sequence, vocabulary]``; position ``t`` predicts token ``t + 1``.
            tokens: ``[batch, sequence]``, the model's input.
            mask: ``[batch, sequence]``, zero where a token is padding and must not count.
        """
        scores = logits[:, :-1].astype(np.float64)
        highest = scores.max(-1, keepdims=True)
        normaliser = highest[..., 0] + np.log(np.exp(scores - highest).sum(-1))
        own = np.take_along_axis(scores, tokens[:, 1:, None].astype(np.int64), -1)[..., 0]
        losses = normaliser - own
        if mask is not None:
            losses = losses[(mask[:, 1:] != 0) & (mask[:, :-1] != 0)]
        self.negative_log_likelihood += float(losses.sum())
        self.count += losses.size

    def merge(self, other: Perplexity) -> None:
        """Add what another one has seen."""
        self.negative_log_likelihood += other.negative_log_likelihood
        self.count += other.count

    @property
    def value(self) -> float | None:
        """The perplexity (``inf`` beyond float range), ``None`` if no next token was seen."""
        if self.count == 0:
            return None
        mean = self.negative_log_likelihood / self.count
        return math.exp(mean) if mean < 709.0 else (math.inf if mean == mean else math.nan)


def json_safe(value: Any) -> Any:
    """``value`` as strict JSON can carry it: infinities become ``"inf"`` and ``"-inf"``, NaN becomes ``None``."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return json_safe(value.tolist())
    if isinstance(value, np.generic):
        return json_safe(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [json_safe(item) for item in value]
    return value
