"""PTQ4DM: calibrate a denoiser on its own trajectories, at timesteps drawn from a skewed normal distribution."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.diffusion.step_floor import hold_floor
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.targets import scheme_of_ends
from onnxq.targets.placement import first_and_last


@dataclass(frozen=True)
class Ptq4dm:
    """Static scales from the network's inputs along its sampler; nearest rounding.

    1. Run the sampler; of each trajectory keep the input at one timestep, drawn from N(0.4 T, (0.4 T)²).
    2. Activation ranges and weight ranges: the clip with the least |rounded - value| ** 2.4.
    3. Biases take back the mean shift that rounding the weights causes.
    4. First and last layers have 8 bits.

    Source: Y. Shang, Z. Yuan, B. Xie, B. Wu, Y. Yan, Post-training Quantization on Diffusion Models, CVPR 2023
    (arXiv 2211.15736), section 3 and algorithm 1.

    Departures:
        - The authors' code feeds the input of one timestep with the embedding of its mirror image; here each input
          keeps its own. The deviation is that of the code (0.4 T); the text has sqrt(T/2).
        - ``trajectories`` is 64 with 8 steps of each instead of 1,024 with one: a trajectory runs the network in
          every step, whatever is kept of it.
        - Quantizers stand at the inputs of Conv, Gemm and MatMul, where the targets' kernels read codes, instead of
          at their outputs; products of attention are quantized too where the target has kernels for them.
        - Step 3, without which the shift adds up from step to step of the sampler (``bias_correction=False`` is the
          paper's): on the guided Fashion UNet at W4A8 the squared error of the images falls from 0.20 to 0.030.
        - One search over the histogram of all samples instead of a moving average over batches.

    Attributes:
        selection: Which steps are kept where no data is given: ``ndtc``, ``uniform`` or ``all``. Re-runs by others
            have found ``uniform`` no worse.
        trajectories: How many samples the sampler makes.
        kept_steps: Steps kept of each.
        observer: How a range follows from the statistics of an activation.
        bias_correction: Whether biases are corrected (M. Nagel et al., ICCV 2019, arXiv 1906.04721).
    """

    selection: str = choice("ndtc", "uniform", "all")
    trajectories: int = 64
    kept_steps: int = 8
    observer: str = "power"
    bias_correction: bool = True

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observe, search = observers.get(self.observer), weight_ranges.get("mse")
        job.prepare()
        if job.settings.first_last is None and 0 < job.scheme.weights.format.bits < 8:
            ends = scheme_of_ends(job.target, job.scheme, "int8")
            job.exceptions |= {name: ends for name in first_and_last(job.model.graph)}
        hold_floor(job, observe, search, 0.0)
        insert_calibrated(job, observe, search, corrects_biases=self.bias_correction)
        job.lower()
