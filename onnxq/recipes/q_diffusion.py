"""Q-Diffusion: inputs from all steps; rounding, then the steps of activations, learned block by block."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.autograd.blocks import cut
from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.calibration.shortcuts import FORMS, split_shortcuts
from onnxq.diffusion.selection import POLICIES
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.reconstruct import reconstruct
from onnxq.learning.reconstruction_knobs import BlockKnobs


@dataclass(frozen=True, kw_only=True)
class QDiffusion(BlockKnobs):
    """Block reconstruction of a denoiser on inputs from evenly spaced steps.

    1. Run the sampler; keep evenly spaced steps of each trajectory (with guidance, both inputs).
    2. Split the layers that read a Concat (the shortcuts of a UNet) into one for each part, where the parts' ranges
       differ so much that it pays.
    3. Block by block, on what the quantized part of the network makes: learn the rounding of all weights, so that the
       block's output is the float network's.
    4. Block by block, on the float network's inputs, weights kept: learn the steps of activations, with |error| ** 2.4.

    Source: X. Li, Y. Liu, L. Lian, H. Yang, Z. Dong, D. Kang, S. Zhang, K. Keutzer, Q-Diffusion: Quantizing Diffusion
    Models, ICCV 2023 (arXiv 2302.04304), section 3.

    Departures:
        - A shortcut is split where the error of its layer's output falls by ``split_gain_db``; the authors split all
          that read the raw Concat. A layer behind a normalization of the Concat is not split, as in their code.
        - Both halves of a split layer have the penalty on undecided roundings; in their code the first one alone.
        - Weights are symmetric, as TensorRT needs them; the authors' have zero points.
        - Blocks are learned in the order in which they run; the authors' code takes a DDIM's upper half backwards.
        - While rounding is learned, the prefix of a block has quantized activations too.
        - Steps of activations are learned in the logarithm, at a rate of 1e-3 cooled to 0.
        - Samples of all steps are mixed; the authors' first batches, which set the scales, hold one step alone.
        - Biases take back the mean error that is left (``correct_biases``): the paper leaves them. Without it steps are
          half a dB better and images end four times as far away (squared; an MNIST UNet, int4 weights).
        - ``start=gptq`` is not the paper's: at W4A8 it gains 1.7 dB in the mean step of an MNIST UNet (rows "learned
          blocks" and "from GPTQ's codes" of ``tests/benchmarks/diffusion_ablation.py``).
        - 256 inputs instead of 5,120, and iterations as ``--budget`` says (``paper``: 20,000 and 5,000).

    Attributes:
        selection: Which steps are kept where no data is given.
        trajectories: How many samples the sampler makes.
        kept_steps: Steps kept of each.
        iterations: Steps of Adam for each block's rounding; 0: what ``--budget`` says. A quarter of it for activations.
        split: ``two_op``: a layer for each part of a shortcut; ``equalize``: one layer, whose parts are multiplied
            into one range by powers of two; ``none``.
        split_gain_db: By how much the error of a layer's output has to fall for that; -100 splits all.
    """

    selection: str = choice(*POLICIES)
    trajectories: int = 16
    kept_steps: int = 16
    split: str = choice(*FORMS)
    split_gain_db: float = 2.0
    correct_biases: bool = True
    start: str = choice("nearest", "gptq")
    bias_rate: float = 0.0

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observe, search = observers.get(self.observer), weight_ranges.get(self.weight_ranges)
        job.prepare()
        split_shortcuts(job, self.split, self.split_gain_db)
        blocks = cut(job.model.graph)
        insert_calibrated(job, observe, search)
        samples = self.samples_in(job)
        reconstruct(job, blocks, self.rounding(job), samples=samples, cache_mib=self.cache_mib, checkpoint="rounding")
        if job.scheme.activations.enabled:
            steps = self.steps(job, mix=1.0, correct_biases=self.correct_biases)
            reconstruct(job, blocks, steps, samples=samples, cache_mib=self.cache_mib, checkpoint="activations")
        job.lower()
