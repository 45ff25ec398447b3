"""GPTQ: weights rounded column by column, each error taken up by the columns that follow."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.autograd import blocks
from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.job import Job
from onnxq.learning.columnwise import BEST, Columnwise, round_layers
from onnxq.learning.smoothing import level


@dataclass(frozen=True)
class Gptq:
    """Second-order rounding from a few hundred samples, without gradients.

    1. Rewrite the graph, level channels, insert Q/DQ, calibrate activations: as the static recipe does.
    2. Weight scales come from the float weights, clipped where that leaves the least error.
    3. Block by block, on what the rounded part of the network makes: H = E[x·xᵀ] of each layer's inputs; weights move
       towards what gives the float network's outputs from them; then algorithm 1 over their columns.
    4. Store weights as codes, lint, check.

    Source: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers, ICLR 2023 (arXiv 2210.17323), algorithm 1 and section 3.3; order by activation and
    static groups are those of the authors' code. Convolutions as in Optimal Brain Compression (arXiv 2208.11580).

    Departures:
        - With activations of 8 bits, channels that stick out far are levelled first, as in the recipe int8: PaddleOCR's
          third reader of text at W4A8 reads 70 % of its lines without, 94 % with it.
        - Scales are clipped for the least error instead of the extremes (``weight_ranges="minmax"`` is the paper's).
        - With one scale for each channel, finer and coarser steps are tried, and the one whose rounding loses least
          stays (``search_steps``).
        - Scales of blocks are static by default; ``static_groups=False`` is the paper's.
        - Where a layer has a bias, it takes back the mean error, and the columns are rounded for the covariance of
          the inputs: the least error over both. ``correct_biases=False`` is the paper's.
        - Weights make up for three quarters of what the layers before have lost, by damped least squares before the
          rounding: on convolutions it is worth more than the rounding itself. ``asymmetry=0`` is the paper's.
        - Inputs that are always zero keep their weights, rounded to the nearest, instead of losing them.
        - Inside a block, the layers are rounded in the order in which they run, on what the rounded ones make.
        - A weight that several layers share is rounded once, for the sum of their Hessians; layers in blocks that
          have not been reached yet are looked at in the float network.
        - Weights that are no matrix, and those of floating-point formats, are rounded to the nearest.

    Attributes:
        damping: Part of the mean of the Hessian's diagonal that is added to it.
        act_order: Whether the columns with the largest inputs are rounded first (with static groups).
        static_groups: Whether the scales of blocks come from the float weights.
        correct_biases: Whether biases take back the mean error.
        asymmetry: Part of the error of the layers before that weights make up for (GPTAQ, arXiv 2504.02692).
        search_steps: Whether other steps of channels are tried, for the least error of outputs instead of weights.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
        observer: How a range follows from the statistics of an activation.
        samples: How many samples Hessians are taken from.
        cache_mib: Memory for activations between two blocks; what is more goes to files.
    """

    damping: float = 0.01
    act_order: bool = BEST.act_order
    static_groups: bool = True
    correct_biases: bool = True
    asymmetry: float = BEST.asymmetry
    search_steps: bool = True
    weight_ranges: str = "mse"
    observer: str = "robust"
    samples: int = 128
    cache_mib: int = 1024

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observer, search = observers.get(self.observer), weight_ranges.get(self.weight_ranges)
        job.prepare()
        level(job)
        units = blocks.cut(job.model.graph)
        insert_calibrated(job, observer, search)
        round_layers(
            job,
            units,
            Columnwise(
                self.damping,
                self.act_order,
                self.static_groups,
                self.correct_biases,
                self.asymmetry,
                BEST.steps if self.search_steps else (),
            ),
            samples=min(self.samples, len(job.source), job.settings.samples or self.samples),
            cache_mib=self.cache_mib,
            search=search,
        )
        job.lower()
