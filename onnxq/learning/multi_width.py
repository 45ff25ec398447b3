"""One set of weights that is good at several widths: every step trains the highest, the lowest and a random mixture.

Source: K. Xu, Q. Feng, X. Zhang, D. Wang, MultiQuant: Training Once for Multi-bit Quantization of Neural Networks,
IJCAI 2022 (lowest, random, highest together; soft labels from the network itself); initial steps and the order of
passes as in the code of the authors' successor EQ-Net, ICCV 2023.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxq.arithmetic import scale_and_zero_point
from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.calibration.weight_ranges import least_error
from onnxq.formats import parse_format
from onnxq.job import Job
from onnxq.learning import quantizers as found_quantizers
from onnxq.learning.cache import ActivationCache
from onnxq.learning.checkpoint import Checkpoint, fingerprint
from onnxq.learning.distillation import sampled
from onnxq.learning.finetune import FineTuning, Moment, finetune
from onnxq.learning.losses import Loss, distillation
from onnxq.learning.quantizers import Grid, Quantizer
from onnxq.learning.student import LearnedWeight, Student
from onnxq.learning.walk import FLOAT, Walk, inside
from onnxq.weights.masters import WIDTHS

Array = np.ndarray[Any, Any]

NARROW = WIDTHS[:-1]
SMALLEST_LOSS = 1e-12
TABLE = "table of "  # before the names of what is no initializer


class WidthsStudent(Student):
    """A student whose int8 weights are rounded again to narrower widths, each with steps of its own.

    Narrow weights are rounded from the int8 ones, as they are when a width is exported.

    Args:
        graph: The Q/DQ graph in torch, int8 scales set.
        quantizers: All of its quantizers.
        within: Names of the values whose nodes train; ``None``: all.
        frozen: Names of initializers that stay as they are.
        learn_weights: Whether weights and biases learn.
        learn_steps: Whether steps learn.
    """

    def __init__(
        self,
        graph: TorchGraph,
        quantizers: Sequence[Quantizer],
        within: Collection[str] | None = None,
        frozen: Collection[str] = (),
        starts: Mapping[str, Tensor] | None = None,
        *,
        learn_weights: bool,
        learn_steps: bool,
    ) -> None:
        super().__init__(
            graph, quantizers, within, frozen, starts, learn_weights=learn_weights, learn_steps=learn_steps
        )
        self.narrow = {
            output: {bits: _narrowed(weight, bits, learn_steps) for bits in NARROW}
            for output, weight in self.weights.items()
        }

    def run_at(
        self, widths: Mapping[str, int], given: Mapping[str, Tensor], wanted: Iterable[str]
    ) -> dict[str, Tensor]:
        """Values of the network with a width for each weight.

        Args:
            widths: By the name of the rounded weight.
            given: Inputs.
            wanted: Names of values.
        """
        replaced = dict(self._replaced)
        for output, bits in widths.items():
            if bits != WIDTHS[-1]:
                replaced[output] = Replacement((self.weights[output].grid.quantizer.source,), self._twice(output, bits))
        return self.graph.run({**given, **self.masters}, wanted, replaced=replaced)

    def steps(self) -> list[Tensor]:
        """The variables of steps and zero points that learn, those of narrow widths included."""
        narrow = [item.log_step for by_width in self.narrow.values() for item in by_width.values()]
        return super().steps() + [tensor for tensor in narrow if tensor.requires_grad]

    def tables(self) -> dict[str, Array]:
        """The scales of all widths but the master's, [widths, …], by the name of the rounded weight."""
        return {
            output: np.stack([by_width[bits].step.detach().cpu().numpy() for bits in NARROW])
            for output, by_width in self.narrow.items()
        }

    def _twice(self, output: str, bits: int) -> Any:
        def rounded(weight: Tensor) -> Tensor:
            return self.narrow[output][bits](self.weights[output](weight))

        return rounded


def _narrowed(weight: LearnedWeight, bits: int, learn_step: bool) -> LearnedWeight:
    """The same weight on the grid of a narrower width, which starts at the least error."""
    number_format, _ = parse_format(f"int{bits}")
    grid: Grid = copy.copy(weight.grid)
    axis = weight.grid.quantizer.axis
    master = grid.nearest().detach().cpu().numpy()
    rows = master.reshape(1, -1) if axis is None else np.moveaxis(master, axis, 0).reshape(master.shape[axis], -1)
    low, high = least_error(rows, number_format, True, 2.0)
    step, _ = scale_and_zero_point(low, high, number_format, symmetric=True)
    grid.low, grid.high = number_format.low, number_format.high
    grid.scale = torch.from_numpy(np.asarray(step, np.float32)).reshape(grid.scale.shape).to(grid.scale)
    return LearnedWeight(grid, learn_step, scaled=False)


class _OtherWidths:
    """The lowest widths and a random one for each layer, taught by the float network and by the highest widths.

    The lowest width's loss is a thousand times the highest's and is most of what a plain sum learns (``balance`` 0); at
    1 each counts relative to its own size, so that the gradient is that of the product of all three.
    """

    def __init__(
        self, student: WidthsStudent, outputs: Sequence[str], loss: Loss, own: float, balance: float, seed: int
    ) -> None:
        self.student, self.outputs, self.loss = student, list(outputs), loss
        self.own, self.balance, self.seed = own, balance, seed

    def __call__(self, moment: Moment) -> Tensor:
        generator = np.random.default_rng((self.seed, moment.step))
        highest = {name: value.detach() for name, value in moment.student.items()}
        drawn = {output: int(generator.choice(WIDTHS)) for output in self.student.narrow}
        lowest = dict.fromkeys(self.student.narrow, WIDTHS[0])
        total = torch.zeros(())
        for widths in (drawn, lowest):
            found = self.student.run_at(widths, moment.inputs, self.outputs)
            part = self.own * self.loss(found, highest) + (1 - self.own) * self.loss(found, moment.teacher)
            relative = self.loss(highest, moment.teacher) / part.detach().clamp_min(SMALLEST_LOSS)
            part = part * relative.clamp_min(SMALLEST_LOSS) ** self.balance
            total = total + part
        return total


def train_widths(
    job: Job,
    blocks: Sequence[Block],
    outputs: Mapping[str, str],
    options: FineTuning,
    *,
    own: float,
    balance: float,
    samples: int,
    cache_mib: int,
    biases: Mapping[str, Array],
) -> dict[str, Array]:
    """Train a Q/DQ graph with int8 weights to give what the float network gives, at every width from 2 to 8 bits.

    Args:
        job: After ``insert`` and with all scales set; its initializers are written.
        blocks: Of the float graph, before ``insert``: each learns in turn, on the float network's inputs of it. None:
            the whole network learns its outputs at once.
        outputs: The network's values to compare, and how (see :func:`losses.compared_outputs`); blocks are compared
            by their relative squared error.
        options: How the network or each block learns.
        own: The part of the narrow widths' loss that looks at the highest width's values, not at the float network's.
        balance: From 0, losses of the widths are added as they are, to 1, each counts relative to its own size.
        samples: How many calibration samples to learn from.
        cache_mib: Memory for activations; beyond it they go to disk.
        biases: Where biases start that do not start at the float network's, by initializer.

    Returns:
        The scales of the widths of 2 to 7 bits, [widths, …], by the name of the rounded weight.
    """
    graph = TorchGraph(job.model, job.settings.device)
    quantizers = found_quantizers.find(job.model.graph)
    whole = [Block(name, tuple(graph.input_names), name, ()) for name in outputs]
    parts = [[block] for block in blocks] or [whole]
    kept = Checkpoint(
        job.checkpoint,
        fingerprint(job.model, "widths", outputs, options, own, balance, samples, job.settings.seed, sorted(biases)),
    )
    starts = {name: torch.from_numpy(array) for name, array in biases.items()}
    tables: dict[str, Array] = {}
    settled: set[str] = set()  # an initializer that two blocks share is learned in the first
    with (
        ActivationCache(cache_mib << 20, device=job.settings.device) as cache,
        job.progress.stage("learn", "Training all widths", len(parts), "blocks") as advance,
    ):
        walk = Walk(graph, quantizers, blocks or whole, cache)
        walk.fill(job.source, job.specs, samples)
        for position, part in enumerate(parts):
            for block in part:
                walk.prepare(block)
            name = part[0].name
            finished = kept.load(name)
            if finished is None:
                within = inside(graph, part[0]) if blocks else None
                finished = _learn(
                    walk, part, within, settled, starts, outputs if not blocks else {}, options, own, balance, job
                )
                kept.save(name, finished)
            tables |= {key.removeprefix(TABLE): value for key, value in finished.items() if key.startswith(TABLE)}
            learned = {key: value for key, value in finished.items() if not key.startswith(TABLE)}
            found_quantizers.store(graph, learned)
            settled.update(learned)
            if blocks:
                walk.advance(part[0])
            advance(position + 1)
    return tables


def _learn(
    walk: Walk,
    part: Sequence[Block],
    within: set[str] | None,
    settled: set[str],
    starts: Mapping[str, Tensor],
    outputs: Mapping[str, str],
    options: FineTuning,
    own: float,
    balance: float,
    job: Job,
) -> dict[str, Array]:
    """Train a block, or the network; its new initializers, and tables under names of their own."""
    student = WidthsStudent(
        walk.graph, walk.quantizers, within, settled, starts,
        learn_weights=options.weight_rate > 0, learn_steps=options.step_rate > 0,
    )  # fmt: skip
    if not student.narrow or not (student.masters or student.steps()):
        return {}
    wanted = {block.output: outputs.get(block.output, "mse") for block in part}
    loss, seed = distillation(wanted), zlib.crc32(part[0].name.encode()) ^ job.settings.seed
    learned = finetune(
        student,
        sampled(walk, part, FLOAT, options.batch, seed),
        list(wanted),
        loss,
        replace(options, save_every=options.steps + 1),
        terms=[_OtherWidths(student, list(wanted), loss, own, balance, seed)],
    )
    tables = {TABLE + output: table for output, table in student.tables().items()}
    return {name: tensor.cpu().numpy() for name, tensor in learned.items()} | tables
