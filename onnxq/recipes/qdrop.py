"""QDrop: block reconstruction whose activations are quantized at random, which makes it flat for unseen data."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.reconstruct import Reconstruction, iterations_of, quantize_by_blocks, rounding_rate


@dataclass(frozen=True)
class QDrop:
    """BRECQ, with every activation element left float with probability one half while a block learns.

    1. Rewrite the graph, insert Q/DQ, calibrate activations; weight steps by the least error.
    2. Block by block: inputs whose elements come from the quantized or, by chance, from the float network; activations
       inside that are quantized or, by chance, not; learn rounding and activation steps, and, if asked for, the steps
       of weights (GENIE-M).
    3. Store weights as codes, lint, check.

    Source: X. Wei, R. Gong, Y. Li, X. Liu, F. Yu, QDrop: Randomly Dropping Quantization for Extremely Low-bit
    Post-Training Quantization, ICLR 2022 (arXiv 2203.05740), algorithm 1; ``weight_step_rate`` is GENIE-M of
    Y. Jeon, C. Lee, H. Kim, Genie: Show Me the Data for Quantization, CVPR 2023 (arXiv 2212.04780), section 3.2.

    Departures: those of the recipe ``brecq``.

    Attributes:
        iterations: Steps of Adam for each block; 0: what ``--budget`` says.
        batch: Samples in a step.
        drop: Probability that an activation stays float in a step.
        mix: Probability that an element of a block's input comes from the float network.
        activation_step_rate: Adam's rate for the logarithm of activation steps; 0 keeps them.
        weight_step_rate: Adam's rate for the logarithm of weight steps; 0 keeps them.
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
    drop: float = 0.5
    mix: float = 0.5
    activation_step_rate: float = 1e-3
    weight_step_rate: float = 0.0
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
            weight_step_rate=self.weight_step_rate,
            activation_step_rate=self.activation_step_rate,
            quantize_activations=True,
            drop=self.drop,
            mix=self.mix,
            regularisation=self.regularisation,
            correct_biases=self.correct_biases,
            start=self.start,
            bias_rate=self.bias_rate,
        )
        quantize_by_blocks(job, options, "block", self.observer, self.weight_ranges, self.samples, self.cache_mib)
