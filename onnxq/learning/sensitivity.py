"""What each layer costs at each width, measured at the output with all other layers in float.

Source: Y. Cai et al., ZeroQ, CVPR 2020 (arXiv 2001.00281), equation 5: Ω_i(k) = mean of KL(float ‖ only layer i at k
bits). Departures: activations are measured like weights, in the width of the value that the layer reads; outputs that
are no logits count with their relative squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import InputSpec
from onnxq.calibration.observers import Observer, Statistics
from onnxq.errors import OnnxqError
from onnxq.learning.outputs import Compared
from onnxq.scheme import Scheme
from onnxq.sensitivity import Judged, Layer, Switchboard

Array = np.ndarray[Any, Any]
Search = Callable[[Array, Any, bool], tuple[Array, Array]]


@dataclass(frozen=True)
class Probe:
    """All that measuring needs, once for every width.

    Attributes:
        model: The float model after the target's rewrites.
        samples: Inputs with the float model's outputs.
        outputs: Which outputs count, and in what measure.
        output_names: The names of the outputs in ``samples``, in order.
        statistics: Of activations, by name; only where widths of activations are measured.
        specs: The model's inputs.
        observer: How a range follows from the statistics of an activation.
        search: How a range follows from weights.
        device: ``cpu`` or ``cuda``.
    """

    model: ir.Model
    samples: Sequence[Judged]
    outputs: Sequence[Compared]
    output_names: Sequence[str]
    statistics: dict[str, Statistics]
    specs: Sequence[InputSpec]
    observer: Observer
    search: Search | None
    device: str = "cpu"

    def board(self, schemes: Mapping[str, Scheme]) -> Switchboard:
        """The model with a switch for each layer's quantization."""
        return Switchboard(
            self.model,
            [Layer(name, scheme) for name, scheme in schemes.items()],
            self.statistics,
            self.specs,
            observer=self.observer,
            search=self.search,
            device=self.device,
        )

    def distance(self, board: Switchboard, on: Sequence[str]) -> float:
        """How far the outputs are from the float model's when the named layers are quantized."""
        total, rows = 0.0, 0
        for sample in self.samples:
            found = dict(zip(self.output_names, board.run(sample.feed, on), strict=False))
            expected = dict(zip(self.output_names, sample.expected, strict=True))
            batch = len(next(iter(sample.feed.values())))
            total += batch * sum(difference(item, expected[item.output], found[item.output]) for item in self.outputs)
            rows += batch
        return total / max(rows, 1)


def alone(
    probe: Probe, groups: Mapping[str, Mapping[str, Scheme]], on_group: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Ω of each group of layers: the distance when these layers alone have their schemes.

    Args:
        probe: What to measure with.
        groups: The schemes of layers by node name, by the group's name; a layer that shares no weight is a group.
        on_group: Called with the number of groups done.
    """
    board = probe.board({name: scheme for schemes in groups.values() for name, scheme in schemes.items()})
    found = {}
    for index, (name, schemes) in enumerate(groups.items()):
        found[name] = probe.distance(board, list(schemes))
        if on_group is not None:
            on_group(index + 1)
    return found


def together(probe: Probe, schemes: Mapping[str, Scheme]) -> float:
    """The distance when all layers have their schemes: what the sum over :func:`alone` predicts."""
    return probe.distance(probe.board(schemes), list(schemes))


def points_lost(probe: Probe, schemes: Mapping[str, Scheme]) -> float:
    """Points of top-1 lost when all layers have their schemes; without labels, answers that change, in percent.

    Raises:
        OnnxqError: no output is logits.
    """
    judged = next((item for item in probe.outputs if item.kind == "kl"), None)
    if judged is None:
        raise OnnxqError(
            "expected a classifier or a language model for max_drop, found no logits among the outputs",
            hint="give a budget instead: --set budget_bits=5",
        )
    board = probe.board(schemes)
    lost, rows = 0.0, 0
    for sample in probe.samples:
        found = dict(zip(probe.output_names, board.run(sample.feed, list(schemes)), strict=False))
        expected = dict(zip(probe.output_names, sample.expected, strict=True))
        before, after = (part[judged.output].argmax(axis=-1) for part in (expected, found))
        right = before if sample.labels is None or sample.labels.shape != before.shape else sample.labels
        lost += float(np.sum(before == right)) - float(np.sum(after == right))
        rows += before.size
    return 100 * lost / max(rows, 1)


def difference(item: Compared, expected: Array, found: Array) -> float:
    """KL(expected ‖ found) per row of classes in nats, or the squared error over the mean square."""
    if item.kind == "mse":
        reference = expected.astype(np.float64)
        error = float(np.mean((reference - found) ** 2))
        return error / max(float(np.mean(reference**2)), 1e-12)
    wanted, is_there = (_log_probabilities(array, item.normalised) for array in (expected, found))
    return float(np.mean(np.sum(np.exp(wanted) * (wanted - is_there), axis=-1)))


def _log_probabilities(values: Array, normalised: str) -> Array:
    values = values.astype(np.float64)
    if normalised == "LogSoftmax":
        return values
    if normalised == "Softmax":
        return np.asarray(np.log(np.maximum(values, 1e-12)))
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
