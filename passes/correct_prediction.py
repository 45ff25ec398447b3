"""Correct a denoiser's prediction by a factor and an offset that depend on the timestep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq.diffusion.step_lookup import constant, step_index

Array = np.ndarray[Any, Any]


class CorrectPrediction(InPlacePass):
    """Append an affine tail whose coefficients are looked up by the nearest timestep.

    Before::

        … ─► prediction

    After::

        timestep ─► nearest of a table ─► Gather(factors), Gather(offsets)
        … ─► Mul(factor) ─► Add(offset[channel]) ─► prediction

    With images, another Add puts the image of the step, or one of zeros, behind it.

    The tail is float and costs nothing beside the network. It works for integer and float timesteps, one for each
    sample or one for all. Does nothing where no coefficient differs from 1 and 0, so that a second run changes nothing
    only if it is given the same: it is meant to run once, as the last pass.

    Args:
        output: The name of the prediction, which it keeps.
        timestep: The name of the input that holds the timestep.
        timesteps: The timesteps of the sampler [steps].
        factors: [steps].
        offsets: [steps, channels].
        images: By position of the step, what else is added there [channels, …].
    """

    def __init__(
        self,
        output: str,
        timestep: str,
        timesteps: Array,
        factors: Array,
        offsets: Array,
        images: Mapping[int, Array] | None = None,
    ) -> None:
        super().__init__()
        self.output, self.timestep = output, timestep
        self.timesteps, self.factors, self.offsets, self.images = timesteps, factors, offsets, images or {}

    def call(self, model: ir.Model) -> PassResult:
        """Append the tail."""
        if np.all(self.factors == 1) and np.all(self.offsets == 0) and not self.images:
            return PassResult(model, False)
        graph = model.graph
        index = next(number for number, value in enumerate(graph.outputs) if value.name == self.output)
        value = graph.outputs[index]
        dtype = value.dtype or ir.DataType.FLOAT
        value.name = f"{self.output}_uncorrected"
        dimensions = len(value.shape or ())
        steps, channels = self.offsets.shape
        ones = [1] * (dimensions - 2)
        factors = constant(graph, "correction_factors", self.factors.astype(dtype.numpy()).reshape(steps, 1, *ones))
        offsets = self.offsets.astype(dtype.numpy()).reshape(steps, channels, *ones)
        nearest = step_index(graph, self.timestep, self.timesteps)
        tape = ir.tape.Tape()
        scaled = tape.op("Mul", [value, tape.op("Gather", [factors, nearest])])
        shift = tape.op("Gather", [constant(graph, "correction_offsets", offsets), nearest])
        corrected = tape.op("Add", [scaled, shift])
        if self.images:
            pictures = np.stack([np.zeros_like(next(iter(self.images.values()))), *self.images.values()])
            rows = np.zeros(steps, np.int64)
            rows[list(self.images)] = np.arange(1, len(pictures))
            table = constant(graph, "correction_images", pictures.astype(dtype.numpy()))
            row = tape.op("Gather", [constant(graph, "correction_rows", rows), nearest])
            corrected = tape.op("Add", [corrected, tape.op("Gather", [table, row])])
        for position, node in enumerate(tape.nodes):
            node.name = f"correction_{node.op_type}_{position}"
            node.outputs[0].name = f"correction_{position}"
        corrected.name, corrected.type, corrected.shape = self.output, value.type, value.shape
        graph.extend(tape.nodes)
        graph.outputs[index] = corrected
        return PassResult(model, True)
