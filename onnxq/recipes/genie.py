"""GENIE: images made by a generator, then rounding and steps of weights learned together, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.recipes.qdrop import QDrop


@dataclass(frozen=True)
class Genie:
    """Zero-shot quantization by reconstruction; no data is needed.

    1. GENIE-D: for each batch a generator and its latent codes are learned together, so that the batch's statistics
       are those that BatchNormalization remembers; strided convolutions read shifted inputs meanwhile.
    2. Rewrite the graph, insert Q/DQ, calibrate activations; weight steps by the least error.
    3. GENIE-M: block by block, learn the rounding of weights, the steps of weights beside it, and the steps of
       activations, while quantization is dropped at random (QDrop).
    4. Store weights as codes, lint, check.

    Source: Y. Jeon, C. Lee, H. Kim, Genie: Show Me the Data for Quantization, CVPR 2023 (arXiv 2212.04780), sections
    3.1 to 3.3.

    Departures:
        - Fewer images (1,024 in the paper) and fewer steps for each batch and block; ``--budget paper`` and
          ``--set images=1024`` give the paper's.
        - Weights are symmetric, as TensorRT needs them; the paper has zero points.
        - Steps are learned in the logarithm, weight steps at a rate that annealing brings to zero; the first step
          minimises the squared error, the paper's the error to the power of 2.4.
        - The first and last layers are 8-bit only with ``--first-last int8``, and the network's input is quantized.
        - Learning starts from GPTQ's codes, and biases are learned, as in ``brecq``; ``start=nearest`` and
          ``bias_rate=0`` are the paper's.
        - With ``--data``, those samples are used and no images are made.

    Attributes:
        images: How many images are made.
        iterations: Steps of Adam for each block; 0: what ``--budget`` says.
        batch: Samples in a step.
        weight_step_rate: Adam's rate for the logarithm of weight steps; 0 keeps them, which is QDrop.
        activation_step_rate: Adam's rate for the logarithm of activation steps; 0 keeps them.
        drop: Probability that an activation stays float in a step.
        mix: Probability that an element of a block's input comes from the float network.
        regularisation: Weight of the penalty on undecided roundings.
        observer: How the first range follows from the statistics of an activation.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
        start: ``gptq``: every weight chooses between the code that GPTQ gives it and that code's neighbour;
            ``nearest``: between the two codes around it.
        bias_rate: Adam's rate for biases; 0 keeps them.
        samples: How many samples to learn from, at most.
        cache_mib: Memory for activations between two blocks; what is more goes to files.
    """

    synthesis: ClassVar[str] = "genie"

    images: int = 256
    iterations: int = 0
    batch: int = 32
    weight_step_rate: float = 1e-4
    activation_step_rate: float = 1e-3
    drop: float = 0.5
    mix: float = 0.5
    regularisation: float = 0.01
    observer: str = "mse"
    weight_ranges: str = "mse"
    start: str = choice("gptq", "nearest")
    bias_rate: float = 1e-3
    samples: int = 1024
    cache_mib: int = 1024

    def run(self, job: Job) -> None:
        """Quantize the job's model on images that were made before."""
        QDrop(
            iterations=self.iterations,
            batch=self.batch,
            drop=self.drop,
            mix=self.mix,
            activation_step_rate=self.activation_step_rate,
            weight_step_rate=self.weight_step_rate,
            regularisation=self.regularisation,
            observer=self.observer,
            weight_ranges=self.weight_ranges,
            start=self.start,
            bias_rate=self.bias_rate,
            samples=self.samples,
            cache_mib=self.cache_mib,
        ).run(job)
