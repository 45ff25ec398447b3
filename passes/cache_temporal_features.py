"""Replace what depends on the timestep alone by tables with a row for each step of the sampler."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import model as models
from onnxq.diffusion.denoiser import Condition, Denoiser
from onnxq.diffusion.step_lookup import constant, step_index
from onnxq.diffusion.temporal_region import find_region
from onnxq.diffusion.temporal_tables import FeatureTable, tabulate, worth_caching

Array = np.ndarray[Any, Any]

METADATA = "temporal_timesteps"


class CacheTemporalFeatures(InPlacePass):
    """Look temporal features up instead of computing them.

    Before::

        timestep ─► Sin, Cos ─► Gemm ─► SiLU ─► Gemm ─┬─► Gemm ─► Add (block 1)
                                                      └─► Gemm ─► Add (block 2)

    After::

        timestep ─► nearest step ─┬─► Gather (table 1) ─► Add (block 1)
                                  └─► Gather (table 2) ─► Add (block 2)

    At the sampler's timesteps the function is kept: the tables hold what onnxruntime computes for one sample. Any
    other timestep gets the row of the nearest one; which timesteps there are is written into the metadata
    (``onnxq.temporal_timesteps``). The region's weights leave the file. A model that has tables is left alone.

    Args:
        denoiser: The roles of the inputs.
        timesteps: Of the sampler's steps.
        labels: Whether what depends on timestep and class label together is tabulated too (a row for each pair).
        everything: Whether to tabulate where the tables are larger than the weights that they save.
        bytes_per_weight: What a weight takes in the quantized file.
        dtype: Of the tables; rounded to float16 they are half as large. ``None``: as computed.

    Attributes:
        cached: Names of the values that are looked up now.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        timesteps: Sequence[float],
        *,
        labels: bool = False,
        everything: bool = False,
        bytes_per_weight: float = 4.0,
        dtype: ir.DataType | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.timesteps, self.labels = denoiser, list(timesteps), labels
        self.everything, self.bytes_per_weight, self.dtype = everything, bytes_per_weight, dtype
        self.cached: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        """Replace the values whose tables are worth it."""
        labels = [item for item in self.denoiser.conditions if item.classes is not None and self.labels]
        for chosen in [labels, []] if labels else [[]]:  # pairs with labels may be too many where steps are not
            tables = self._tables(model, [item.spec.name for item in chosen])
            if tables and METADATA not in models.get_metadata(model):
                self.cached = list(tables)
                self._replace(model.graph, tables, chosen)
                common_passes.RemoveUnusedNodesPass()(model)
                models.set_metadata(model, **{METADATA: json.dumps(self.timesteps)})
                return PassResult(model, True)
        return PassResult(model, False)

    def _tables(self, model: ir.Model, labels: Sequence[str]) -> dict[str, FeatureTable]:
        region = find_region(model.graph, [self.denoiser.timestep.name, *labels])
        tables = tabulate(model, region.features, region.inputs, self.denoiser, self.timesteps)
        if self.dtype is not None:
            kept = self.dtype.numpy()
            tables = {name: dataclasses.replace(item, rows=item.rows.astype(kept)) for name, item in tables.items()}
        if self.everything:
            return tables
        pays = worth_caching(region, tables, bytes_per_weight=self.bytes_per_weight)
        return {name: tables[name] for name in pays}

    def _replace(self, graph: ir.Graph, tables: Mapping[str, FeatureTable], labels: Sequence[Condition]) -> None:
        values = graphs.values(graph)
        step = step_index(graph, self.denoiser.timestep.name, np.asarray(self.timesteps))
        tape = ir.tape.Tape()
        per_sample = step
        if not self.denoiser.timestep.shape and any(table.per_sample for table in tables.values()):
            per_sample = _repeated(graph, tape, step, values[self.denoiser.sample.name])
        sizes = [len(self.timesteps), *(item.classes or 1 for item in labels)]
        if labels:  # an index of two numbers: a label out of its range stays an error
            last = constant(graph, "temporal_last_axis", np.asarray([-1]))
            parts = [tape.op("Cast", [values[item.spec.name]], {"to": ir.DataType.INT64}) for item in labels]
            columns = [tape.op("Unsqueeze", [part, last]) for part in (per_sample, *parts)]
            per_sample = tape.op("Concat", columns, {"axis": -1})
        for name, table in tables.items():
            value = values[name]
            rows = constant(graph, f"{name}_table", table.rows.reshape(*sizes, *table.rows.shape[1:]))
            found = tape.op("GatherND" if labels else "Gather", [rows, per_sample if table.per_sample else step])
            if rows.dtype != table.dtype:
                found = tape.op("Cast", [found], {"to": table.dtype})
            found.name, found.shape, found.type = f"{name}_cached", value.shape, value.type
            for node, index in graphs.consumers(value):
                node.replace_input_with(index, found)
        for number, node in enumerate(tape.nodes):
            node.name = f"temporal_{node.op_type}_{number}"
            node.outputs[0].name = node.outputs[0].name or f"temporal_{number}"
        position = step.producer()
        assert position is not None
        graph.insert_after(position, tape.nodes)


def _repeated(graph: ir.Graph, tape: ir.tape.Tape, step: ir.Value, sample: ir.Value) -> ir.Value:
    """The step of the whole run, once for each sample."""
    start, end = constant(graph, "temporal_start", np.asarray([0])), constant(graph, "temporal_end", np.asarray([1]))
    count = tape.op("Slice", [tape.op("Shape", [sample]), start, end])
    return tape.op("Expand", [step, count])
