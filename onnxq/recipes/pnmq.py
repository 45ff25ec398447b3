"""PNMQ: weights on power grids, with clips, and widths for a compression that the user states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxq.calibration import observers
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.passes.equalize_layers import EqualizeLayers
from onnxq.passes.tabulate_weights import STORAGES
from onnxq.weights.float_weights import FloatWeight, float_weights, in_int8, storage_of
from onnxq.weights.levels import insert_levels
from onnxq.weights.tables import Fit, Measure, fit
from onnxq.weights.thresholds import widths

SCALE_BITS = 32


@dataclass(frozen=True)
class Pnmq:
    """Parametric non-uniform mixed-precision quantization, from the weights alone or with a few samples.

    1. Rewrite the graph so that the target's kernels match; ``equalize`` shares ranges out between layers.
    2. For each weight and width: the curve p of the grid s·sign(k)·|k|^p, and the scale s of each row, that leave
       the least Σ |W' − W|⁴, by search over a grid; with ``output_samples``, the least error of the layer's outputs
       on so many samples, in float, in its place.
    3. With ``compression``: the least threshold T such that every weight at its narrowest width of loss ≤ T fits.
    4. Weights become codes and tables, and biases take back the mean shift that this causes; activations stay float
       unless a format is given.

    It compresses the file: kernels are float, or int8 with ``storage="int8"`` (see the recipe ``powerquant``).

    Source: V. Chikin, M. Antiukh, Data-Free Network Compression via Parametric Non-Uniform Mixed Precision
    Quantization, CVPR 2022, pp. 450–459. The paper's text was not at hand; grid and sweep follow descriptions of it.

    Departures:
        - Scales per channel; the paper's are per tensor (``--weights int4:tensor``).
        - p up to 2.5 instead of 2: heavy tails at many bits reach the bound.
        - Biases are corrected, with means from inputs made from the model where there is no data: at int4 that is 4 dB
          on ResNet-20 and from 0.4 to 48 % on MobileNetV1 0.25. ``bias_correction=false`` leaves them, in seconds.
        - Losses are compared between layers relative to Σ W⁴ (``relative=False``: per element).
        - No Huffman coding of the codes: runtimes read no such file. Widths of 5 and more take a byte in the file,
          3 and 2 take four bits; the sizes that the sweep counts are the codes' own.

    Attributes:
        compression: Float bytes over code bytes of the quantized weights; 0: ``--weights`` for all.
        candidates: The widths to choose from.
        norm: The power of the error in the search of the grid; 2 clips more, and did worse on the CNNs we measured.
        output_samples: Samples on which the error of layers' outputs is searched instead; 0: the weights alone say.
            The paper takes 32 to 160.
        relative: Whether losses count relative to the weight's own size (or that of its outputs).
        equalize: Whether neighbouring layers share their ranges out first.
        storage: ``table``, ``int8``, or ``auto``: int8 where activations are quantized.
        observer: How a range follows from the statistics of an activation.
        bias_correction: Whether biases take back the mean shift that rounding the weights causes, with means from data
            or from inputs made from the model itself.
    """

    compression: float = 0.0
    candidates: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    norm: float = 4.0
    output_samples: int = 0
    relative: bool = True
    equalize: bool = True
    storage: str = "auto"
    observer: str = "robust"
    bias_correction: bool = True

    @property
    def reads_data(self) -> bool:
        """Whether samples say more than how good the result is."""
        return self.output_samples > 0

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observer, storage = observers.get(self.observer), storage_of(job, self.storage, STORAGES)
        if self.output_samples < 0:
            raise OnnxqError(
                f"expected output_samples of at least 0, found {self.output_samples}", hint="--set output_samples=64"
            )
        if self.compression < 0 or not self.candidates or not set(self.candidates) <= set(range(2, 9)):
            raise OnnxqError(
                f"expected a compression of at least 0 and widths from 2 to 8, found {self.compression} and "
                f"{list(self.candidates)}",
                hint="use for example --set compression=8",
            )
        job.prepare()
        if self.equalize:
            EqualizeLayers()(job.model)
        weights = float_weights(job)
        fits = self._fits(job, weights, self._measures(job, weights))
        if self.compression:
            for weight in weights:
                width = next(iter(fits[weight.name]))
                job.exceptions |= {node: in_int8(job.scheme, width) for node in weight.nodes}
        tables = {name: (found.table, found.scale) for name, by_width in fits.items() for found in by_width.values()}
        insert_levels(job, tables, storage, observer, corrects_biases=self.bias_correction)
        job.lower()

    def _measures(self, job: Job, weights: list[FloatWeight]) -> Mapping[str, Measure]:
        """What counts as a weight's error, where that is not the weight's own."""
        if not self.output_samples:
            return {}
        from onnxq.learning.output_errors import output_errors

        return output_errors(job, weights, min(self.output_samples, len(job.source)))

    def _fits(self, job: Job, weights: list[FloatWeight], measures: Mapping[str, Measure]) -> dict[str, dict[int, Fit]]:
        """The grid of each weight, at the width that it gets."""
        found: dict[str, dict[int, Fit]] = {}
        with job.progress.stage("search", "Fitting grids", len(weights)) as advance:
            for weight in weights:
                rows = weight.rows()
                candidates = self.candidates if self.compression else (weight.bits,)
                measure = measures.get(weight.name)
                found[weight.name] = {bits: self._fit(rows, bits, measure) for bits in sorted(candidates)}
                advance(1)
        if not self.compression:
            return found
        chosen = self._widths(weights, found, measures)
        return {name: {width: found[name][width]} for name, width in chosen.items()}

    def _fit(self, rows: np.ndarray, bits: int, measure: Measure | None) -> Fit:
        # Clips matter at few bits, curves at many; at 8 bits the extremes are kept as they are.
        clips = np.linspace(1.0, 0.4, 13) if bits <= 4 else np.linspace(1.0, 0.7, 7)
        curves = np.arange(1.0, 2.51, 0.125) if bits > 2 else np.ones(1)  # three levels have no curve
        return fit(rows, bits, tuple(curves), tuple(clips), self.norm, measure)

    def _widths(
        self, weights: list[FloatWeight], fits: Mapping[str, Mapping[int, Fit]], measures: Mapping[str, Measure]
    ) -> dict[str, int]:
        losses, bits, total = {}, {}, 0
        for weight in weights:
            rows = weight.rows()
            measure = measures.get(weight.name)
            size: float = rows.size
            if self.relative and measure is None:
                size = float(np.power(np.abs(rows), self.norm).sum(dtype=np.float64))
            elif self.relative and measure is not None:
                size = float(measure(rows, slice(0, len(rows))).sum())
            losses[weight.name] = {width: found.error / max(size, 1e-30) for width, found in fits[weight.name].items()}
            bits[weight.name] = {width: rows.size * width + len(rows) * SCALE_BITS for width in fits[weight.name]}
            total += rows.size * 32
        return widths(losses, bits, int(total / self.compression))
