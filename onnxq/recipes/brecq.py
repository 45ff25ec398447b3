"""BRECQ: rounding learned block by block, so that the layers of a block make up for each other."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.reconstruct import Reconstruction, iterations_of, quantize_by_blocks, rounding_rate


@dataclass(frozen=True)
class Brecq:
    """Learned rounding and activation steps of residual blocks.

    1. Rewrite the graph, insert Q/DQ, calibrate activations; weight steps by the least error.
    2. Block by block, on what the quantized part of the network makes: learn the rounding of all its weights and the
       steps of its activations, so that the block's output is the float network's.
    3. Store weights as codes, lint, check.

    Source: Y. Li, R. Gong, X. Tan, Y. Yang, P. Hu, Q. Zhang, F. Yu, W. Wang, S. Gu, BRECQ: Pushing the Limit of
    Post-Training Quantization by Block Reconstruction, ICLR 2021 (arXiv 2102.05426), section 3.2 and algorithm 1.

    Departures:
        - The error is not weighted by the Fisher information (equation 10): it needs labels or the loss of training.
        - Rounding and activation steps are learned together; the paper learns the steps afterwards.
        - Weights are symmetric, as TensorRT needs them; the authors' code has zero points.
        - Learning starts from GPTQ's codes and corrected biases: where four bits are few, the two codes around a weight
          do not hold a good network (MobileNetV1 0.25 at W4A8). Biases are learned beside the rounding.
          ``start=nearest`` and ``bias_rate=0`` are the paper's.
        - Activation steps are learned in the logarithm, at a rate of 1e-3.
        - Fewer steps, as in the recipe ``adaround``. First and last layers are not treated apart unless
          ``--first-last int8`` says so; the paper keeps them at 8 bits.

    Attributes:
        iterations: Steps of Adam for each block; 0: what ``--budget`` says.
        batch: Samples in a step.
        activation_step_rate: Adam's rate for the logarithm of activation steps; 0 keeps them.
        regularisation: Weight of the penalty on undecided roundings.
        observer: How the first range follows from the statistics of an activation.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
        correct_biases: Whether biases take back the mean error that a block is left with: for networks that run many
            times over, as denoisers do; a classifier gains nothing.
        start: ``gptq``: every weight chooses between the code that GPTQ gives it and that code's neighbour;
            ``nearest``: between the two codes around it.
        bias_rate: Adam's rate for biases; 0 keeps them.
        samples: How many samples to learn from, at most.
        cache_mib: Memory for activations between two blocks; what is more goes to files.
    """

    iterations: int = 0
    batch: int = 32
    activation_step_rate: float = 1e-3
    regularisation: float = 0.01
    observer: str = "mse"
    weight_ranges: str = "mse"
    correct_biases: bool = False
    start: str = choice("gptq", "nearest")
    bias_rate: float = 1e-3
    samples: int = 1024
    cache_mib: int = 1024

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        steps = iterations_of(job, self.iterations)
        options = Reconstruction(
            steps,
            self.batch,
            rounding_rate(steps),
            activation_step_rate=self.activation_step_rate,
            quantize_activations=True,
            regularisation=self.regularisation,
            correct_biases=self.correct_biases,
            start=self.start,
            bias_rate=self.bias_rate,
        )
        quantize_by_blocks(job, options, "block", self.observer, self.weight_ranges, self.samples, self.cache_mib)
