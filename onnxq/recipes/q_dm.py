"""Q-DM: a low-bit denoiser trained to predict what the float one does, on activations brought to one range."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.diffusion import time_scales
from onnxq.diffusion.selection import POLICIES
from onnxq.diffusion.source import sampler_of
from onnxq.diffusion.token_deviation import token_deviations
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.distillation import distil_network
from onnxq.learning.finetune import FineTuning
from onnxq.passes.normalise_attention import NormaliseAttention, operands
from onnxq.passes.time_conditioned_scales import TimeConditionedScales
from onnxq.runtime import Session
from onnxq.targets import scheme_of_ends
from onnxq.targets.placement import first_and_last

STEPS = {"quick": 100, "default": 500, "paper": 20000}


@dataclass(frozen=True)
class QDm:
    """Quantization-aware training of a denoiser, without its training data.

    1. Calibrate; weight steps by the least error; first and last layers have 8 bits; biases take back the mean shift
       that rounding the weights causes.
    2. Timestep-aware quantization (TaQ): activations are divided by what they reach at the step before they are
       rounded, and the product is multiplied by it behind, so that one learned step suits all of the sampler.
    3. Noise-estimating mimicking (NeM): train weights behind straight-through rounding, biases and all steps on
       E ‖ε_float(x_t, t) − ε_quantized(x_t, t)‖², over all steps of the sampler.
    4. Store weights as codes, lint, check.

    Source: Y. Li, S. Xu, X. Cao, X. Sun, B. Zhang, Q-DM: An Efficient Low-bit Quantized Diffusion Model, NeurIPS 36
    (2023), pp. 76680–76691.
    There is no code by the authors, and only its abstract and what others write of it were at hand. From these are the
    problem, the two ingredients and what they are for; **inferred** are the formula of TaQ and where it stands, all
    numbers, and that the loss of NeM has no term of the noise itself.

    Departures:
        - By default TaQ divides every activation that products read by a table over the steps, and multiplies back: the
          float network's function is kept. Others describe the paper's as a normalisation of attention's queries and
          keys by their own mean and deviation, with which the network is trained: that is ``taq=norm``, another
          function. Statistics are then over the channels of each token, and gains for each channel train with it.
        - Inputs are those of the sampler's own trajectories (or recorded ones, as ``--data``), not noised images; they
          are what the network will see. They are few, so training is short, and weights are not averaged.
        - Biases start corrected (M. Nagel et al., ICCV 2019, arXiv 1906.04721): short training does not find that by
          itself, and a mean shift adds up from step to step of the sampler.
        - Steps are learned as logarithms (recipe ``lsq``), and start at the least error.

    Attributes:
        taq: ``table``; ``norm``: queries and keys of attention are normalised instead; ``none``.
        groups: How many groups of steps the table has; 0: every step its own.
        steps: Steps of the optimiser; 0: what ``--budget`` says.
        batch: Samples in a step.
        weight_rate: Adam's rate of weights and biases. Three times as fast, weights of a trained UNet had not settled
            after 100 steps, and the images were 26 times as far off (guided Fashion UNet, W4A8).
        step_rate: Adam's rate of steps.
        selection: Which steps are kept where no data is given.
        trajectories: How many samples the sampler makes.
        kept_steps: Steps kept of each.
        observer: How the first range follows from the statistics of an activation.
        samples: How many inputs to learn from, at most.
        cache_mib: Memory for inputs and what the float network makes of them; what is more goes to files.
        bias_correction: Whether biases start where they take back the mean shift that rounding the weights causes.
    """

    taq: str = choice("table", "norm", "none")
    groups: int = 8
    steps: int = 0
    batch: int = 16
    weight_rate: float = 1e-4
    step_rate: float = 1e-3
    selection: str = choice(*POLICIES)
    trajectories: int = 64
    kept_steps: int = 8
    observer: str = "mse"
    samples: int = 2048
    cache_mib: int = 1024
    bias_correction: bool = True

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observe, search = observers.get(self.observer), weight_ranges.get("mse")
        sampler = sampler_of(job)
        denoiser, times = sampler.denoiser, sampler.schedule.timesteps
        job.prepare()
        if job.settings.first_last is None and 0 < job.scheme.weights.format.bits < 8:
            ends = scheme_of_ends(job.target, job.scheme, "int8")
            job.exceptions |= {name: ends for name in first_and_last(job.model.graph)}
        statistics = time_scales.record(job) if self.taq == "table" else {}
        # Factors will put biases elsewhere: the graph gets the corrected ones, and its teacher is another.
        is_changed = self.taq == "norm" or self.bias_correction
        teacher = Session(job.model, device=job.settings.device) if is_changed else None
        if self.taq == "norm":
            self.normalise(job)
        insert_calibrated(job, observe, search, corrects_biases=self.bias_correction)
        if statistics:
            groups = min(self.groups or len(times), len(times))
            found = time_scales.scales_by_step(job, statistics, sampler, observe, groups=groups)
            TimeConditionedScales(denoiser.timestep.name, times, found.tables, "rescale")(job.model)
        options = FineTuning(
            self.steps or STEPS[job.settings.budget],
            self.batch,
            weight_rate=self.weight_rate,
            step_rate=self.step_rate,
        )
        samples = min(self.samples, len(job.source), job.settings.samples or self.samples)
        distil_network(
            job,
            {denoiser.output: "mse"},
            options,
            temperature=1.0,
            samples=samples,
            cache_mib=self.cache_mib,
            teacher=teacher,
        )
        job.lower()

    @staticmethod
    def normalise(job: Job) -> None:
        """TaQ as others describe it."""
        found = operands(job.model.graph)
        if not found:
            raise OnnxqError(
                "expected attention (a Softmax of q · kᵀ, times v) for taq=norm, found none",
                hint="use --set taq=table",
            )
        NormaliseAttention(token_deviations(job, found))(job.model)
