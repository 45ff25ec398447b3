"""BRECQ: rounding learned block by block, so that the layers of a block make up for each other."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.job import Job
from onnxq.learning.reconstruction_knobs import BlockKnobs


@dataclass(frozen=True, kw_only=True)
class Brecq(BlockKnobs):
    """Learned rounding and activation steps of residual blocks.

    1. Rewrite the graph, insert Q/DQ, calibrate activations; weight steps by the least error.
    2. Block by block, on what the rounded part of the network makes: learn the rounding of all its weights, so that
       the block's output is the float network's.
    3. Block by block, on what the quantized part makes, with a quarter of the steps: learn the steps of activations.
    4. Store weights as codes, lint, check.

    Source: Y. Li, R. Gong, X. Tan, Y. Yang, P. Hu, Q. Zhang, F. Yu, W. Wang, S. Gu, BRECQ: Pushing the Limit of
    Post-Training Quantization by Block Reconstruction, ICLR 2021 (arXiv 2102.05426), section 3.2 and algorithm 1.

    Departures:
        - With activations of 8 bits, channels that stick out far are levelled first, as in the recipe int8.
        - The error is not weighted by the Fisher information (equation 10): it needs labels or the loss of training.
        - Weights are symmetric, as TensorRT needs them; the authors' code has zero points.
        - Learning starts from GPTQ's codes and corrected biases: where four bits are few, the two codes around a weight
          do not hold a good network (MobileNetV1 0.25 at W4A8). Biases are learned beside the rounding.
          ``start=nearest`` and ``bias_rate=0`` are the paper's.
        - Activation steps are learned in the logarithm, at a rate of 1e-3.
        - Fewer steps, as in the recipe ``adaround``. First and last layers are not treated apart unless
          ``--first-last int8`` says so; the paper keeps them at 8 bits.
    """

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        steps = self.steps(job) if job.scheme.activations.enabled and self.activation_step_rate > 0 else None
        self.quantize(job, self.rounding(job), "block", steps)
