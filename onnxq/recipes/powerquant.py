"""PowerQuant: weights on a non-uniform grid with one searched exponent."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.calibration import observers
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.passes.power_activations import PowerActivations
from onnxq.passes.tabulate_weights import STORAGES
from onnxq.weights.float_weights import FloatWeight, float_weights, storage_of
from onnxq.weights.levels import insert_levels
from onnxq.weights.tables import least_exponent, power_table, widest_scale


@dataclass(frozen=True)
class PowerQuant:
    """Automorphism search: codes are round(q·(|w| / max|w|)^a), with one a for the network.

    1. Rewrite the graph so that the target's kernels match.
    2. a = argmin Σ ‖W − W'(a)‖₂ over the weights, scales per channel from the extremes. No data.
    3. Every weight becomes codes and a table of 2^b levels; biases take back the mean shift that this causes.
    4. Activations: float by default; quantized as usual, or in the power domain too.

    What runs where. Codes in the power domain cannot be multiplied and summed as integers: (w·x)^a is the product of
    the codes, but a sum of powers is no power of the sum. So ``table`` storage is a compressed file whose kernels
    are float. With quantized activations the levels are rounded once more, to int8 (``storage="int8"``): integer
    kernels, of the size of int8. FP8 and FP4 are the non-uniform grids that hardware multiplies.

    Source: E. Yvinec, A. Dapogny, M. Cord, K. Bailly, PowerQuant: Automorphism Search for Non-Uniform Quantization,
    ICLR 2023 (arXiv 2301.09858).

    Departures:
        - A grid and golden section in place of Nelder–Mead, in one dimension.
        - ``nearest`` rounds to the nearest level, which is never worse; ``nearest=False`` rounds in the power domain,
          as the paper does.
        - ``scope="tensor"`` searches an exponent for each weight.
        - The paper's integer inference is not done, for the reason above.
        - Biases are corrected, with means from inputs made from the model where there is no data: at int4 that is 4 dB
          on ResNet-20 and from 0.2 to 40 % on MobileNetV1 0.25. ``bias_correction=false`` is the paper's, in seconds.

    Attributes:
        scope: ``model``, one exponent for the network, or ``tensor``, one for each weight.
        nearest: Whether weights are rounded to the nearest level.
        storage: ``table``, ``int8``, or ``auto``: int8 where activations are quantized.
        power_activations: Whether activations are quantized in the power domain; their products are then float.
        observer: How a range follows from the statistics of an activation.
        bias_correction: Whether biases take back the mean shift that rounding the weights causes, with means from data
            or from inputs made from the model itself.
    """

    scope: str = choice("model", "tensor")
    nearest: bool = True
    storage: str = "auto"
    power_activations: bool = False
    observer: str = "robust"
    bias_correction: bool = True

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observer, storage = observers.get(self.observer), storage_of(job, self.storage, STORAGES)
        job.prepare()
        weights = float_weights(job)
        widths = sorted({weight.bits for weight in weights})
        exponents = {bits: self._exponent([item for item in weights if item.bits == bits]) for bits in widths}
        tables = {}
        for weight in weights:
            exponent = self._exponent([weight]) if self.scope == "tensor" else exponents[weight.bits]
            table = power_table(weight.bits, 1 / exponent, nearest=self.nearest)
            tables[weight.name] = (table, widest_scale(weight.rows(), weight.bits))
        insert_levels(job, tables, storage, observer, corrects_biases=self.bias_correction)
        if self.power_activations:
            PowerActivations(min(exponents.values()))(job.model)
        job.lower()

    def _exponent(self, weights: list[FloatWeight]) -> float:
        return least_exponent([weight.rows() for weight in weights], weights[0].bits, nearest=self.nearest)
