"""Biases that take back what learning has left of a layer's mean error.

Learned rounding makes the error of a block's output small in the mean square, and nothing keeps its mean at zero. A
mean error does not average out: it moves every sample the same way, and along a sampler it adds up from step to step.
So once a block has learned, each of its layers is looked at in order, on what the quantized network before it makes,
and its bias is shifted by the mean difference to the float network's output, channel by channel.

Source: M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, Data-Free Quantization Through Weight Equalization and Bias
Correction, ICCV 2019 (arXiv 1906.04721), appendix D: empirical bias correction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.biases import bias_place
from onnxq.learning.hessian import Layer
from onnxq.learning.quantizers import Quantizer, as_float, read, store
from onnxq.learning.walk import FLOAT, QUANTIZED, Walk


@dataclass(frozen=True)
class _Biased:
    """A layer that has a bias of its own.

    Attributes:
        output: What it makes with its bias, which may be a node behind the product: learning moves biases too.
        axis: Its axis of channels, from the end.
        bias: The bias's initializer.
    """

    output: str
    axis: int
    bias: str


class BiasMeans:
    """The layers of a Q/DQ graph whose biases can be corrected; a Conv without a bias gets one of zeros.

    Args:
        graph: The Q/DQ graph, before it is brought to torch.
        quantizers: All of its quantizers.
        readers: The layers that read each weight (:func:`readers_of`).
        biases: The biases that they alone have (:func:`own_biases`).
    """

    def __init__(
        self,
        graph: ir.Graph,
        quantizers: Sequence[Quantizer],
        readers: Mapping[str, Sequence[Layer]],
        biases: Mapping[str, str],
    ) -> None:
        position = {node: index for index, node in enumerate(graph)}
        layers = sorted((readers[name][0] for name in biases), key=lambda layer: position[layer.item.node])
        self._layers = [
            _Biased(
                place.node.outputs[0].name or "",
                len(layer.shape) - 1 if layer.item.node.op_type == "Conv" else 1,
                biases[layer.item.weight.name or ""],
            )
            for layer in layers
            if layer.item.weight is not None and (place := bias_place(layer.item)) is not None
        ]
        self._float = as_float(quantizers)
        self._weights = as_float(item for item in quantizers if item.is_weight)

    def expected(self, graph: TorchGraph, walk: Walk, block: Block, names: Collection[str]) -> dict[str, Tensor]:
        """The float network's mean output of each layer of a block, before anything of the block has changed.

        Args:
            graph: The Q/DQ graph in torch.
            walk: Where the block's inputs are.
            block: The block.
            names: All values inside it.
        """
        layers = [layer for layer in self._layers if layer.output in names]
        return self._means(graph, walk, block, FLOAT, layers, self._float)

    def correct(self, graph: TorchGraph, walk: Walk, block: Block, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shift the biases of a block that has learned, in ``graph``, whose weights lie on their grid.

        Returns:
            The new biases, by name.
        """
        learned: dict[str, Tensor] = {}
        for layer in self._layers:
            if layer.output not in expected:
                continue
            # Each layer sees what the corrected ones before it make.
            found = self._means(graph, walk, block, QUANTIZED, [layer], self._weights)[layer.output]
            bias = read(graph, layer.bias)
            shift = (expected[layer.output] - found).reshape(bias.shape)
            learned[layer.bias] = (bias.to(torch.float64) + shift).to(bias.dtype)
            store(graph, {layer.bias: learned[layer.bias]})
        return learned

    @staticmethod
    def _means(
        graph: TorchGraph,
        walk: Walk,
        block: Block,
        kind: str,
        layers: Sequence[_Biased],
        replaced: Mapping[str, Replacement],
    ) -> dict[str, Tensor]:
        """The mean output of each layer, by channel, in float64."""
        outputs = [layer.output for layer in layers]
        sums: dict[str, Tensor] = {}
        count = 0
        with torch.no_grad():
            for start in range(0, walk.samples if layers else 0, walk.chunk):
                index = slice(start, min(start + walk.chunk, walk.samples))
                values = graph.run(walk.inputs(block, index, kind), outputs, replaced=replaced)
                rows = index.stop - index.start
                for layer in layers:
                    value = values[layer.output]
                    others = [axis for axis in range(value.ndim) if axis != value.ndim - layer.axis]
                    part = value.mean(dim=others).to(torch.float64) * rows
                    sums[layer.output] = sums[layer.output] + part if layer.output in sums else part
                count += rows
        return {name: total / count for name, total in sums.items()}
