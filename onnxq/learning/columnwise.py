"""GPTQ over a whole network: the layers of one block after the other, each on what the rounded ones before it make.

Hessians come from the quantized network ("true sequential"): the layers that read one value are rounded together, and
what they make is computed anew before the layers that read it are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.autograd.ops.operands import to_torch
from onnxq.calibration.signed_scales import scale_rows
from onnxq.calibration.weight_ranges import Search, extremes
from onnxq.job import Job
from onnxq.learning import quantizers as found_quantizers
from onnxq.learning.cache import ActivationCache
from onnxq.learning.checkpoint import Checkpoint, fingerprint
from onnxq.learning.gptq import Columns, Rescale, round_columns, towards_float, with_best_steps
from onnxq.learning.hessian import Hessian, Layer
from onnxq.learning.own_initializers import own_biases, readers_of, separate_weights
from onnxq.learning.quantizers import Grid, Quantizer, as_float, read
from onnxq.learning.walk import FLOAT, QUANTIZED, Walk, inside
from onnxq.passes.insert_qdq import spec_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Columnwise:
    """How layers are rounded.

    Attributes:
        damping: Part of the mean of the Hessian's diagonal that is added to it.
        act_order: Whether the columns with the largest inputs come first.
        static_groups: Whether scales of blocks are those of the float weights; ``False`` takes them from the columns
            as they are when the block's turn comes. ``act_order`` asks for static ones.
        correct_biases: Whether a layer's bias takes back the mean error, so that only the rest has to be small.
        asymmetry: Part of what the layers before have lost that a weight makes up for (:func:`towards_float`).
        steps: Multiples of a channel's step, which has the least error of weights, that are tried beside it; the one
            with the least error of outputs stays.
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = True
    correct_biases: bool = True
    asymmetry: float = 0.0
    steps: tuple[float, ...] = ()


# What measures best, where nothing else is asked for.
BEST = Columnwise(act_order=True, asymmetry=0.75, steps=(0.7, 0.8, 0.9, 1.1, 1.2, 1.3))


def round_layers(
    job: Job,
    blocks: Sequence[Block],
    options: Columnwise,
    *,
    samples: int,
    cache_mib: int,
    search: Search | None = None,
    checkpoint: str = "gptq",
) -> None:
    """Round every weight of the job's Q/DQ graph; weights end on their grid, in their float initializers.

    Args:
        job: After ``insert`` and with all scales set.
        blocks: Of the float graph, before ``insert``.
        options: How.
        samples: How many calibration samples to use.
        cache_mib: Memory for activations; beyond it they go to disk.
        search: How scales of blocks follow from columns, where they are not static.
        checkpoint: Name of this stage within the job's checkpoint.
    """
    separate_weights(job.model.graph)
    quantizers = found_quantizers.find(job.model.graph)
    readers = readers_of(job.model.graph, quantizers)
    biases = own_biases(job.model.graph, readers) if options.correct_biases else {}
    graph = TorchGraph(job.model, job.settings.device)
    done = Checkpoint(job.checkpoint, fingerprint(job.model, checkpoint, options, samples, job.settings.seed))
    settled: set[str] = set()  # a weight that two blocks share is rounded in the first
    with (
        ActivationCache(cache_mib << 20, device=job.settings.device) as cache,
        job.progress.stage("learn", "Rounding columns", len(blocks)) as advance,
        torch.inference_mode(),
    ):
        walk = Walk(graph, quantizers, blocks, cache)
        walk.fill(job.source, job.specs, samples)
        network = Network(graph, walk, quantizers, readers, biases, options, search or extremes)
        for position, block in enumerate(blocks):
            names = inside(graph, block)
            weights = [item for item in quantizers if item.is_weight and item.output in names]
            weights = [item for item in weights if item.source not in settled]
            if options.asymmetry > 0:
                walk.prepare(block)
            finished = done.load(block.name)
            if finished is None:
                learned, _ = network.round_block(block, weights)
                finished = {name: tensor.cpu().numpy() for name, tensor in learned.items()}
                done.save(block.name, finished)
            found_quantizers.store(graph, finished)
            settled.update(item.source for item in weights)
            walk.advance(block)
            advance(position + 1)


def rounded_apart(
    job: Job, blocks: Sequence[Block], options: Columnwise, *, samples: int, cache_mib: int
) -> dict[str, Tensor]:
    """What :func:`round_layers` makes of weights and biases, by initializer; the graph keeps its float ones.

    Steps that were found better stay in the graph.
    """
    graph = job.model.graph
    separate_weights(graph)
    quantizers = found_quantizers.find(graph)
    own_biases(graph, readers_of(graph, quantizers))
    steps = {item.scale for item in quantizers}
    before = {name: value.const_value for name, value in graph.initializers.items() if name not in steps}
    round_layers(job, blocks, options, samples=samples, cache_mib=cache_mib)
    rounded = {}
    for name, tensor in before.items():
        value = graph.initializers[name]
        if value.const_value is not None and value.const_value is not tensor:
            rounded[name] = to_torch(value.const_value).float()
            value.const_value = tensor
    return rounded


class Network:
    """The Q/DQ graph while its layers are rounded.

    Args:
        graph: It, in torch.
        walk: Where the inputs of blocks are.
        quantizers: All of its quantizers.
        readers: The layers that read each weight (:func:`readers_of`).
        biases: The biases that take back mean errors (:func:`own_biases`).
        options: How layers are rounded.
        search: How scales of blocks follow from columns, where they are not static.
    """

    def __init__(
        self,
        graph: TorchGraph,
        walk: Walk,
        quantizers: Sequence[Quantizer],
        readers: Mapping[str, Sequence[Layer]],
        biases: Mapping[str, str],
        options: Columnwise,
        search: Search = extremes,
    ) -> None:
        self.graph, self.walk, self.readers, self.biases = graph, walk, readers, biases
        self.options, self.search = options, search
        self._weights = as_float(item for item in quantizers if item.is_weight)
        self._float = as_float(quantizers)
        self._nodes = {value.name: node for node in graph.model.graph for value in node.outputs}
        self._position = {node: index for index, node in enumerate(graph.model.graph)}
        walk.keeps_inputs = any(len(layers) > 1 for layers in readers.values())  # for readers of a shared weight ahead

    def round_block(self, block: Block, weights: Sequence[Quantizer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Round the weights of a block in ``graph``, first readers first.

        Args:
            block: The block, which the walk has come to.
            weights: Its weights.

        Returns:
            The new initializers by name, and what they were.
        """
        learned: dict[str, Tensor] = {}
        before: dict[str, Tensor] = {}  # what the float network still has where this block has changed
        for group in self._in_order(weights):
            found = self._round_group(block, group, before)
            before |= {name: read(self.graph, name).clone() for name in found if name not in before}
            found_quantizers.store(self.graph, found)
            learned |= found
        return learned, before

    def _in_order(self, weights: Sequence[Quantizer]) -> Iterator[list[Quantizer]]:
        """The weights whose layers read one value, together, first readers first."""
        groups: dict[str, list[Quantizer]] = {}
        for item in sorted(weights, key=self._first_reader):
            layers = self.readers.get(item.output, ())
            groups.setdefault(layers[0].activation if layers else "", []).append(item)
        yield from groups.values()

    def _round_group(
        self, block: Block, weights: Sequence[Quantizer], before: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """New initializers by name, for weights whose layers depend on no weight that is not rounded yet.

        Args:
            block: The block that is being rounded.
            weights: The weights.
            before: The block's initializers that have changed already, as they were.
        """
        hessians = self._hessians(block, weights, before)
        learned: dict[str, Tensor] = {}
        for item in weights:
            layers = self.readers.get(item.output, ())
            if not layers:
                learned[item.source] = Grid(self.graph, item).nearest()
                continue
            learned |= self._round(item, layers[0], hessians[item.output], self.biases.get(item.output))
        return learned

    def _round(self, item: Quantizer, layer: Layer, hessian: Hessian, bias: str | None) -> dict[str, Tensor]:
        grid = Grid(self.graph, item)
        scale, zero_point = grid.spread(grid.scale).expand_as(grid.weight), grid.zero_point.expand_as(grid.weight)
        products, drift = hessian.value, hessian.drift
        if bias is not None:
            products, drift = hessian.covariance, hessian.centred_drift
        original = weight = layer.matrix(grid.weight)
        if drift is not None:
            weight = towards_float(weight, products, drift, self.options.asymmetry)
        columns = Columns(weight, layer.matrix(scale), layer.matrix(zero_point), item.low, item.high, item.float_type)
        rescale = None
        if item.block_size is not None and not self.options.static_groups and not self.options.act_order:
            rescale = self._rescale(item)
        rounded, new_scale, new_zero_point = round_columns(
            columns,
            products,
            damping=self.options.damping,
            act_order=self.options.act_order,
            rescale=rescale,
            block_size=item.block_size,
        )
        learned = {}
        if self.options.steps and item.block_size is None and item.axis is not None and item.symmetric:
            rounded, factors = with_best_steps(
                columns,
                products,
                rounded,
                self.options.steps,
                damping=self.options.damping,
                act_order=self.options.act_order,
            )
            learned[item.scale] = grid.scale * factors.reshape(grid.scale.shape)
        learned[item.source] = layer.weight(rounded)
        if rescale is not None and item.block_size is not None and item.axis is not None:
            each = range(0, weight.shape[2], item.block_size)
            for name, matrix in ((item.scale, new_scale), (item.zero_point, new_zero_point)):
                blocks = matrix[0][:, each]
                learned[name] = blocks if layer.item.channel_axis == 0 else blocks.mT.contiguous()
        if bias is not None:
            lost = (original - rounded).to(torch.float64) @ hessian.mean[:, :, None]
            lost += original.to(torch.float64) @ hessian.mean_drift[:, :, None]
            shift = lost.flatten()
            before = read(self.graph, bias)
            learned[bias] = (before.to(torch.float64) + shift.reshape(before.shape)).to(before.dtype)
        return learned

    def _rescale(self, item: Quantizer) -> Rescale:
        dequantize = self._nodes[item.output]
        quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
        if quantize is None:
            raise RuntimeError(f"{item.output} is not made by Q/DQ")
        spec = spec_of(quantize)

        def rescale(rows: Tensor) -> tuple[Tensor, Tensor]:
            values = rows.cpu().numpy()
            scale, zero_point = scale_rows(values, *self.search(values, spec.format, spec.symmetric), spec)
            return (
                torch.from_numpy(scale).to(rows.device),
                torch.from_numpy(np.asarray(zero_point).astype(np.float32)).to(rows.device),
            )

        return rescale

    def _hessians(self, block: Block, weights: Sequence[Quantizer], before: Mapping[str, Tensor]) -> dict[str, Hessian]:
        """By the weight's output; layers of one geometry share theirs, and a shared weight has the sum of its readers'.

        Readers that no block has come to yet are looked at in the float network.
        """
        reachable = {*inside(self.graph, block), *block.inputs}
        layers = {item.output: self.readers.get(item.output, ()) for item in weights}
        here: dict[tuple[object, ...], Layer] = {}
        later: dict[tuple[object, ...], Layer] = {}
        for found in layers.values():
            for layer in found:
                (here if layer.activation in reachable else later)[layer.geometry] = layer
        exact = None
        if self.options.asymmetry > 0:
            exact = lambda index: {**self.walk.inputs(block, index, FLOAT), **before}  # noqa: E731
        sums = self._observed(here, lambda index: self.walk.inputs(block, index, QUANTIZED), self._weights, exact)
        if later:
            sums |= self._observed(later, self.walk.feeds, self._float)
        result: dict[str, Hessian] = {}
        for output, found in layers.items():
            geometries = [layer.geometry for layer in found]
            if len(geometries) == 1:
                result[output] = sums[geometries[0]]
                continue
            result[output] = Hessian()
            for geometry in geometries:
                result[output].merge(sums[geometry])
        return result

    def _observed(
        self,
        layers: Mapping[tuple[object, ...], Layer],
        inputs: Callable[[slice], dict[str, Tensor]],
        replaced: Mapping[str, Replacement],
        exact_inputs: Callable[[slice], dict[str, Tensor]] | None = None,
    ) -> dict[tuple[object, ...], Hessian]:
        found = {geometry: Hessian() for geometry in layers}
        wanted = list(dict.fromkeys(layer.activation for layer in layers.values()))
        for start in range(0, self.walk.samples if layers else 0, self.walk.chunk):
            index = slice(start, min(start + self.walk.chunk, self.walk.samples))
            values = self.graph.run(inputs(index), wanted, replaced=replaced)
            exact = {} if exact_inputs is None else self.graph.run(exact_inputs(index), wanted, replaced=self._float)
            for geometry, layer in layers.items():
                found[geometry].update(layer, values[layer.activation], exact.get(layer.activation))
        return found

    def _first_reader(self, item: Quantizer) -> int:
        layers = self.readers.get(item.output, ())
        return min((self._position[layer.item.node] for layer in layers), default=0)
