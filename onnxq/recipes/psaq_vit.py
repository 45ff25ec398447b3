"""PSAQ-ViT: images for vision transformers, which remember no statistics, from the similarities of patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.job import Job
from onnxq.recipes.static import Static


@dataclass(frozen=True)
class PsaqVit:
    """Ranges from images whose patches a transformer tells apart; no data and no BatchNormalization is needed.

    1. From noise, learn pixels, seen through random shifts and flips: the entropy of the similarities between
       patches after each attention is to be large, each image is to be of a class drawn for it, and the variation of
       the batch that of natural images.
    2. Statistics of activations become ranges; weights become codes; lint, check.

    Source: Z. Li, L. Ma, M. Chen, J. Xiao, Q. Gu, Patch Similarity Aware Data-Free Quantization for Vision
    Transformers, ECCV 2022 (arXiv 2203.02250), section 3 and algorithm 1.

    Departures:
        - The density of similarities has a bandwidth of 0.05 at 50 points, where the authors' code has 0.01 at 10:
          see :class:`onnxq.synthesis.attention.PatchEntropy`. Similarities are counted in bins a quarter of that wide.
        - Of more than 576 patches, as large pictures and early stages have, 576 spread evenly are compared.
        - Shifts and the wanted variation are scaled to the size of the images.
        - Pixels stay between -2.2 and 2.7 in normalised units in every channel, whatever mean and deviation are.
        - Windows of one image have no patch left out; the code leaves out the first of each.
        - Softmax outputs are quantized where the target has kernels for it; weights are symmetric.
        - Inputs have mean 0 and deviation 1 in each channel by a term of its own: without it images lost their
          contrast.
        - A third of the inputs is noise, and ranges are those of the rule ``robust``: a convolutional stem otherwise
          sees too little. On a hybrid for CIFAR-10 this is worth 1.4 (W6A6) to 3.6 dB (W8A8) beside noise alone.
        - Fewer steps, unless ``--budget paper``. With ``--data``, those samples are used and no images are made.

    Attributes:
        images: How many images are made.
        observer: How a range follows from the statistics of an activation.
    """

    synthesis: ClassVar[str] = "psaq-vit"

    images: int = 32
    observer: str = "robust"

    def run(self, job: Job) -> None:
        """Quantize the job's model on images that were made before."""
        Static(observer=self.observer, bias_correction=False, smooth=0.0).run(job)
