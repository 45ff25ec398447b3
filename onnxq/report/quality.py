"""How alike two models answer: which metrics apply to their outputs, fed batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxq.calibration.text import without_padding
from onnxq.errors import OnnxqError
from onnxq.report.metrics import Accuracy, Agreement, MeanError, OutputsSqnr, Perplexity, Sqnr, padded_alike

Array = np.ndarray[Any, Any]

TOP_K = 5
TOKEN_NAMES = ("input_ids", "tokens", "ids")


class Quality:
    """Metrics of a quantized model's outputs against the float model's.

    SQNR takes each float output in its own size, the mean error all together. Classes are read from the first output
    only: scores ``[batch, classes]`` (trailing axes of size one are dropped), or logits ``[batch, sequence,
    vocabulary]`` of a model that reads integer tokens ``[batch, sequence]``. Outputs that are not float count as equal
    or not.

    Args:
        output_names: Names of the float model's outputs, in order.
        writes: Whether logits of tokens are those of the next one, so that there is a perplexity.
    """

    def __init__(self, output_names: Sequence[str], *, writes: bool = True) -> None:
        self.writes = writes
        self.output_names = list(output_names)
        self.sqnr = OutputsSqnr()
        self.mean_error = MeanError()
        self.agreement = Agreement()
        self.equality = Agreement()
        self.accuracy = {
            (model, k): Accuracy(k) for model in ("float", "quantized") for k in (1, TOP_K)
        }  # fmt: skip
        self.perplexity = {"float": Perplexity(), "quantized": Perplexity()}
        self.keyed: dict[str, dict[float, Sqnr]] = {}
        self.warnings: list[str] = []

    def update(
        self,
        feed: Mapping[str, Array],
        expected: Sequence[Array],
        found: Sequence[Array],
        labels: Array | None = None,
        keys: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        """Add one batch: what both models were given, and what each answered.

        Args:
            feed: The inputs.
            expected: The float model's outputs.
            found: The quantized model's.
            labels: The right classes.
            keys: What rows are told apart by (``step``, ``timestep``): a number for each of them.

        Raises:
            OnnxqError: the two models answer in different shapes.
        """
        for name, reference, quantized in zip(self.output_names, expected, found, strict=True):
            if np.ndim(reference) != np.ndim(quantized):
                raise OnnxqError(
                    f"expected output {name!r} to have the shape {list(np.shape(reference))} of the float model, "
                    f"found {list(np.shape(quantized))}",
                    hint="compare a quantized model with the float model that it was made from",
                )
            if np.shape(reference) != np.shape(quantized):
                self._warn_once(size_warning(name))
                reference, quantized = padded_alike(reference, quantized)
            if is_float(reference) and is_float(quantized):
                reference, quantized = without_padding(feed, reference), without_padding(feed, quantized)
                self.sqnr.update(name, reference, quantized)
                self.mean_error.update(reference, quantized)
                self._update_keyed(reference, quantized, keys)
            else:
                self.equality.update_equal(reference, quantized)
        if is_float(expected[0]) and is_float(found[0]) and expected[0].shape == found[0].shape:
            self._update_classes(feed, expected[0], found[0], labels)

    def merged(self, other: Quality) -> Quality:
        """This one, with what another one has seen of the same model added."""
        for key, ratios in other.keyed.items():
            for number, sqnr in ratios.items():
                self.keyed.setdefault(key, {}).setdefault(number, Sqnr()).merge(sqnr)
        self.sqnr.merge(other.sqnr)
        self.mean_error.merge(other.mean_error)
        self.agreement.merge(other.agreement)
        self.equality.merge(other.equality)
        for which, accuracy in self.accuracy.items():
            accuracy.merge(other.accuracy[which])
        for model, perplexity in self.perplexity.items():
            perplexity.merge(other.perplexity[model])
        for message in other.warnings:
            self._warn_once(message)
        return self

    def _update_keyed(self, expected: Array, found: Array, keys: Mapping[str, Array]) -> None:
        for key, numbers in keys.items():
            if not expected.ndim or len(expected) != len(numbers):
                continue  # rows of the output are not those of the batch
            ratios = self.keyed.setdefault(key, {})
            for row, number in enumerate(numbers.tolist()):
                ratios.setdefault(number, Sqnr()).update(expected[row], found[row])

    def _update_classes(self, feed: Mapping[str, Array], expected: Array, found: Array, labels: Array | None) -> None:
        tokens = _tokens(feed, expected)
        if tokens is not None:
            self.agreement.update(expected, found)
            if self.writes and tokens.size and tokens.min() >= 0 and tokens.max() < expected.shape[-1]:
                mask = feed.get("attention_mask")
                mask = mask if mask is not None and mask.shape == tokens.shape else None
                self.perplexity["float"].update(expected, tokens, mask)
                self.perplexity["quantized"].update(found, tokens, mask)
            return
        expected, found = _scores(expected), _scores(found)
        if expected.ndim != 2 or expected.shape[1] < 2:
            return
        self.agreement.update(expected, found)
        if labels is not None:
            self._update_accuracy({"float": expected, "quantized": found}, labels)

    def _update_accuracy(self, scores: Mapping[str, Array], labels: Array) -> None:
        batch, classes = scores["float"].shape
        labels = labels.reshape(-1)
        if labels.dtype.kind not in "iu" or len(labels) != batch:
            self._warn_once("accuracy left out: labels are not one whole number for each sample")
        elif labels.min() < 0 or labels.max() >= classes:
            self._warn_once(f"accuracy counts only samples whose label is one of the model's {classes} classes")
        else:
            for (model, k), accuracy in self.accuracy.items():
                if k < classes:
                    accuracy.update(scores[model], labels)

    def _warn_once(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def summary(self) -> dict[str, Any]:
        """The values that apply, under the names that `compare` reports, and the warnings."""
        warnings = list(self.warnings)
        for name, sqnr in self.sqnr.each.items():
            if sqnr.not_finite:
                warnings.append(
                    f"the quantized model gives NaN or infinity in output {name!r} "
                    f"({sqnr.not_finite} of {sqnr.count} elements)"
                )
        agreement = self.agreement if self.agreement.count else self.equality
        return {
            "sqnr_db": self.sqnr.value,
            "outputs": self.sqnr.by_name,
            "mean_error": self.mean_error.value,
            "agreement": agreement.value,
            "top1_float": self.accuracy["float", 1].value,
            "top1_quantized": self.accuracy["quantized", 1].value,
            "top5_float": self.accuracy["float", TOP_K].value,
            "top5_quantized": self.accuracy["quantized", TOP_K].value,
            "perplexity_float": self.perplexity["float"].value,
            "perplexity_quantized": self.perplexity["quantized"].value,
            **{
                f"{key}_sqnr_db": {number: ratios[number].value for number in sorted(ratios)}
                for key, ratios in self.keyed.items()
            },
            "warnings": warnings,
        }


def nothing_compared(outputs: Sequence[Array]) -> str:
    """Why no SQNR could be had, which then says nothing."""
    if any(is_float(value) for value in outputs):
        return (
            "the outputs are empty on these samples, so SQNR says nothing: give some that the model finds something in"
        )
    return "the outputs are whole numbers, of which SQNR says nothing: onnxq compare counts how many agree"


def size_warning(name: str) -> str:
    """What to know of an output whose size the two models do not agree on."""
    return f"the size of output {name!r} depends on its values, and differs: what one model lacks counts as zeros"


def is_float(array: object) -> bool:
    """Whether an output is an array of floats (onnxruntime also returns lists and strings)."""
    return isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating)


def _scores(array: Array) -> Array:
    """Class scores as ``[batch, classes]``; some classifiers end in ``[batch, classes, 1, 1]``."""
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def _tokens(feed: Mapping[str, Array], logits: Array) -> Array | None:
    """The integer tokens that the logits belong to, if this is a model from tokens to logits."""
    if logits.ndim != 3:
        return None
    fitting = {
        name: array for name, array in feed.items() if array.dtype.kind in "iu" and array.shape == logits.shape[:2]
    }
    for name in TOKEN_NAMES:
        if name in fitting:
            return fitting[name]
    others = [array for name, array in fitting.items() if "mask" not in name and "position" not in name]
    return others[0] if len(others) == 1 else None
