"""What recipes that learn roundings have in common: the knobs, and the way from the float graph to the lowered one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from onnxq.autograd.blocks import cut
from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.reconstruct import Reconstruction, reconstruct
from onnxq.learning.smoothing import level

# Steps for each block. The papers' need a GPU or a night; a tenth of them comes close.
ITERATIONS = {"quick": 200, "default": 1000, "paper": 20000}


@dataclass(frozen=True, kw_only=True)
class RoundingKnobs:
    """What every recipe that learns roundings can be told.

    Attributes:
        iterations: Steps of Adam for each block; 0: what ``--budget`` says.
        batch: Samples in a step.
        regularisation: Weight of the penalty on undecided roundings.
        observer: How the first range follows from the statistics of an activation.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
        correct_biases: Whether biases take back the mean error that a block is left with: for networks that run many
            times over, as denoisers do, and where blocks learn on the float network's inputs in part (``mix``); what
            learns on the quantized part's alone gains little.
        start: ``gptq``: every weight chooses between the code that GPTQ gives it and that code's neighbour;
            ``nearest``: between the two codes around it.
        bias_rate: Adam's rate for biases; 0 keeps them.
        window: Height and width of the part of larger maps that a step sees, somewhere at random; 0: whole maps. Blocks
            with more than convolutions and pools in them always see whole maps.
        samples: How many samples to learn from, at most.
        cache_mib: Memory for activations between two blocks; what is more goes to files.
    """

    iterations: int = 0
    batch: int = 32
    regularisation: float = 0.01
    observer: str = "mse"
    weight_ranges: str = "mse"
    correct_biases: bool = False
    start: str = choice("gptq", "nearest")
    bias_rate: float = 1e-3
    window: int = 0
    samples: int = 1024
    cache_mib: int = 1024

    def iterations_in(self, job: Job) -> int:
        """Steps for each block: the knob, or what the job's budget says where it is 0."""
        return self.iterations or ITERATIONS[job.settings.budget]

    def samples_in(self, job: Job) -> int:
        """How many of the job's samples are learned from."""
        return min(self.samples, job.settings.samples or len(job.source), len(job.source))

    def rounding(self, job: Job, **more: Any) -> Reconstruction:
        """How the roundings of a block are learned; ``more`` are fields of :class:`Reconstruction`."""
        iterations = self.iterations_in(job)
        return Reconstruction(
            iterations,
            self.batch,
            rounding_rate(iterations),
            regularisation=self.regularisation,
            correct_biases=self.correct_biases,
            start=self.start,
            bias_rate=self.bias_rate,
            window=self.window,
            **more,
        )

    def quantize(
        self, job: Job, options: Reconstruction, granularity: str, afterwards: Reconstruction | None = None
    ) -> None:
        """From the float graph to the lowered one.

        Args:
            job: The job.
            options: How every layer or block is reconstructed in turn.
            granularity: ``layer`` or ``block``.
            afterwards: How it is once more, when all are done.
        """
        observe, search = observers.get(self.observer), weight_ranges.get(self.weight_ranges)
        job.prepare()
        level(job)
        blocks = cut(job.model.graph, granularity)
        insert_calibrated(job, observe, search)
        samples, cache_mib = self.samples_in(job), self.cache_mib
        reconstruct(job, blocks, options, samples=samples, cache_mib=cache_mib)
        if afterwards is not None:
            reconstruct(job, blocks, afterwards, samples=samples, cache_mib=cache_mib, checkpoint="afterwards")
        job.lower()


@dataclass(frozen=True, kw_only=True)
class BlockKnobs(RoundingKnobs):
    """What those that learn the steps of activations too can be told besides.

    Attributes:
        activation_step_rate: Adam's rate for the logarithm of activation steps; 0 keeps them.
    """

    activation_step_rate: float = 1e-3

    def steps(self, job: Job, **more: Any) -> Reconstruction:
        """How the steps of activations are learned once weights are settled; ``more`` are further fields."""
        return Reconstruction(
            max(1, self.iterations_in(job) // 4),
            self.batch,
            activation_step_rate=self.activation_step_rate,
            quantize_activations=True,
            learn_weights=False,
            power=2.4,
            **more,
        )


def rounding_rate(iterations: int) -> float:
    """Adam's rate for rounding variables: 1e-3 at the papers' 20,000 steps, more where there are fewer."""
    return 1e-3 * math.sqrt(ITERATIONS["paper"] / iterations)
