"""Norm tweaking: scales and shifts of norms take back what rounding the weights does to a block's output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxq.autograd import blocks
from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import TorchGraph
from onnxq.calibration import calibrate, weight_ranges
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning import quantizers as found_quantizers
from onnxq.learning.cache import ActivationCache
from onnxq.learning.columnwise import Columnwise, round_layers
from onnxq.learning.hessian import Hessian
from onnxq.learning.norms import channel_distance, closed_form_scale, norm_parameters
from onnxq.learning.own_initializers import readers_of, separate_weights
from onnxq.learning.quantizers import Grid, as_float, read
from onnxq.learning.walk import QUANTIZED, Walk, inside


@dataclass(frozen=True)
class NormTweaking:
    """Weight-only quantization of language models whose norms are adjusted block by block.

    1. Without ``--data``, the model writes its calibration text itself.
    2. Rewrite the graph, insert Q/DQ on weights, round them (nearest, or GPTQ).
    3. Block by block, on what the quantized part of the network makes: the float block's output is the target; one
       pass of Adam over the norms' scales and shifts on the distance of means and variances per channel. Its rate
       grows with depth.
    4. A block's change is kept if it lowers the distance on samples that it has not learned from.
    5. Store weights as codes, lint, check.

    Source: L. Li, Q. Li, B. Zhang, X. Chu, Norm Tweaking: High-performance Low-bit Quantization of Large Language
    Models, AAAI 2024 (arXiv 2309.02784), algorithm 1. The closed form minimises the error at the outputs of the
    layers behind each norm instead; it is not the paper's.

    Departures:
        - Changes are accepted or rejected on held-out samples; the paper keeps all.
        - A transformer layer is two blocks, attention and feed-forward; the norm before the head has one of its own.
        - The paper restricts first tokens to the model's main languages; here any token may come first.
        - Activations stay float.

    Attributes:
        base: ``nearest`` or ``gptq``: how weights are rounded.
        method: ``gradient`` or ``closed_form``.
        rate: Of Adam in the first block.
        depth_factor: The last block's rate is 1 + this times the first's.
        passes: Over the samples; more than one fits them too well.
        batch: Sequences in a step.
        held_out: The part of the samples that decides.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
        samples: How many samples to use, at most.
        cache_mib: Memory for activations; what is more goes to files.
    """

    base: str = choice("nearest", "gptq")
    method: str = choice("gradient", "closed_form")
    rate: float = 1e-3
    depth_factor: float = 1.0
    passes: int = 1
    batch: int = 4
    held_out: float = 0.25
    weight_ranges: str = "mse"
    samples: int = 128
    cache_mib: int = 1024

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        if job.scheme.activations.enabled:
            raise OnnxqError(
                f"expected float activations for norm-tweaking, found {job.scheme.activations}",
                hint="leave --activations out, or use the recipe zeroquant",
            )
        search = weight_ranges.get(self.weight_ranges)
        job.prepare()
        units = blocks.cut(job.model.graph)
        job.insert()
        job.record()
        separate_weights(job.model.graph)
        calibrate.set_weight_scales(job.model, search)
        _Tweak(job, units, self).run()
        job.lower()


class _Tweak:
    """The Q/DQ graph with rounded weights in place and the float ones beside it."""

    def __init__(self, job: Job, units: list[Block], knobs: NormTweaking) -> None:
        self.job, self.units, self.knobs = job, units, knobs
        self.samples = min(knobs.samples, len(job.source), job.settings.samples or knobs.samples)
        self.quantizers = [item for item in found_quantizers.find(job.model.graph) if item.is_weight]
        self.readers = readers_of(job.model.graph, self.quantizers)
        self.norms = norm_parameters(job.model.graph)
        graph = TorchGraph(job.model, job.settings.device)
        self.exact = {item.source: read(graph, item.source).clone() for item in self.quantizers}
        if knobs.base == "gptq":
            options = Columnwise(act_order=True, correct_biases=False)
            round_layers(job, units, options, samples=self.samples, cache_mib=knobs.cache_mib)
            graph = TorchGraph(job.model, job.settings.device)
        else:
            grids = {item.source: Grid(graph, item) for item in self.quantizers}
            found_quantizers.store(graph, {name: grid.nearest() for name, grid in grids.items()})
        self.graph = graph
        self.direct = as_float(self.quantizers)  # weights lie on their grid: they are what the codes will mean

    def run(self) -> None:
        with (
            ActivationCache(self.knobs.cache_mib << 20, device=self.graph.device) as cache,
            self.job.progress.stage("learn", "Tweaking norms", len(self.units)) as advance,
        ):
            walk = Walk(self.graph, self.quantizers, self.units, cache)
            walk.fill(self.job.source, self.job.specs, self.samples)
            split = max(1, round(walk.samples * (1 - self.knobs.held_out)))
            learning, deciding = np.arange(split), np.arange(split, walk.samples)
            settled: set[str] = set()
            for position, block in enumerate(self.units):
                names = inside(self.graph, block)
                norms = sorted(set(self.norms) & names - settled)
                if norms and any(item.output in names for item in self.quantizers):
                    rate = self.knobs.rate * (1 + self.knobs.depth_factor * position / max(1, len(self.units) - 1))
                    found = self._learn(walk, block, norms, learning, rate)
                    index = deciding if len(deciding) else learning
                    if self._distance(walk, block, found, index) < self._distance(walk, block, {}, index):
                        found_quantizers.store(self.graph, found)
                    settled.update(norms)
                walk.advance(block)
                advance(position + 1)

    def _learn(self, walk: Walk, block: Block, norms: list[str], index: np.ndarray, rate: float) -> dict[str, Tensor]:
        if self.knobs.method == "closed_form":
            return self._solve(walk, block, norms, index)
        masters = {name: read(self.graph, name).clone().requires_grad_(True) for name in norms}
        optimizer = torch.optim.Adam(list(masters.values()), lr=rate)
        for _ in range(self.knobs.passes):
            for start in range(0, len(index), self.knobs.batch):
                inputs = walk.inputs(block, index[start : start + self.knobs.batch], QUANTIZED)
                with torch.no_grad():
                    wanted = self._output(inputs, block, self.exact)
                optimizer.zero_grad()
                loss = channel_distance(wanted, self._output(inputs, block, masters))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return {name: tensor.detach() for name, tensor in masters.items()}

    def _solve(self, walk: Walk, block: Block, norms: list[str], index: np.ndarray) -> dict[str, Tensor]:
        """Each norm's factor in closed form; its scale and its shift take it alike."""
        found: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        for name in norms:
            output = self.norms[name]
            value = output.name or ""
            pairs = [(item, layer) for item in self.quantizers for layer in self.readers.get(item.output, ())]
            reading = [(item, layer) for item, layer in pairs if layer.activation == value]
            if not reading or len(output.uses()) != len(reading):
                continue  # something else reads the norm: its factor would not stay inside
            if value not in factors:
                hessian = Hessian()
                with torch.no_grad():
                    for start in range(0, len(index), self.knobs.batch):
                        inputs = walk.inputs(block, index[start : start + self.knobs.batch], QUANTIZED)
                        hessian.update(reading[0][1], self.graph.run(inputs, [value], replaced=self.direct)[value])
                exact = [layer.matrix(self.exact[item.source])[0] for item, layer in reading]
                rounded = [layer.matrix(read(self.graph, item.source))[0] for item, layer in reading]
                factors[value] = closed_form_scale(hessian.value[0], exact, rounded)
            parameter = read(self.graph, name)
            found[name] = (parameter * factors[value].to(parameter.dtype)).detach()
        return found

    def _output(self, inputs: dict[str, Tensor], block: Block, changed: dict[str, Tensor]) -> Tensor:
        return self.graph.run({**inputs, **changed}, [block.output], replaced=self.direct)[block.output]

    def _distance(self, walk: Walk, block: Block, changed: dict[str, Tensor], index: np.ndarray) -> float:
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(index), self.knobs.batch):
                inputs = walk.inputs(block, index[start : start + self.knobs.batch], QUANTIZED)
                wanted = self._output(inputs, block, self.exact)
                total += float(channel_distance(wanted, self._output(inputs, block, changed)))
        return total
