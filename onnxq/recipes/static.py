"""Static post-training quantization: the default with data."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.diffusion.step_floor import hold_floor
from onnxq.job import Job
from onnxq.learning.smoothing import smooth
from onnxq.passes.equalize_layers import EqualizeLayers


@dataclass(frozen=True)
class Static:
    """Ranges from one pass over the data, nearest rounding, integer weights.

    1. Rewrite the graph so that the target's kernels match (BatchNormalization and Pad folded). Take outliers of
       channels into the weights: in a model that reads text also by nodes where they pay, tokens getting scales too; in
       others, denoisers apart, where it costs no node and the layers gain by it.
    2. Insert Q/DQ where the target wants them; for a denoiser, find the layers that have to stay float first.
    3. Run the float graph once over the data; statistics become activation scales.
    4. Weight scales come from the weights, per output channel.
    5. Biases take back the mean shift that rounding the weights causes.
    6. Store weights as codes, lint, check.

    Source: R. Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018
    (arXiv 1806.08342); the range rules are those of ``onnxq.calibration.observers``.

    Attributes:
        observer: How a range follows from the statistics of an activation: ``robust``, ``mse``, ``minmax``,
            ``widened`` (for inputs that were made), ``mean_extremes``, ``percentile`` or ``entropy``.
        bias_correction: Whether biases are corrected (M. Nagel et al., ICCV 2019, arXiv 1906.04721).
        equalize: Whether neighbouring layers share their ranges out first (the same paper).
        shift: Whether one-sided activations, as Relu and SiLU make them, are shifted into a symmetric range where codes
            have to be symmetric (TensorRT): half the step for one Add and, before a padded convolution, one Pad more.
        weight_ranges: How a range follows from the weights: ``minmax``; ``mse``, the clip with the least error; or
            ``few``, the best of five clips, which takes a tenth of the time.
        smooth: How much of what single channels of a model that reads text are larger than others goes into its weights
            first (G. Xiao et al., ICML 2023, arXiv 2211.10438), between 0 and 1; others find it for each group of
            layers. 0 turns it off for all; integers only.
        step_floor_db: SQNR that a denoiser keeps in every sampler step: the layers that make the most error in the
            worst steps stay float until it does. 0 turns it off; data without steps has none to keep.
    """

    observer: str = "robust"
    bias_correction: bool = True
    equalize: bool = False
    shift: bool = False
    weight_ranges: str = "minmax"
    smooth: float = 0.75
    step_floor_db: float = 22.0

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        job.prepare()
        if self.equalize:
            EqualizeLayers()(job.model)
        if self.smooth > 0:
            smooth(job, self.smooth)
        self.quantize(job)

    def quantize(self, job: Job) -> None:
        """Steps 2 to 6, on a graph that is prepared already."""
        observer, search = observers.get(self.observer), weight_ranges.get(self.weight_ranges)
        hold_floor(job, observer, search, self.step_floor_db)
        insert_calibrated(job, observer, search, shift=self.shift, corrects_biases=self.bias_correction)
        job.lower()
