"""The float and the quantized network side by side, one block at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.calibration.data import InputSpec, Source, batches, fixed_batch, inputs_of, row_count
from onnxq.errors import OnnxqError
from onnxq.learning.cache import ActivationCache
from onnxq.learning.quantizers import Quantizer, as_float
from onnxq.learning.windows import Windows, windows_of
from onnxq.runtime import Session
from onnxq.value_sizes import rows_that_fit

FLOAT, QUANTIZED = "float ", "quantized "
Area = tuple[slice, slice]
ROWS = 16  # samples that run at once


class Walk:
    """Keeps what the next block reads, as the float network computes it and as the quantized one does.

    Both come from the same Q/DQ graph: the float network is the one whose quantizers hand on what they read. A
    block runs once in each, on what its predecessors left; nothing is computed twice, and what no later block
    reads is dropped.

    Args:
        graph: The Q/DQ graph in torch.
        quantizers: All of its quantizers.
        blocks: The blocks, in order.
        cache: Where the activations go.
    """

    def __init__(
        self, graph: TorchGraph, quantizers: Sequence[Quantizer], blocks: Sequence[Block], cache: ActivationCache
    ) -> None:
        self.graph, self.quantizers, self.blocks, self.cache = graph, list(quantizers), list(blocks), cache
        self.samples = 0
        self._float = as_float(quantizers)
        # Weights of finished blocks lie on their grid: as they are, they are what the codes will mean.
        self._quantized = as_float(item for item in quantizers if item.is_weight)
        self.most_rows = rows_that_fit(graph.model.graph, ROWS)
        self.chunk = self.most_rows
        self._axes: dict[str, int] = {}  # where each value has its batch
        self._shared: dict[str, Tensor] = {}  # what has none, as positions: the same for all samples
        self.keeps_inputs = False  # the network's own, until the last block

    def fill(self, source: Source, specs: Sequence[InputSpec], samples: int) -> None:
        """Read the calibration inputs.

        Samples run one by one where an input without a batch axis differs between them, as a single timestep does.
        """
        whole = {spec.name for spec in specs if spec.is_whole}
        differing = _differing(source, whole, samples)
        if differing:
            specs = [
                spec if spec.is_whole else dataclasses.replace(spec, shape=(None, *spec.row_shape)) for spec in specs
            ]
            self.graph.shared = whole - differing
        self.samples = samples
        start = 0
        for batch in batches(source, specs, batch_size=self.most_rows, samples=samples):
            feed = inputs_of(batch, specs)
            rows = min(row_count(feed, specs), samples - start)  # a last batch may be filled by repeating rows
            for name, array in feed.items():
                if name in whole - differing:
                    self._shared[FLOAT + name] = self._shared[QUANTIZED + name] = torch.from_numpy(np.array(array))
                    continue
                values = torch.from_numpy(np.array(array[None, None] if name in differing else array[:rows, None]))
                if start == 0:
                    self.cache.allocate(FLOAT + name, (samples, *values.shape[1:]), values.dtype)
                    self.cache.alias(QUANTIZED + name, FLOAT + name)
                    self._axes[name] = 0
                self.cache.write(FLOAT + name, slice(start, start + rows), values)
            start += rows
        self.samples = start  # an incomplete last batch of an export with a fixed batch is left out
        fixed = fixed_batch(specs) or 1
        self.chunk = -(-self.most_rows // fixed) * fixed

    def inputs(
        self, block: Block, index: np.ndarray | slice, kind: str = QUANTIZED, area: Area | None = None
    ) -> dict[str, Tensor]:
        """What the block reads, for some samples; of maps, an area alone if asked for."""
        return {name: self._rows(kind, name, index, area) for name in block.inputs}

    def feeds(self, index: np.ndarray | slice) -> dict[str, Tensor]:
        """What the network itself reads, for some samples; needs ``keeps_inputs``."""
        return {name: self._rows(QUANTIZED, name, index) for name in self.graph.input_names}

    def target(self, block: Block, index: np.ndarray | slice, area: Area | None = None) -> Tensor:
        """What the float network has at the block's end, for some samples; of a map, an area alone if asked for."""
        return self._rows(FLOAT, block.output, index, area)

    def windows(self, block: Block, names: Collection[str], side: int) -> Windows | None:
        """The windows that a block can be learned on; ``None``: on whole maps alone.

        Args:
            block: The block, which has been prepared.
            names: All values inside it.
            side: Height and width of a window; 0: whole maps are wanted.
        """
        if not side or any(FLOAT + name in self._shared or self._axes[name] for name in (*block.inputs, block.output)):
            return None
        shapes = {}
        for name in block.inputs:
            rows, each, *rest = self.cache.shape(FLOAT + name)
            shapes[name] = (rows * each, *rest)
        return windows_of(self.graph.model.graph, block, names, shapes, side)

    def prepare(self, block: Block) -> None:
        """Compute the float network's values at the end of the block."""
        self._run(block, FLOAT, self._float)

    def prepare_from(self, block: Block, teacher: Session) -> None:
        """The same from another network, whose inputs are the block's: where Q/DQ stand in another function."""
        name = block.output
        for start in range(0, self.samples, self.chunk):
            index = slice(start, min(start + self.chunk, self.samples))
            found = []
            for given in self.graph.runs(self.inputs(block, index, FLOAT)):
                found.append(teacher.run({key: value.cpu().numpy() for key, value in given.items()}, [name])[0])
            value, rows = torch.from_numpy(np.concatenate(found)), index.stop - index.start
            each = 1 if self.graph.shared is None else len(value) // rows
            kept = value[: rows * each].reshape(rows, each, *value.shape[1:])
            if start == 0:
                self._axes[name] = 0
                self.cache.allocate(FLOAT + name, (self.samples, *kept.shape[1:]), kept.dtype)
            self.cache.write(FLOAT + name, index, kept)

    def advance(self, block: Block) -> None:
        """Compute the quantized network's values at the end of the finished block, and drop what is not read again."""
        self._run(block, QUANTIZED, self._quantized)
        later = {name for other in self.blocks[self.blocks.index(block) + 1 :] for name in other.inputs}
        if self.keeps_inputs:
            later.update(self.graph.input_names)
        for name in {*block.inputs, block.output} - later:
            for kind in (FLOAT, QUANTIZED):
                if kind + name in self.cache:
                    self.cache.free(kind + name)

    def _run(self, block: Block, kind: str, replaced: Mapping[str, Replacement]) -> None:
        name = block.output
        with torch.no_grad():
            if all(kind + source in self._shared for source in block.inputs):
                given = self.inputs(block, slice(0, 1), kind)
                self._shared[kind + name] = self.graph.run(given, [name], replaced=replaced)[name]
                if self.graph.shared is not None:
                    self.graph.shared.add(name)
                return
            for start in range(0, self.samples, self.chunk):
                index = slice(start, min(start + self.chunk, self.samples))
                given = self.inputs(block, index, kind)
                value = self.graph.run(given, [name], replaced=replaced)[name]
                rows = index.stop - index.start
                if start == 0:
                    self._axes[name] = self._batch_axis(block, value, rows, kind, replaced)
                moved = value.movedim(self._axes[name], 0)
                kept = moved.reshape(rows, -1, *moved.shape[1:])
                if start == 0:
                    self.cache.allocate(kind + name, (self.samples, *kept.shape[1:]), kept.dtype)
                self.cache.write(kind + name, index, kept)

    def _batch_axis(
        self, block: Block, value: Tensor, rows: int, kind: str, replaced: Mapping[str, Replacement]
    ) -> int:
        """Which axis grows with the batch: exports may put the sequence first, or fold the batch into another axis."""
        if value.shape[0] == rows:
            return 0
        given = self.inputs(block, slice(0, rows // 2), kind)
        half = self.graph.run(given, [block.output], replaced=replaced)[block.output]
        pairs = enumerate(zip(half.shape, value.shape, strict=True))
        grown = [axis for axis, (fewer, all_of_them) in pairs if all_of_them == 2 * fewer]
        if len(grown) != 1 or value.shape[grown[0]] % rows:
            raise OnnxqError(
                f"expected {block.output!r} to grow with the batch along one axis, found shape {list(value.shape)} for "
                f"{rows} samples and {list(half.shape)} for {rows // 2}",
                hint="export the model with a dynamic batch, or use --recipe default",
            )
        return grown[0]

    def _rows(self, kind: str, name: str, index: np.ndarray | slice, area: Area | None = None) -> Tensor:
        shared = self._shared.get(kind + name)
        if shared is not None:
            return shared.to(self.cache.device)
        return self.cache.rows(kind + name, index, area).flatten(0, 1).movedim(0, self._axes[name])


def _differing(source: Source, whole: Collection[str], samples: int) -> set[str]:
    """The inputs without a batch axis that are not the same for all samples."""
    found: set[str] = set()
    first: Mapping[str, np.ndarray] = {}
    for sample in itertools.islice(source, samples) if whole else ():
        first = first or sample
        found |= {name for name in whole if not np.array_equal(first[name], sample[name])}
        if len(found) == len(whole):
            break
    return found


def inside(graph: TorchGraph, block: Block) -> set[str]:
    """Names of all values computed between the block's inputs and its end, initializers included."""
    found: set[str] = set()
    values = {value.name: value for node in graph.model.graph for value in node.outputs}
    stack = [block.output]
    while stack:
        name = stack.pop()
        if name in found or (name in block.inputs):
            continue
        found.add(name)
        value = values.get(name)
        producer = None if value is None else value.producer()
        if producer is not None:
            stack.extend(item.name for item in producer.inputs if item is not None and item.name)
    return found
