"""Joint reconstruction of a denoiser's temporal region, on all the inputs that it will ever see."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.calibration.data import Array, fixed_batch
from onnxq.diffusion.denoiser import Denoiser
from onnxq.diffusion.temporal_region import TemporalRegion
from onnxq.job import Job
from onnxq.learning import quantizers as found_quantizers
from onnxq.learning.quantizers import Grid, Quantizer, as_float, read
from onnxq.learning.reconstruct import Reconstruction, descend, output_error
from onnxq.learning.rounding import LearnedRounding
from onnxq.learning.walk import inside

MOST_ROWS = 8192  # of timesteps with labels; more labels than fit are left out


class TemporalInputs:
    """Every timestep of the sampler, with every label where labels belong to the region.

    Args:
        denoiser: The roles of the inputs.
        region: Which of them matter.
        timesteps: Of the sampler's steps.

    Attributes:
        steps: The step of each row [rows].
        labels: By input: the label of each row [rows].
    """

    def __init__(self, denoiser: Denoiser, region: TemporalRegion, timesteps: Sequence[float]) -> None:
        self.denoiser, self.timesteps = denoiser, list(timesteps)
        labelled = [item for item in denoiser.conditions if item.spec.name in region.inputs]
        most = max(1, MOST_ROWS // len(timesteps)) ** (1 / max(1, len(labelled)))
        choices = [range(min(item.classes or 1, math.floor(most))) for item in labelled]
        rows = list(itertools.product(range(len(timesteps)), *choices))
        columns = np.asarray(rows, np.int64).T
        self.steps: Array = columns[0]
        self.labels = {item.spec.name: column for item, column in zip(labelled, columns[1:], strict=True)}

    def __len__(self) -> int:
        return len(self.steps)

    def feed(self, rows: Array) -> dict[str, Tensor]:
        """Some rows as inputs of the network; a timestep of rank 0 takes rows of one step only."""
        denoiser = self.denoiser
        fixed = fixed_batch(denoiser.specs) or 1
        rows = np.resize(rows, -(-len(rows) // fixed) * fixed)
        times = [denoiser.timesteps(self.timesteps[step], 1) for step in self.steps[rows]]
        given: dict[str, Array] = {name: column[rows] for name, column in self.labels.items()}
        given[denoiser.timestep.name] = np.concatenate(times) if denoiser.timestep.shape else times[0]
        tensors = {spec.name: torch.from_numpy(given[spec.name]) for spec in denoiser.specs if spec.name in given}
        for spec in denoiser.specs:
            if spec.name not in tensors:  # only its shape can matter
                zero = torch.from_numpy(np.zeros((), spec.dtype))
                sizes = [size or 1 for size in spec.row_shape]
                tensors[spec.name] = zero.expand(sizes if spec.is_whole else (len(rows), *sizes))
        return tensors

    def groups(self, rows: Array) -> list[Array]:
        """The rows as they can run at once."""
        if self.denoiser.timestep.shape:
            return [rows]
        return [rows[self.steps[rows] == step] for step in np.unique(self.steps[rows])]


def features(
    graph: TorchGraph, names: Sequence[str], inputs: TemporalInputs, replaced: Mapping[str, Replacement], rows: Array
) -> list[dict[str, Tensor]]:
    """Values of the region for each group of rows that runs at once."""
    found = []
    for group in inputs.groups(rows):
        found.append(graph.run(inputs.feed(group), names, replaced=replaced))
    return found


def quantizers_of(graph: TorchGraph, region: TemporalRegion, quantizers: Sequence[Quantizer]) -> list[Quantizer]:
    """Those that the region's features are computed with."""
    names: set[str] = set()
    for feature in region.features:
        names |= inside(graph, Block("", region.inputs, feature, ()))
    return [item for item in quantizers if item.output in names]


def reconstruct_temporal(
    job: Job, region: TemporalRegion, inputs: TemporalInputs, options: Reconstruction
) -> list[str]:
    """Learn the rounding of all weights of the region together, so that every temporal feature is the float one.

    The data are the sampler's timesteps, not samples: nothing can overfit, and nothing that depends on a sample moves
    these weights.

    Source: TFMQ-DM (arXiv 2311.16503), equation 8: temporal information aware reconstruction. The loss is the sum over
    the features of the squared error, summed over channels and averaged over timesteps.

    Args:
        job: After ``insert`` and with all scales set.
        region: Of the float graph, before ``insert``.
        inputs: Timesteps and labels.
        options: Iterations (0 leaves the weights as they are), batch, rate and penalty; activations stay float.

    Returns:
        Names of the weights and scales that are settled now; the weights lie on their grid.
    """
    graph = TorchGraph(job.model, job.settings.device)
    quantizers = found_quantizers.find(job.model.graph)
    own = quantizers_of(graph, region, quantizers)
    settled = [item.source for item in own if item.is_weight] + [item.scale for item in own]
    roundings = [LearnedRounding(Grid(graph, item)) for item in own if item.is_weight and item.float_type is None]
    if not roundings or not options.iterations:
        return settled
    exact = as_float(quantizers)
    soft = exact | {item.grid.quantizer.output: Replacement((), item.weight) for item in roundings}
    choice = np.random.default_rng(zlib.crc32(b"temporal") ^ job.settings.seed)

    def errors() -> Iterator[Tensor]:
        rows = np.sort(choice.choice(len(inputs), min(options.batch, len(inputs)), replace=False))
        with torch.no_grad():
            wanted = features(graph, region.features, inputs, exact, rows)
        found = features(graph, region.features, inputs, soft, rows)
        parts = [
            torch.stack([output_error(value, target[name]) for name, value in group.items()]).sum()
            for group, target in zip(found, wanted, strict=True)
        ]
        yield torch.stack(parts).mean()

    with job.progress.stage("temporal", "Reconstructing temporal features"):
        descend(errors, roundings, [], options)
        found_quantizers.store(graph, {item.grid.quantizer.source: item.decided()[0] for item in roundings})
    return settled


def finite_set_scales(job: Job, region: TemporalRegion, inputs: TemporalInputs) -> dict[str, Array]:
    """A scale for each step of the sampler for every activation of the region: the widest range in that step.

    The set of inputs is finite and known, so that the ranges are not estimated, and nothing is ever clipped.

    Source: TFMQ-DM (arXiv 2311.16503), section 4.3: finite set calibration.

    Args:
        job: After the region's weights are settled.
        region: Of the float graph, before ``insert``.
        inputs: Timesteps and labels.

    Returns:
        Scales [steps] by the name of the scale that they replace; zero points stay.
    """
    graph = TorchGraph(job.model, job.settings.device)
    quantizers = found_quantizers.find(job.model.graph)
    own = [
        item for item in quantizers_of(graph, region, quantizers) if not (item.is_weight or item.float_type is not None)
    ]
    names, exact = sorted({item.source for item in own}), as_float(quantizers)
    tables = {item.scale: np.zeros(len(inputs.timesteps)) for item in own if item.axis is None}
    for step in range(len(inputs.timesteps)) if names else ():
        with torch.no_grad():
            (values,) = features(graph, names, inputs, exact, np.flatnonzero(inputs.steps == step))
        for item in own:
            if item.scale not in tables:
                continue
            middle = float(read(graph, item.zero_point))
            value, ends = values[item.source], (item.low - middle, item.high - middle)
            needed = [float(bound) / end for bound, end in zip(value.aminmax(), ends, strict=True) if end]
            tables[item.scale][step] = max(tables[item.scale][step], *needed)
    current = {name: float(read(graph, name)) for name in tables}
    return {name: np.where(table > 0, table, current[name]) for name, table in tables.items()}
