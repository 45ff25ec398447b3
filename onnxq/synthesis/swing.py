"""Swing convolutions: strided convolutions read a randomly shifted input while images are made."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from onnxq import graph as graphs
from onnxq.autograd.interpreter import Replacement, TorchGraph

REACH = 1


def swing(graph: TorchGraph, model: ir.Model, source: torch.Generator) -> dict[str, Replacement]:
    """Replacements for the outputs of every strided convolution.

    Before it, the input is padded by one (by reflection) and cropped back at a random place, one for the batch: a
    convolution with stride 2 otherwise sees only some of the pixels, and images grow checkerboards (GENIE, section
    3.2). The graph itself is not changed.
    """
    found = {}
    for node in model.graph:
        strides = node.attributes.get("strides")
        if not graphs.is_op(node, "Conv") or strides is None or max(strides.as_ints()) == 1:
            continue
        read, made = node.inputs[0], node.outputs[0]
        if read is None or read.name is None or made.name is None or len(strides.as_ints()) != 2:
            continue
        found[made.name] = Replacement((read.name,), _Swung(graph, read.name, made.name, source))
    return found


class _Swung:
    def __init__(self, graph: TorchGraph, read: str, made: str, source: torch.Generator) -> None:
        self.graph, self.read, self.made, self.source = graph, read, made, source

    def __call__(self, values: Tensor) -> Tensor:
        height, width = values.shape[2:]
        if min(height, width) > REACH:
            top, left = torch.randint(2 * REACH + 1, (2,), generator=self.source).tolist()
            padded = functional.pad(values, (REACH,) * 4, mode="reflect")
            values = padded[:, :, top : top + height, left : left + width]
        return self.graph.run({self.read: values}, [self.made])[self.made]
