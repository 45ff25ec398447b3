"""Which layers behind a Concat gain from being split, or from having the parts brought into one range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration.channels import Array, ChannelStatistics, record_channels
from onnxq.errors import OnnxqError
from onnxq.folding import array_of
from onnxq.job import Job
from onnxq.learning.channel_scales import round_matrix
from onnxq.passes.smooth_activations import SmoothActivations
from onnxq.passes.split_shortcuts import Shortcut, SplitShortcuts, find_shortcuts
from onnxq.scheme import Scheme, Spec
from onnxq.targets.placement import schemes_of

FORMS = ("two_op", "equalize", "none")
SAMPLES = 64


@dataclass(frozen=True)
class Gain:
    """What splitting one layer brings.

    Attributes:
        shortcut: The layer and the parts that it reads.
        ranges: The largest magnitude of each part.
        joint: Mean squared error of the layer's output with one range for all parts.
        apart: The same with a range for each part.
    """

    shortcut: Shortcut
    ranges: tuple[float, ...]
    joint: float
    apart: float

    @property
    def ratio(self) -> float:
        """How much wider the widest part is than the narrowest that is not always zero."""
        known = [value for value in self.ranges if value > 0]
        return max(known) / min(known) if known else 1.0

    @property
    def gain_db(self) -> float:
        """How much smaller the error becomes."""
        if self.apart == 0 or self.joint == 0:
            return math.inf if self.joint > self.apart else 0.0
        return 10 * math.log10(self.joint / self.apart)


def split_shortcuts(job: Job, form: str, least_gain_db: float) -> list[Gain]:
    """Rewrite the layers behind a Concat that gain from it; the float function stays.

    Args:
        job: Its graph is prepared and has no Q/DQ yet.
        form: ``two_op``: one layer for each part. ``equalize``: one layer, whose parts are multiplied into one range
            by powers of two that its weights take back. ``none``: nothing.
        least_gain_db: By how much the error of a layer's output has to fall.

    Returns:
        What each candidate gains, those that were left as they are too.

    Raises:
        OnnxqError: there is no such form.
    """
    if form not in FORMS:
        raise OnnxqError(
            f"expected a form of {', '.join(FORMS)} for shortcuts, found {form!r}",
            hint="two_op is the paper's; equalize keeps one layer",
        )
    if form == "none":
        return []
    gains = measure(job)
    chosen = [gain for gain in gains if gain.gain_db >= least_gain_db]
    if form == "two_op":
        rewrite = SplitShortcuts([gain.shortcut.name for gain in chosen])
        rewrite(job.model)
        for name, parts in rewrite.split.items():
            if name in job.exceptions:
                job.exceptions |= dict.fromkeys(parts, job.exceptions[name])
    else:
        scales = {gain.shortcut.layer.activation.name or "": powers_of_two(gain) for gain in chosen}
        SmoothActivations(scales, insert=True, convolutions=True)(job.model)
    job.measurements["split_shortcuts"] = {
        gain.shortcut.name: {"range_ratio": gain.ratio, "gain_db": gain.gain_db} for gain in chosen
    }
    return gains


def measure(job: Job) -> list[Gain]:
    """What splitting brings to each layer behind a Concat that the target quantizes."""
    left_float = job.place(job.model.graph).left_float
    found = [shortcut for shortcut in find_shortcuts(job.model.graph) if shortcut.name not in left_float]
    if not found:
        return []
    total = min(SAMPLES, len(job.source), job.settings.samples or SAMPLES)
    with job.progress.stage("shortcuts", "Recording shortcuts", total) as advance:
        axes = {shortcut.layer.activation.name or "": shortcut.axis for shortcut in found}
        recorded = record_channels(
            job.model, axes, job.source, job.specs, samples=total, device=job.settings.device, on_batch=advance
        )
    scheme_of = schemes_of(job.scheme, job.exceptions)
    return [
        gain_of(shortcut, recorded[shortcut.layer.activation.name or ""], scheme_of(shortcut.layer.node))
        for shortcut in found
    ]


def gain_of(shortcut: Shortcut, statistics: ChannelStatistics, scheme: Scheme) -> Gain:
    """The error of a layer's output on the rows that were kept, with one range and with a range for each part.

    The places of a kernel count as independent of each other.
    """
    kernel = np.moveaxis(array_of(shortcut.layer.weight), shortcut.layer.channel_axis, 0)  # [outputs, inputs, …]
    outputs, inputs = len(kernel), statistics.rows.shape[1]
    exact = kernel.reshape(outputs, inputs, -1).astype(np.float32)
    apart = np.concatenate([_round_kernel(part, scheme.weights) for part in shortcut.split(exact, 1)], axis=1)
    low, high = shortcut.split(statistics.low, 0), shortcut.split(statistics.high, 0)
    rows = shortcut.split(statistics.rows, 1)
    own = np.concatenate([_round(*part, scheme.activations) for part in zip(rows, low, high, strict=True)], axis=1)
    joint = _round(statistics.rows, statistics.low, statistics.high, scheme.activations)
    return Gain(
        shortcut,
        tuple(float(part.max()) for part in shortcut.split(statistics.maxima, 0)),
        _error(statistics.rows, exact, joint, _round_kernel(exact, scheme.weights)),
        _error(statistics.rows, exact, own, apart),
    )


def powers_of_two(gain: Gain) -> Array:
    """What to divide each channel by, so that all parts reach into the widest one's octave."""
    widest = max(gain.ranges)
    scales = [1.0 if value == 0 else 2.0 ** round(math.log2(value / widest)) for value in gain.ranges]
    return np.repeat(scales, gain.shortcut.sizes)


def _round(values: Array, low: Array, high: Array, spec: Spec) -> Array:
    if not spec.enabled:
        return values
    step, zero_point = scale_and_zero_point(low.min(), high.max(), spec.format, symmetric=spec.symmetric)
    return fake_quantize(values, step, zero_point, spec.format)


def _round_kernel(kernel: Array, spec: Spec) -> Array:
    if not spec.enabled:
        return kernel
    # Blocks lie along the inputs, so that each place of a kernel is a row of its own.
    rows = kernel.transpose(0, 2, 1).reshape(-1, kernel.shape[1]) if spec.granularity == "block" else kernel
    rounded = round_matrix(rows.reshape(len(rows), -1), spec)
    if spec.granularity == "block":
        return rounded.reshape(len(kernel), -1, kernel.shape[1]).transpose(0, 2, 1)
    return rounded.reshape(kernel.shape)


def _error(rows: Array, kernel: Array, rounded_rows: Array, rounded: Array) -> float:
    total = 0.0
    for place in range(kernel.shape[2]):
        difference = rounded_rows @ rounded[:, :, place].T - rows @ kernel[:, :, place].T
        total += float(np.square(difference, dtype=np.float64).mean())
    return total
