"""AdaRound: every weight learns whether it is rounded up or down, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.reconstruct import Reconstruction, iterations_of, quantize_by_blocks, rounding_rate


@dataclass(frozen=True)
class AdaRound:
    """Learned rounding of single layers, from unlabelled samples.

    1. Rewrite the graph, insert Q/DQ, calibrate activations; weight steps by the least error.
    2. Layer by layer, on what the rounded part of the network makes: learn h(V) so that the layer's output is the
       float network's; a penalty then drives every h to 0 or 1.
    3. Store weights as codes, lint, check.

    Source: M. Nagel, R. A. Amjad, M. van Baalen, C. Louizos, T. Blankevoort, Up or Down? Adaptive Rounding for
    Post-Training Quantization, ICML 2020 (arXiv 2004.10568), equations 21 to 25.

    Departures:
        - The paper takes 10,000 steps a layer. ``--budget default`` takes 1,000 and ``quick`` 200, with Adam's rate
          raised by the root of the ratio; ``paper`` takes 20,000, as BRECQ and QDrop do.
        - The error is measured after the nonlinearity that follows the layer, whichever it is.

    Attributes:
        iterations: Steps of Adam for each layer; 0: what ``--budget`` says.
        batch: Samples in a step.
        regularisation: Weight of the penalty on undecided roundings.
        observer: How a range follows from the statistics of an activation.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
        correct_biases: Whether biases take back the mean error that a block is left with: for networks that run many
            times over, as denoisers do; a classifier gains nothing.
        start: ``nearest``: every weight chooses between the two codes around it; ``gptq``: between the code that GPTQ
            gives it and that code's neighbour.
        bias_rate: Adam's rate for biases; 0 keeps them.
        samples: How many samples to learn from, at most.
        cache_mib: Memory for activations between two layers; what is more goes to files.
    """

    iterations: int = 0
    batch: int = 32
    regularisation: float = 0.01
    observer: str = "mse"
    weight_ranges: str = "mse"
    correct_biases: bool = False
    start: str = choice("nearest", "gptq")
    bias_rate: float = 0.0
    samples: int = 1024
    cache_mib: int = 1024

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        steps = iterations_of(job, self.iterations)
        options = Reconstruction(
            steps,
            self.batch,
            rounding_rate(steps),
            regularisation=self.regularisation,
            correct_biases=self.correct_biases,
            start=self.start,
            bias_rate=self.bias_rate,
        )
        quantize_by_blocks(job, options, "layer", self.observer, self.weight_ranges, self.samples, self.cache_mib)
