"""ZeroQ: inputs distilled from BatchNormalization set ranges and tell which layers need more bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.job import Job
from onnxq.recipes.mixed import Mixed
from onnxq.recipes.static import Static


@dataclass(frozen=True)
class ZeroQ:
    """Ranges, and with a budget a width for each layer, from distilled inputs; no data is needed.

    1. Distil: pixels are learned so that the statistics of every sample are those that BatchNormalization remembers.
    2. Without a budget: the extremes of activations over the distilled inputs become ranges.
    3. With one: the KL divergence of the output when one layer alone is quantized, for each width; the least sum
       within the budget, from the Pareto front over sums of sizes and sums of divergences.
    4. Store weights as codes, lint, check.

    Source: Y. Cai, Z. Yao, Z. Dong, A. Gholami, M. W. Mahoney, K. Keutzer, ZeroQ: A Novel Zero Shot Quantization
    Framework, CVPR 2020 (arXiv 2001.00281), sections 3.1 to 3.3.

    Departures:
        - Statistics are taken where the graph has BatchNormalization; the authors' code pairs layers by their order.
        - Pixels start from a normal distribution, as the paper says, in the units that the first layer expects; the
          code starts from values near zero. Fewer steps, unless ``--budget paper``.
        - Ranges are collected on the float network; the code's is quantized already.
        - Weights are symmetric, and activations are quantized where the target has kernels for it.
        - Weight steps of mixed precision minimise the squared error (``weight_ranges=minmax`` is the paper's).
        - With ``--data``, those samples are used and nothing is distilled.

    Below 8 bits extremes are no good rule, whatever they are taken from, and what is better there need not be nearer
    to real data. The shipped Fashion-MNIST classifier, quantized as in the paper, W4A4, has 90.4 % with the extremes of
    32 real images, 93.9 % with half of them, 60.2 % with 1.2 times and 87.5 % with 1.5 times; of 32 inputs each, two
    seeds: noise 90.7 and 83.7 %, this recipe 86.7 and 81.8 % (its first layers reach 1.05 to 1.2 times as far as real
    ones), ``genie`` 93.5 and 93.1 %. At W3A3 the papers' order holds: noise 28 and 29 %, this recipe 43 and 39, ``dsg``
    45 and 40, ``genie`` 63 and 61, real images 35 and 31. Use another ``observer``.

    Attributes:
        images: How many inputs are distilled.
        budget_bits: The mean width of weights; 0: no budget.
        budget_mib: Size of all weights in the file; 0: no budget.
        weight_bits: The widths to choose from.
        observer: How a range follows from the statistics of an activation.
        weight_ranges: ``mse`` or ``minmax``, with a budget; without, the extremes.
    """

    synthesis: ClassVar[str] = "zeroq"

    images: int = 32
    budget_bits: float = 0.0
    budget_mib: float = 0.0
    weight_bits: str = "2,4,8"
    observer: str = "minmax"
    weight_ranges: str = "mse"

    def run(self, job: Job) -> None:
        """Quantize the job's model on inputs that were distilled before."""
        if self.budget_bits or self.budget_mib:
            Mixed(
                weight_bits=self.weight_bits,
                budget_bits=self.budget_bits,
                budget_mib=self.budget_mib,
                solver="pareto",
                sensitivity_samples=self.images,
                observer=self.observer,
                weight_ranges=self.weight_ranges,
            ).run(job)
        else:
            Static(observer=self.observer, bias_correction=False, smooth=0.0).run(job)
