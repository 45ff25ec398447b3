"""Block reconstruction: each block learns to give the float network's output from the quantized network's inputs.

One procedure with parts that are switched on and off covers AdaRound (single layers, activations in float), BRECQ
(blocks), QDrop (blocks whose activations are quantized at random) and GENIE-M (steps of weights learned beside their
rounding).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.job import Job
from onnxq.learning import quantizers as found_quantizers
from onnxq.learning.activations import LearnedStep, random_mask
from onnxq.learning.bias_means import BiasMeans
from onnxq.learning.cache import ActivationCache
from onnxq.learning.checkpoint import Checkpoint, fingerprint
from onnxq.learning.columnwise import BEST, Network
from onnxq.learning.hessian import Layer
from onnxq.learning.own_initializers import own_biases, readers_of, separate_weights
from onnxq.learning.quantizers import Grid, Quantizer, as_float
from onnxq.learning.rounding import LearnedRounding
from onnxq.learning.walk import FLOAT, QUANTIZED, Area, Walk, inside
from onnxq.value_sizes import elements_of

KEPT_FOR_GRADIENTS = 1 << 29  # numbers inside a block; about as many again are kept of how they were rounded


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are reconstructed.

    Attributes:
        iterations: Steps of Adam for each block.
        batch: Samples in a step.
        rounding_rate: Adam's rate for the rounding variables.
        weight_step_rate: Adam's rate for the logarithm of weight steps; 0 keeps them.
        activation_step_rate: Adam's rate for the logarithm of activation steps; 0 keeps them.
        quantize_activations: Whether activations inside the block are quantized while it learns.
        drop: Probability that an activation stays float in a step.
        mix: Probability that an element of the block's inputs comes from the float network.
        regularisation: Weight of the term that drives the rounding to a decision.
        warm_up: Part of the steps before that term sets in.
        sharpness: Its exponent at the start and at the end.
        learn_weights: Whether weights are learned; without, they stay where an earlier phase has left them.
        power: The error's exponent.
        correct_biases: Whether biases take back the mean error that a block is left with.
        start: ``nearest``: every weight chooses between the two codes around it; ``gptq``: between the code that GPTQ
            gives it, on what the blocks before make, and that code's neighbour.
        bias_rate: Adam's rate for biases; 0 keeps them.
        window: Height and width of the part of larger maps that a step sees, somewhere at random; 0: whole maps.
    """

    iterations: int = 1000
    batch: int = 32
    rounding_rate: float = 1e-2
    weight_step_rate: float = 0.0
    activation_step_rate: float = 0.0
    quantize_activations: bool = False
    drop: float = 0.0
    mix: float = 0.0
    regularisation: float = 0.01
    warm_up: float = 0.2
    sharpness: tuple[float, float] = (20.0, 2.0)
    learn_weights: bool = True
    power: float = 2.0
    correct_biases: bool = False
    start: str = "nearest"
    bias_rate: float = 0.0
    window: int = 0

    @property
    def changes_biases(self) -> bool:
        """Whether biases are learned, corrected, or go with the codes of GPTQ."""
        return self.start == "gptq" or self.bias_rate > 0 or self.correct_biases


def reconstruct(
    job: Job,
    blocks: Sequence[Block],
    options: Reconstruction,
    *,
    samples: int,
    cache_mib: int,
    checkpoint: str = "",
    settled: Collection[str] = (),
) -> None:
    """Learn every block of the job's Q/DQ graph in turn; weights end on their grid, scales in their initializers.

    Args:
        job: After ``insert`` and with all scales set.
        blocks: Of the float graph, before ``insert``.
        options: How.
        samples: How many calibration samples to use.
        cache_mib: Memory for activations; beyond it they go to disk.
        checkpoint: Name of this stage within the job's checkpoint.
        settled: Weights and scales that were learned before, and stay.
    """
    if options.start == "gptq":
        separate_weights(job.model.graph)
    quantizers = found_quantizers.find(job.model.graph)
    readers: dict[str, list[Layer]] = {}
    biases: dict[str, str] = {}
    if options.changes_biases:
        readers = readers_of(job.model.graph, quantizers)
        biases = own_biases(job.model.graph, readers)
    means = BiasMeans(job.model.graph, quantizers, readers, biases) if options.correct_biases else None
    graph = TorchGraph(job.model, job.settings.device)
    done = Checkpoint(job.checkpoint, fingerprint(job.model, checkpoint, options, samples, job.settings.seed))
    settled = set(settled)  # a weight or scale that two blocks share is learned in the first
    with (
        ActivationCache(cache_mib << 20, device=job.settings.device) as cache,
        job.progress.stage("learn", "Reconstructing", len(blocks), "blocks") as advance,
    ):
        walk = Walk(graph, quantizers, blocks, cache)
        walk.fill(job.source, job.specs, samples)
        start = Network(graph, walk, quantizers, readers, biases, BEST) if options.start == "gptq" else None
        for position, block in enumerate(blocks):
            names = inside(graph, block)
            inner = [item for item in quantizers if item.output in names]
            weights = [item for item in inner if item.is_weight and item.source not in settled]
            walk.prepare(block)
            finished = done.load(block.name)
            if finished is None:
                learned: dict[str, Tensor] = {}
                if weights or not options.learn_weights:
                    expected = means.expected(graph, walk, block, names) if means is not None else {}
                    rounded = _rounded(start, graph, block, weights) if start is not None else {}
                    own = [biases[item.output] for item in weights if item.output in biases]
                    state = _Block(job, graph, walk, block, inner, weights, settled, options, rounded, own)
                    learned = state.learn()
                    found_quantizers.store(graph, learned)
                    if means is not None:
                        learned |= means.correct(graph, walk, block, expected)
                finished = {name: tensor.cpu().numpy() for name, tensor in learned.items()}
                done.save(block.name, finished)
            found_quantizers.store(graph, finished)
            settled.update(item.source for item in weights)
            settled.update(item.scale for item in inner)
            walk.advance(block)
            advance(position + 1)


def _rounded(start: Network, graph: TorchGraph, block: Block, weights: Sequence[Quantizer]) -> dict[str, Tensor]:
    """What GPTQ makes of a block; ``graph`` keeps the float weights, and gets the biases and scales that go with it."""
    with torch.no_grad():
        rounded, before = start.round_block(block, weights)
    found_quantizers.store(graph, {item.source: before[item.source] for item in weights if item.source in before})
    return rounded


class _Block:
    """One block while it learns."""

    def __init__(
        self,
        job: Job,
        graph: TorchGraph,
        walk: Walk,
        block: Block,
        own: Sequence[Quantizer],
        weights: Sequence[Quantizer],
        settled: set[str],
        options: Reconstruction,
        rounded: Mapping[str, Tensor],
        biases: Sequence[str],
    ) -> None:
        self.graph, self.walk, self.block, self.options = graph, walk, block, options
        self.windows = walk.windows(block, inside(graph, block), options.window)
        self.rows = options.batch if self.windows is not None else _rows_with_gradients(graph, block, options.batch)
        seed = zlib.crc32(block.name.encode()) ^ job.settings.seed
        self.generator = torch.Generator(graph.device).manual_seed(seed)
        self.choice = np.random.default_rng(seed)
        integers = [item for item in weights if item.float_type is None and options.learn_weights]
        self.roundings = [
            LearnedRounding(Grid(graph, item), options.weight_step_rate > 0, rounded.get(item.source))
            for item in integers
        ]
        self.biases = {
            name: found_quantizers.read(graph, name).clone().requires_grad_(options.bias_rate > 0) for name in biases
        }
        weight_sources = {item.grid.quantizer.output: Replacement((), item.weight) for item in self.roundings}
        others = [item for item in own if item.is_weight and item.output not in weight_sources]
        activations = [item for item in own if not item.is_weight]
        self.steps: list[LearnedStep] = []
        self.replaced: dict[str, Replacement] = weight_sources | as_float(others)
        if not options.quantize_activations:
            self.replaced |= as_float(activations)
        else:
            by_scale: dict[str, LearnedStep] = {}
            for item in activations:
                if item.float_type is not None:
                    continue
                step = LearnedStep(graph, item, options.drop, self.generator)
                if item.scale in by_scale:
                    step.log_step = by_scale[item.scale].log_step
                by_scale.setdefault(item.scale, step)
                self.replaced[item.output] = step.replacement()
            if options.activation_step_rate > 0:
                self.steps = [step for name, step in by_scale.items() if name not in settled]

    def learn(self) -> dict[str, Tensor]:
        """The block's new initializers by name."""
        if self.roundings or self.steps or self._trained_biases():
            self._optimise()
        learned: dict[str, Tensor] = {}
        for rounding in self.roundings:
            weight, step = rounding.decided()
            learned[rounding.grid.quantizer.source] = weight
            learned[rounding.grid.quantizer.scale] = step
        for item in self.steps:
            learned |= item.learned()
        return learned | {name: bias.detach() for name, bias in self.biases.items()}

    def _optimise(self) -> None:
        options, output = self.options, self.block.output

        def errors() -> Iterator[Tensor]:
            index = np.sort(self.choice.choice(self.walk.samples, min(options.batch, self.walk.samples), replace=False))
            window = None if self.windows is None else self.windows.draw(self.choice)
            for part in np.array_split(index, -(-len(index) // self.rows)):
                given = self._inputs(part, None if window is None else window.read) | self.biases
                found = self.graph.run(given, [output], replaced=self.replaced)[output]
                target = self.walk.target(self.block, part, None if window is None else window.expected)
                found = found if window is None else window.exact(found)
                error = output_error(found, target.to(found.device), options.power)
                yield error if len(part) == len(index) else error * (len(part) / len(index))

        descend(errors, self.roundings, self.steps, options, self._trained_biases())

    def _trained_biases(self) -> list[Tensor]:
        return [bias for bias in self.biases.values() if bias.requires_grad]

    def _inputs(self, index: np.ndarray, area: Area | None) -> dict[str, Tensor]:
        given = self.walk.inputs(self.block, index, QUANTIZED, area)
        if self.options.mix <= 0:
            return given
        device = self.graph.device
        for name, exact in self.walk.inputs(self.block, index, FLOAT, area).items():
            if exact.is_floating_point():
                from_float = random_mask(exact.shape, self.options.mix, self.generator)
                given[name] = torch.where(from_float, exact.to(device), given[name].to(device))
        return given


def _rows_with_gradients(graph: TorchGraph, block: Block, most: int) -> int:
    """How many samples a block learns on at once: what their gradients are computed from has to fit into memory."""
    names = inside(graph, block)
    values = [value for node in graph.model.graph for value in node.outputs if value.name in names]
    return max(1, min(most, KEPT_FOR_GRADIENTS // max(sum(map(elements_of, values)), 1)))


def descend(
    errors: Callable[[], Iterable[Tensor]],
    roundings: Sequence[LearnedRounding],
    steps: Sequence[LearnedStep],
    options: Reconstruction,
    biases: Sequence[Tensor] = (),
) -> None:
    """Adam on an error and the penalty that makes every rounding decide.

    Args:
        errors: The error on a batch of its own choice, in parts that add up to it. The gradients of each are taken
            before the next is computed.
        roundings: The weights' variables.
        steps: The activations' step sizes, if they are learned.
        options: Iterations, rates and penalty.
        biases: The biases, if they are learned.
    """
    groups: list[dict[str, Any]] = [{"params": [item.variable for item in roundings], "lr": options.rounding_rate}]
    if options.weight_step_rate > 0:
        groups.append({"params": [item.log_step for item in roundings], "lr": options.weight_step_rate})
    if steps:
        groups.append({"params": [item.log_step for item in steps], "lr": options.activation_step_rate})
    if biases:
        groups.append({"params": list(biases), "lr": options.bias_rate})
    first_rates = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.Adam(groups)
    warm_up = int(options.warm_up * options.iterations)
    for iteration in range(options.iterations):
        progress = iteration / options.iterations
        for group, rate in zip(optimizer.param_groups[1:], first_rates[1:], strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.zero_grad(set_to_none=True)
        for loss in errors():
            torch.autograd.backward(loss)
        if iteration >= warm_up and roundings:
            done = (iteration - warm_up) / max(1, options.iterations - warm_up)
            start, end = options.sharpness
            sharpness = end + 0.5 * (start - end) * (1 + math.cos(math.pi * done))
            penalties = [item.penalty(sharpness) for item in roundings]
            torch.autograd.backward(options.regularisation * torch.stack(penalties).sum())
        optimizer.step()


def output_error(found: Tensor, target: Tensor, power: float = 2.0) -> Tensor:
    """|error| ** power summed over channels and averaged over samples and positions (BRECQ, section 3.2)."""
    channel = 1 if found.ndim in (2, 4, 5) else found.ndim - 1
    error = (found - target).abs().pow(power) if power != 2 else (found - target).square()
    return error.mean() * found.shape[channel]
