"""A float network as synthesis sees it: what it remembers, and how its inputs are written."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxq import graph as graphs
from onnxq.autograd.interpreter import TorchGraph
from onnxq.calibration.data import InputSpec, input_specs
from onnxq.calibration.picture_size import apart
from onnxq.errors import OnnxqError
from onnxq.learning.outputs import compared
from onnxq.synthesis.scale import input_scale, pixel_bounds
from onnxq.synthesis.statistics import Remembered, remembered

Array = np.ndarray[Any, Any]


class Network:
    """The network, its remembered statistics, and the units and axes of its one input.

    Inputs are made with channels on axis 1 and in units in which the first layers' statistics are met; the file may
    have them otherwise.

    Args:
        model: The float model, with one float input of known size beside those that follow from a picture.
        seed: Of the noise that units are found with.
        device: Where it runs.
        picture: Whether units are found with noise of a picture's spectrum, and pixels have bounds.

    Attributes:
        graph: The network in torch.
        input: The name of the file's input.
        shape: Of one made input, [channels, …].
        layers: What BatchNormalization remembers, in graph order.
        bounds: The least and the largest value of a made pixel; ``None``: there are none.
    """

    def __init__(self, model: ir.Model, seed: int, device: str, *, picture: bool = False) -> None:
        spec = apart(input_specs(model))[0][0]
        self.graph, self.input = TorchGraph(model, device), spec.name
        self.name, self.axes = channels_first(model, spec.name)
        sizes = tuple(size or 1 for size in spec.shape[1:])
        self.shape = tuple(sizes[axis - 1] for axis in self.axes[1:]) if self.axes else sizes
        self.layers: list[Remembered] = remembered(model, device)
        self.model = model
        source = torch.Generator().manual_seed(seed)
        self.scale, self.shift = input_scale(self.graph, self.name, self.shape, self.layers, source, picture=picture)
        self.bounds = pixel_bounds(self.scale, self.shift) if self.layers and picture else None

    @cached_property
    def logits(self) -> str | None:
        """The value with a classifier's logits; ``None`` where there is none."""
        return next((item.value for item in compared(self.model) if item.kind == "kl"), None)

    def given(self, made: Tensor) -> dict[str, Tensor]:
        """Made inputs, for this network's graph: behind the node that turns their axes, if there is one."""
        return {self.name: self.scale * made + self.shift}

    def inputs(self, made: Tensor) -> dict[str, Tensor]:
        """Made inputs as any form of the network reads them, with gradients."""
        values = self.scale * made + self.shift
        return {self.input: values.permute(*np.argsort(self.axes).tolist()) if self.axes else values}

    def array(self, made: Tensor) -> Array:
        """Made inputs in the units and in the order of axes that the file asks for."""
        array: Array = self.inputs(made)[self.input].cpu().numpy()
        return array

    def classes(self) -> int:
        """How many classes the logits tell apart."""
        assert self.logits is not None
        with torch.no_grad():
            found = self.graph.run(self.given(torch.zeros(1, *self.shape, device=self.graph.device)), [self.logits])
        return found[self.logits].shape[-1]


def channels_first(model: ir.Model, name: str) -> tuple[str, tuple[int, ...]]:
    """The value in which an input's channels are on axis 1, and how its axes are turned to make it; () if not at all.

    Networks from TensorFlow read [batch, height, width, channels] and turn it at once; inputs are made behind that.
    """
    value = graphs.input_named(model.graph, name)
    readers = [node for node, _ in graphs.consumers(value)]
    if len(readers) == 1 and graphs.is_op(readers[0], "Transpose") and value not in model.graph.outputs:
        axes = readers[0].attributes.get("perm")
        if axes is not None and axes.as_ints()[0] == 0:
            return readers[0].outputs[0].name or "", tuple(axes.as_ints())
    return name, ()


def require_images(model: ir.Model, wanted_by: str, hint: str) -> InputSpec:
    """The one input of a model that reads images.

    Args:
        model: The model.
        wanted_by: What needs images.
        hint: What to do without.

    Raises:
        OnnxqError: it has several inputs, or one that holds no images of known size.
    """
    specs = input_specs(model)
    if len(specs) != 1 or specs[0].dtype.kind != "f" or len(specs[0].shape) != 4 or None in specs[0].shape[1:]:
        found = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs)
        raise OnnxqError(f"expected one float input of images of known size for {wanted_by}, found {found}", hint=hint)
    return specs[0]
