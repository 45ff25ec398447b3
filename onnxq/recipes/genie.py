"""GENIE: images made by a generator, then rounding and steps of weights learned together, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.recipes.qdrop import QDrop


@dataclass(frozen=True, kw_only=True)
class Genie(QDrop):
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
        weight_step_rate: Adam's rate for the logarithm of weight steps; 0 keeps them, which is QDrop.
    """

    synthesis: ClassVar[str] = "genie"

    images: int = 256
    weight_step_rate: float = 1e-4
