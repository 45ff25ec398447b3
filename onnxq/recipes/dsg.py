"""DSG: distilled inputs that are kept apart, by slack and by a layer of its own for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.job import Job
from onnxq.recipes.static import Static


@dataclass(frozen=True)
class Dsg:
    """Ranges from diverse distilled inputs; no data is needed.

    1. Slack: how far normal noise is from the remembered statistics, for each layer; so much is free.
    2. Distil as ZeroQ does, beyond the slack; the i-th sample of a batch weighs the i-th layer twice, and a batch has
       as many samples as the network has BatchNormalization.
    3. The extremes of activations become ranges; weights become codes; lint, check.

    Source: X. Zhang, H. Qin, Y. Ding, R. Gong, Q. Yan, R. Tao, Y. Li, F. Yu, X. Liu, Diversifying Sample Generation
    for Accurate Data-Free Quantization, CVPR 2021 (arXiv 2103.01049), sections 3.2 and 3.3.

    Departures:
        - Slack is that of batch statistics of noise, 64 samples of it, in the units that the first layer expects.
        - The terms of the journal version (classes, variation, eigenvectors) are not there.
        - Batches of large inputs are smaller than the number of layers; the next batch goes on with the next layer.
        - Those of the recipe ``zeroq`` on distillation and ranges.

    Attributes:
        images: How many inputs are distilled.
        observer: How a range follows from the statistics of an activation.
    """

    synthesis: ClassVar[str] = "dsg"

    images: int = 32
    observer: str = "minmax"

    def run(self, job: Job) -> None:
        """Quantize the job's model on inputs that were distilled before."""
        Static(observer=self.observer, bias_correction=False, smooth=0.0).run(job)
