"""What the temporal region computes, written down: a row for each step of the sampler (and each label)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.calibration.data import Array, InputSpec, fixed_batch
from onnxq.diffusion.denoiser import Denoiser
from onnxq.diffusion.temporal_region import TemporalRegion
from onnxq.runtime import Session


@dataclass(frozen=True)
class FeatureTable:
    """The rows of one value.

    Attributes:
        rows: [steps · labels, …]: what the value is for one sample, labels running fastest.
        per_sample: Whether a run has one row for each of its samples; otherwise the whole value is one row.
        dtype: What the value is in the network, where its rows are rounded further.
    """

    rows: Array
    per_sample: bool
    dtype: ir.DataType


def tabulate(
    model: ir.Model, names: Sequence[str], inputs: Collection[str], denoiser: Denoiser, timesteps: Sequence[float]
) -> dict[str, FeatureTable]:
    """Compute temporal values once for every timestep (and label), in onnxruntime as the denoiser itself runs.

    Args:
        model: The denoiser, float or quantized.
        names: The values.
        inputs: What they depend on: the timestep, perhaps labels.
        denoiser: The roles of its inputs.
        timesteps: Of the sampler's steps.

    Returns:
        Tables by the name of the value. A value that is no row for each sample (the batch folded into another axis)
        has none.
    """
    if not names:
        return {}
    session = Session(_only(model, names), optimize=False)
    labels = [item for item in denoiser.conditions if item.spec.name in inputs]
    choices = [range(item.classes or 1) for item in labels]
    fixed = fixed_batch(denoiser.specs)

    def run(time: float, chosen: Sequence[int], count: int) -> list[Array]:
        feed = {
            denoiser.sample.name: _zeros(denoiser.sample, count),
            denoiser.timestep.name: denoiser.timesteps(time, denoiser.timestep.batch or count),
        }
        for item in denoiser.conditions:
            feed[item.spec.name] = _zeros(item.spec, count)
        for item, label in zip(labels, chosen, strict=True):
            feed[item.spec.name][:] = label
        return session.run({name: array for name, array in feed.items() if name in session.input_names}, names)

    first = [0] * len(labels)
    kinds = _kinds(run(timesteps[0], first, fixed or 1), run(timesteps[0], first, fixed or 2), denoiser, fixed)
    rows: dict[str, list[Array]] = {name: [] for name, kind in zip(names, kinds, strict=True) if kind is not None}
    for time, chosen in itertools.product(timesteps, itertools.product(*choices)):
        for name, kind, value in zip(names, kinds, run(time, chosen, fixed or 1), strict=True):
            if kind is not None:
                rows[name].append(value[0] if kind else value)
    found = dict(zip(names, kinds, strict=True))
    values, tables = graphs.values(model.graph), {}
    for name, parts in rows.items():
        stack = np.stack(parts)
        dtype = values[name].dtype or ir.DataType.from_numpy(stack.dtype)  # bfloat16 runs as float32
        tables[name] = FeatureTable(stack.astype(dtype.numpy(), copy=False), bool(found[name]), dtype)
    return tables


def _kinds(one: list[Array], two: list[Array], denoiser: Denoiser, fixed: int | None) -> list[bool | None]:
    """Whether each value has a row for each sample (True), none (False), or cannot be tabulated (None)."""
    found: list[bool | None] = []
    for small, large in zip(one, two, strict=True):
        if small.ndim and small.shape[0] == (fixed or 1) and large.shape == (fixed or 2, *small.shape[1:]):
            found.append(True)
        elif not denoiser.timestep.shape and small.shape == large.shape:
            found.append(False)
        else:
            found.append(None)
    return found


def _zeros(spec: InputSpec, count: int) -> Array:
    sizes = [size or 1 for size in spec.row_shape]
    return np.zeros(sizes if spec.is_whole else (count, *sizes), spec.dtype)


def _only(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """The part of the model that computes some values; initializers are shared, not copied."""
    part = model.clone()
    values = graphs.values(part.graph)
    part.graph.outputs[:] = [values[name] for name in names]
    common_passes.RemoveUnusedNodesPass()(part)
    for value in [value for value in part.graph.inputs if not value.uses() and value.name not in names]:
        part.graph.inputs.remove(value)
    return part


def worth_caching(
    region: TemporalRegion, tables: Mapping[str, FeatureTable], *, bytes_per_weight: float = 4.0
) -> list[str]:
    """The values whose tables together are smaller than the weights that they save.

    Weights go only where everything that reads them is tabulated, so that the choice is one of sets: none is kept
    as computed at first, then values whose tables are large are given back as long as the file shrinks; against that
    stands tabulating nothing.

    Args:
        region: The temporal region.
        tables: Of its frontier; what has none stays computed.
        bytes_per_weight: What a weight of a Conv, Gemm or MatMul takes in the file that comes of it (1 for int8).
    """
    quantized = {item.weight for node in region.nodes if (item := layer_nodes.weighted(node)) is not None}
    weights = {value.name or "": _initializers_behind(value) for value in region.frontier}

    def total(computed: Collection[str]) -> float:
        needed = set().union(*(weights[name] for name in computed))
        size = float(sum(table.rows.nbytes for name, table in tables.items() if name not in computed))
        for value in needed:
            tensor = value.const_value
            if tensor is not None:
                size += tensor.size * bytes_per_weight if value in quantized else tensor.nbytes
        return size

    computed = [name for name in weights if name not in tables]
    for name in sorted(tables, key=lambda name: -tables[name].rows.nbytes):
        if total([*computed, name]) < total(computed):
            computed.append(name)
    if total(list(weights)) <= total(computed):
        return []
    return [name for name in tables if name not in computed]


def _initializers_behind(value: ir.Value) -> set[ir.Value]:
    """What of the file the value is computed from."""
    return {item for item in graphs.computed_from(value) if graphs.is_constant(item)}
