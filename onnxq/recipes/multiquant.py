"""MultiQuant: one stored model from which every width is exported."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.recipes.static import Static
from onnxq.weights.masters import attach_tables


@dataclass(frozen=True)
class MultiQuant:
    """An int8 model that carries, for each weight, the scales of all widths from 2 to 8 bits.

    1. Quantize to int8, as the static recipe does.
    2. For every width and output channel, find the scale that leaves the least error against the int8 master.
    3. Store the tables beside the codes. ``onnxq export MODEL --bits 4`` writes the model of a width.

    The file is that of int8 and seven numbers for each channel. As it stands it runs at 8 bits.

    Source: K. Xu, Q. Feng, X. Zhang, D. Wang, MultiQuant: Training Once for Multi-bit Quantization of Neural Networks,
    IJCAI 2022 (doi 10.24963/ijcai.2022/504).

    Departures:
        - Nothing is trained: the paper trains all widths together, lowest, random and highest in each step. At 3 and
          2 bits that is what counts, so expect the accuracy of clipped rounding there.
        - Only weights change their width; activations keep their 8 bits.
        - BatchNormalization is folded, so that it is not estimated again for each width.

    Attributes:
        observer: How a range follows from the statistics of an activation.
        bias_correction: Whether biases take back the mean shift that rounding to 8 bits causes.
        weight_ranges: How the master's range follows from the weights: ``minmax`` or ``mse``.
    """

    observer: str = "robust"
    bias_correction: bool = True
    weight_ranges: str = "minmax"

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        weights = job.scheme.weights
        if weights.format.name != "int8" or weights.granularity == "block":
            raise OnnxqError(
                f"expected int8 weights per channel as the master of all widths, found {weights}",
                hint="leave --weights out; `onnxq export --bits` picks the width",
            )
        Static(self.observer, self.bias_correction, weight_ranges=self.weight_ranges).run(job)
        attach_tables(job.model)
