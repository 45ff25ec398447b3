"""The weights that are going to be quantized, before anything is: as rows that share a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.errors import OnnxqError
from onnxq.folding import array_of
from onnxq.formats import parse_format
from onnxq.job import Job
from onnxq.scheme import Scheme

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FloatWeight:
    """A weight and how it is going to be quantized.

    Attributes:
        value: The initializer.
        nodes: The names of the layers that read it.
        axis: The axis of its scales; ``None`` for one scale.
        bits: Width of a code.
    """

    value: ir.Value
    nodes: tuple[str, ...]
    axis: int | None
    bits: int

    @property
    def name(self) -> str:
        """The initializer's name."""
        return self.value.name or ""

    def rows(self) -> Array:
        """The weight as [rows that share a scale, elements], float32."""
        array = array_of(self.value).astype(np.float32)
        return (
            array.reshape(1, -1)
            if self.axis is None
            else np.moveaxis(array, self.axis, 0).reshape(array.shape[self.axis], -1)
        )


def float_weights(job: Job) -> list[FloatWeight]:
    """The constant weights that the target would quantize, in order.

    Raises:
        OnnxqError: the scheme has scales per block, floating-point codes or asymmetric weights.
    """
    spec = job.scheme.weights
    if not spec.enabled or spec.granularity == "block" or spec.format.is_float or not spec.symmetric:
        raise OnnxqError(
            f"expected symmetric integer weights with a scale per channel or tensor, found {spec}",
            hint="use for example --weights int4",
        )
    placement = job.target.place(job.model.graph, job.scheme, job.settings.left_out, job.exceptions)
    return [
        FloatWeight(
            site.value,
            tuple(node.name or "" for node, _ in site.uses),
            site.axis if site.spec.granularity == "channel" else None,
            site.spec.format.bits,
        )
        for site in placement.sites
        if graphs.is_constant(site.value)
    ]


def storage_of(job: Job, asked: str, known: Sequence[str]) -> str:
    """How tables are stored, and containers that hold it.

    Raises:
        OnnxqError: there is no such storage.
    """
    if asked not in (*known, "auto"):
        raise OnnxqError(f"expected storage {', '.join(known)} or auto, found {asked!r}", hint="use --set storage=auto")
    storage = asked if asked != "auto" else ("int8" if job.scheme.activations.enabled else "table")
    if storage == "int8":
        job.scheme = in_int8(job.scheme)
        job.exceptions = {name: in_int8(scheme) for name, scheme in job.exceptions.items()}
    return storage


def in_int8(scheme: Scheme, bits: int | None = None) -> Scheme:
    """The scheme with weights of so many bits in 8-bit containers."""
    weights = scheme.weights
    number_format = weights.format if bits is None else parse_format(f"int{bits}")[0]
    if not weights.enabled:
        return scheme
    return Scheme(replace(weights, format=replace(number_format, storage=ir.DataType.INT8)), scheme.activations)
