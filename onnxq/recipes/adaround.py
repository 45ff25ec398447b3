"""AdaRound: every weight learns whether it is rounded up or down, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.reconstruction_knobs import RoundingKnobs


@dataclass(frozen=True, kw_only=True)
class AdaRound(RoundingKnobs):
    """Learned rounding of single layers, from unlabelled samples.

    1. Rewrite the graph, insert Q/DQ, calibrate activations; weight steps by the least error.
    2. Layer by layer, on what the rounded part of the network makes: learn h(V) so that the layer's output is the
       float network's; a penalty then drives every h to 0 or 1.
    3. Store weights as codes, lint, check.

    Source: M. Nagel, R. A. Amjad, M. van Baalen, C. Louizos, T. Blankevoort, Up or Down? Adaptive Rounding for
    Post-Training Quantization, ICML 2020 (arXiv 2004.10568), equations 21 to 25.

    Departures:
        - With activations of 8 bits, channels that stick out far are levelled first, as in the recipe int8.
        - The paper takes 10,000 steps a layer. ``--budget default`` takes 1,000 and ``quick`` 200, with Adam's rate
          raised by the root of the ratio; ``paper`` takes 20,000, as BRECQ and QDrop do.
        - The error is measured after the nonlinearity that follows the layer, whichever it is.
    """

    start: str = choice("nearest", "gptq")
    bias_rate: float = 0.0

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        self.quantize(job, self.rounding(job), "layer")
