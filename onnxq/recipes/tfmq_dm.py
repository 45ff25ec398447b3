"""TFMQ-DM: what depends on the timestep alone is reconstructed, or tabulated, apart from everything else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from onnxq.autograd.blocks import cut
from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.diffusion.source import sampler_of
from onnxq.diffusion.temporal_error import temporal_error
from onnxq.diffusion.temporal_region import find_region
from onnxq.diffusion.temporal_tables import tabulate
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.reconstruct import reconstruct
from onnxq.learning.reconstruction_knobs import BlockKnobs, rounding_rate
from onnxq.learning.temporal import TemporalInputs, finite_set_scales, reconstruct_temporal
from onnxq.passes.cache_temporal_features import CacheTemporalFeatures
from onnxq.passes.time_conditioned_scales import TimeConditionedScales


@dataclass(frozen=True, kw_only=True)
class TfmqDm(BlockKnobs):
    """Temporal features kept as they are.

    1. Find the temporal region: what the timestep (with class labels) reaches and the sample does not.
    2. Calibrate; weight steps by the least error.
    3. Learn the rounding of all weights of the region together, on the timesteps of the sampler.
    4. Block by block, learn the rounding of the rest; the region's weights stay, its features are inputs.
    5. Activations of the region get a scale for each step of the sampler, from the range that they have there.

    With ``maintenance=cache`` (the journal's) the features become tables before anything else, and nothing of the
    region is left to quantize. Timesteps that the sampler does not visit then get the nearest row. How well the
    features are kept over all steps is in the result, under ``temporal_features``.

    Source: Y. Huang, R. Gong, J. Liu, T. Chen, X. Liu, TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion
    Models, CVPR 2024 (arXiv 2311.16503), section 4; the cache: Temporal Feature Matters, TPAMI 2025 (arXiv 2407.19547).

    Departures:
        - The region is found by reachability and includes class labels that are added to the embedding; the authors
          name its modules. Its first layer is quantized too; theirs stays float.
        - A scale that changes with the step is a factor before a constant scale, taken back behind the product: the
          same codes, and a graph that compilers take. Labels of a step share its scale.
        - All steps of the sampler are learned from, the authors' code takes every fifth to twenty-fifth.
        - The journal's cache holds float32; it chooses by the error between computing and looking up, which is then
          always the table. ``smaller`` chooses by the bytes of the file instead.
        - The rest is as in the recipe ``brecq``: steps of activations are learned with the rounding
          (``activation_step_rate=0`` is the paper's), weights are symmetric, shortcuts and attention are quantized.
        - Biases take back the mean error that is left (``correct_biases``): the paper leaves them.
        - ``start=gptq`` is not the paper's, and for blocks alone, not for the region. The small network of its test
          gains 7 dB (W4A8, 20 steps for each block).
        - 256 inputs instead of 5,120, and iterations as ``--budget`` says (``paper``: 20,000).

    Attributes:
        maintenance: ``reconstruct``; ``cache``: all tables; ``smaller``: tables where they are smaller than the weights
            they save, the rest reconstructed; ``frozen``: the region is rounded to nearest and left alone.
        labels: Whether features may depend on class labels too.
        finite_set: Whether activations of the region have a scale for each step of the sampler.
        temporal_iterations: Steps for the region, which cost little; 0: three times as many as for a block.
    """

    maintenance: str = choice("reconstruct", "cache", "smaller", "frozen")
    labels: bool = True
    finite_set: bool = True
    temporal_iterations: int = 0
    correct_biases: bool = True
    start: str = choice("nearest", "gptq")
    bias_rate: float = 0.0

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        observe, search = observers.get(self.observer), weight_ranges.get(self.weight_ranges)
        sampler = sampler_of(job)
        denoiser, timesteps = sampler.denoiser, sampler.schedule.timesteps
        job.prepare()
        labels = [item.spec.name for item in denoiser.conditions if item.classes is not None and self.labels]
        inputs = (denoiser.timestep.name, *labels)
        region = find_region(job.model.graph, inputs)
        exact = tabulate(job.model, region.features, inputs, denoiser, timesteps)
        if self.maintenance in ("cache", "smaller"):
            CacheTemporalFeatures(
                denoiser,
                timesteps,
                labels=self.labels,
                everything=self.maintenance == "cache",
                bytes_per_weight=job.scheme.weights.format.storage.bitwidth / 8 if job.scheme.weights.enabled else 4,
            )(job.model)
            region = find_region(job.model.graph, inputs)
        blocks = cut(job.model.graph, apart=[value for value in region.frontier if not value.is_graph_output()])
        insert_calibrated(job, observe, search)
        rounding = self.rounding(job, activation_step_rate=self.activation_step_rate, quantize_activations=True)
        more = 0 if self.maintenance == "frozen" else self.temporal_iterations or 3 * rounding.iterations
        temporal = dataclasses.replace(rounding, iterations=more, rounding_rate=rounding_rate(max(more, 1)))
        temporal_inputs = TemporalInputs(denoiser, region, timesteps)
        settled = reconstruct_temporal(job, region, temporal_inputs, temporal)
        reconstruct(job, blocks, rounding, samples=self.samples_in(job), cache_mib=self.cache_mib, settled=settled)
        if self.finite_set:
            scales = finite_set_scales(job, region, temporal_inputs)
            TimeConditionedScales(denoiser.timestep.name, timesteps, scales, "rescale")(job.model)
        job.lower()
        found = tabulate(job.model, [name for name in exact if name in region.features], inputs, denoiser, timesteps)
        error = temporal_error(exact, found, len(timesteps))
        if error is not None:
            job.measurements["temporal_features"] = dataclasses.asdict(error)
