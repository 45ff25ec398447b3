"""Scales by step of the sampler: from statistics to tables, and from tables to a graph, or to one for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.calibration import timesteps
from onnxq.calibration.observers import Observer
from onnxq.calibration.timesteps import StepStatistics
from onnxq.diffusion.partition import ScaleCosts, check_groups, optimal, scale_costs, uniform
from onnxq.diffusion.subgraphs import Subgraph
from onnxq.diffusion.trajectory import Sampler
from onnxq.job import Job
from onnxq.passes.insert_qdq import STATISTICS, spec_of
from onnxq.passes.time_conditioned_scales import TimeConditionedScales, conditionable
from onnxq.runtime import Session
from onnxq.targets.cpu_ops import ABSORBED

Array = np.ndarray[Any, Any]

LOWERINGS = ("rescale", "subgraphs", "none")
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class TimeScales:
    """How steps are grouped, and what scales they get.

    Attributes:
        costs: What each step loses with which scale, by the name of the scale that is replaced.
        groups: The group of each step [steps], by the same name.
    """

    costs: Mapping[str, ScaleCosts]
    groups: Mapping[str, Array]

    @property
    def tables(self) -> dict[str, Array]:
        """Scales [steps], by the name of the scale that they replace."""
        return {name: self.costs[name].table(groups) for name, groups in self.groups.items()}

    def paying(self, least_gain_db: float) -> TimeScales:
        """Only those whose error falls by so much against one scale for all steps: each costs some time to run."""
        kept = {}
        for name, groups in self.groups.items():
            table, static = self.costs[name].table(groups), float(self.costs[name].costs[:, 0].sum())
            moves = np.ptp(table) > 0
            if moves and 0 < self.costs[name].error(table) <= static * 10 ** (-least_gain_db / 10):
                kept[name] = groups
        return TimeScales({name: self.costs[name] for name in kept}, kept)

    def keeping_kernels(self, graph: ir.Graph) -> TimeScales:
        """Without those whose factor, behind a product, would come between it and its output's quantizer.

        onnxruntime makes one integer kernel of a product and the pairs around it, and a float one where anything else
        stands between: a convolution that is three times as slow, for one scale.
        """
        found = conditionable(graph)
        kept = {
            name: groups
            for name, groups in self.groups.items()
            if not any(_is_quantized(reader.outputs[0]) for reader in found[name].readers)
        }
        return TimeScales({name: self.costs[name] for name in kept}, kept)

    @property
    def error(self) -> float:
        """The sum over layers and steps of the squared error as part of the mean square."""
        return sum(self.costs[name].error(table) for name, table in self.tables.items())


def _is_quantized(value: ir.Value) -> bool:
    """Whether the only thing that reads a value is a quantizer, but for what that absorbs."""
    readers = graphs.consumers(value)
    if len(readers) == 1 and graphs.is_op(readers[0][0], *ABSORBED):
        readers = graphs.consumers(readers[0][0].outputs[0])
    return bool(readers) and all(graphs.is_quantize(reader) for reader, _ in readers)


def moving_scales(job: Job, scales: TimeScales, least_gain_db: float) -> TimeScales:
    """Those that get a factor by step: which gain enough, and cost no integer kernel where the target's are fused."""
    paying = scales.paying(least_gain_db)
    if job.target.name != "cpu":
        return paying
    kept = paying.keeping_kernels(job.model.graph)
    if lost := len(paying.groups) - len(kept.groups):
        job.warnings.append(
            f"{lost} activations keep one scale for all steps: a factor behind their layers would make these float in "
            "onnxruntime; with --recipe apq-dm --set lowering=subgraphs they have one for each group of steps"
        )
    return kept


def record(job: Job) -> dict[str, StepStatistics]:
    """Statistics of each step of what will be quantized, before :meth:`Job.insert`."""
    names = sorted(job.place(job.model.graph).ranged)
    inputs = {spec.name for spec in job.specs}
    session = Session(job.model, taps=[name for name in names if name not in inputs], device=job.settings.device)
    total = min(len(job.source), job.settings.samples or len(job.source))
    with job.progress.stage("steps", "Looking at steps", total) as advance:
        return timesteps.record(session, names, job.source, job.specs, samples=total, on_batch=advance)


def scales_by_step(
    job: Job,
    statistics: Mapping[str, StepStatistics],
    sampler: Sampler,
    observer: Observer,
    *,
    groups: int,
    partition: str = "optimal",
    scope: str = "layer",
    powers_of_two: bool = False,
) -> TimeScales:
    """Group the steps, for each activation quantizer of a calibrated graph that can follow the time.

    Args:
        job: Behind :meth:`Job.insert`, with static scales.
        statistics: Of :func:`record`.
        sampler: Whose steps.
        observer: How a range follows from the statistics of a step.
        groups: How many.
        partition: ``optimal`` or ``uniform``.
        scope: ``layer``: each quantizer has groups of its own; ``global``: all have the same.
        powers_of_two: Whether scales are powers of two apart.

    Raises:
        OnnxqError: there are not as many steps as groups.
    """
    steps = len(sampler.schedule.timesteps)
    check_groups(steps, groups)
    costs = {}
    for name, item in conditionable(job.model.graph).items():
        root, spec = item.quantize.metadata_props[STATISTICS], spec_of(item.quantize)
        scale, zero_point = item.quantize.inputs[1:3]
        if root not in statistics or scale is None or zero_point is None:
            continue
        assert scale.const_value is not None and zero_point.const_value is not None
        costs[name] = scale_costs(
            statistics[root],
            steps,
            spec.format,
            float(scale.const_value.numpy()),
            float(zero_point.const_value.numpy()),
            observer,
            symmetric=spec.symmetric,
            powers_of_two=powers_of_two,
        )
    if partition == "uniform":
        return TimeScales(costs, dict.fromkeys(costs, uniform(steps, groups)))
    if scope == "global" and costs:
        return TimeScales(costs, dict.fromkeys(costs, optimal(list(costs.values()), groups)))
    return TimeScales(costs, {name: optimal([item], groups) for name, item in costs.items()})


def by_value(graph: ir.Graph, tables: Mapping[str, Array]) -> dict[str, list[float]]:
    """The tables of a calibrated graph by the names of the activations that are quantized, for a report."""
    found = conditionable(graph)
    return {found[name].quantize.metadata_props[STATISTICS]: table.tolist() for name, table in tables.items()}


def lower(job: Job, sampler: Sampler, tables: Mapping[str, Array], lowering: str) -> None:
    """Write scales by step into a graph that is lowered already, in the form that the target runs.

    Args:
        job: Behind :meth:`Job.lower`.
        sampler: Whose steps.
        tables: Scales [steps] by the name of the scale that they replace.
        lowering: ``rescale``: one graph with constant scales and a factor by step before and behind; ``subgraphs``:
            one graph for each group, besides one with scales looked up; ``none``: that one alone.
    """
    timestep, times = sampler.denoiser.timestep.name, sampler.schedule.timesteps
    if lowering == "rescale":
        TimeConditionedScales(timestep, times, tables, "rescale")(job.model)
        job.lower()  # nothing is left to write; the lint is what matters
        return
    if lowering == "subgraphs":
        for members in _runs(tables, len(times)):
            part = job.model.clone()
            TimeConditionedScales(timestep, times, tables, "constant", members[0])(part)
            job.subgraphs.append(Subgraph(part, tuple(members), tuple(times[step] for step in members)))
    if job.target.name != "cpu":
        job.warnings.append(
            "the scales of the main file are looked up by the step, which onnxruntime runs and TensorRT does not; "
            + ("build the files of the groups" if lowering == "subgraphs" else "for TensorRT use lowering=rescale")
        )
    TimeConditionedScales(timestep, times, tables)(job.model)


def _runs(tables: Mapping[str, Array], steps: int) -> Sequence[list[int]]:
    """Steps that have all scales in common."""
    rows: dict[tuple[float, ...], list[int]] = {}
    for step in range(steps):
        rows.setdefault(tuple(float(table[step]) for table in tables.values()), []).append(step)
    return list(rows.values())
