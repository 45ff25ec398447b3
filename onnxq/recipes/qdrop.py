"""QDrop: block reconstruction whose activations are quantized at random, which makes it flat for unseen data."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.job import Job
from onnxq.learning.reconstruction_knobs import BlockKnobs


@dataclass(frozen=True, kw_only=True)
class QDrop(BlockKnobs):
    """BRECQ, with every activation element left float with probability one half while a block learns.

    1. Rewrite the graph, insert Q/DQ, calibrate activations; weight steps by the least error.
    2. Block by block: inputs whose elements come from the quantized or, by chance, from the float network; activations
       inside that are quantized or, by chance, not; learn rounding and activation steps, and, if asked for, the steps
       of weights (GENIE-M).
    3. Take back the mean error that the layers of each block are left with; store weights as codes, lint, check.

    Source: X. Wei, R. Gong, Y. Li, X. Liu, F. Yu, QDrop: Randomly Dropping Quantization for Extremely Low-bit
    Post-Training Quantization, ICLR 2022 (arXiv 2203.05740), algorithm 1; ``weight_step_rate`` is GENIE-M of
    Y. Jeon, C. Lee, H. Kim, Genie: Show Me the Data for Quantization, CVPR 2023 (arXiv 2212.04780), section 3.2.

    Departures: those of the recipe ``brecq``, and:
        - Biases take back the mean error that is left (``correct_biases``). Half of the inputs that a block learns on
          are the float network's, and what the quantized part makes has other means: at W4A4 that costs a network of
          depthwise convolutions eight points, and residual networks nothing.

    Attributes:
        correct_biases: Whether biases take back the mean error that a block is left with.
        drop: Probability that an activation stays float in a step.
        mix: Probability that an element of a block's input comes from the float network.
        weight_step_rate: Adam's rate for the logarithm of weight steps; 0 keeps them.
    """

    correct_biases: bool = True
    drop: float = 0.5
    mix: float = 0.5
    weight_step_rate: float = 0.0

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        options = self.rounding(
            job,
            weight_step_rate=self.weight_step_rate,
            activation_step_rate=self.activation_step_rate,
            quantize_activations=True,
            drop=self.drop,
            mix=self.mix,
        )
        self.quantize(job, options, "block")
