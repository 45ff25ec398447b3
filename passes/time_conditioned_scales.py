"""Scales of activations that follow the step of the sampler, found by the graph from its timestep."""

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
from onnxq.diffusion.step_lookup import constant, step_index
from onnxq.errors import OnnxqError
from onnxq.passes.insert_qdq import CLIP, FORMAT, spec_of

Array = np.ndarray[Any, Any]

METADATA = "scale_timesteps"
FORMS = ("simulation", "rescale", "constant")


@dataclasses.dataclass(frozen=True)
class Conditionable:
    """A quantizer whose scale may follow the time.

    Attributes:
        clip: The Clip that narrows an odd width, if there is one.
        quantize: Its QuantizeLinear.
        dequantize: All DequantizeLinear that read the codes.
        readers: The products that read it, all of them bias-free or with a constant bias.
    """

    clip: ir.Node | None
    quantize: ir.Node
    dequantize: tuple[ir.Node, ...]
    readers: tuple[ir.Node, ...]

    @property
    def value(self) -> ir.Value:
        """What it quantizes."""
        value = (self.clip or self.quantize).inputs[0]
        if value is None:
            raise ValueError(f"{self.quantize.name} quantizes nothing")
        return value


def conditionable(graph: ir.Graph) -> dict[str, Conditionable]:
    """Quantizers whose values only products read, by the name of the scale that they have alone.

    A factor before the quantizer is taken back behind a product, for a product is linear; behind anything else it is
    not. A scale that several quantizers share has to stay one.
    """
    found: dict[str, Conditionable] = {}
    for node in graph:
        if not graphs.is_quantize(node) or FORMAT not in node.metadata_props or graphs.is_constant(node.inputs[0]):
            continue
        item = _conditionable(node)
        if item is not None:
            found[node.inputs[1].name or ""] = item  # type: ignore[union-attr]
    return found


def _conditionable(node: ir.Node) -> Conditionable | None:
    value, scale = node.inputs[0], node.inputs[1]
    users = [user for user, _ in graphs.consumers(node.outputs[0])]
    number_format = spec_of(node).format
    if value is None or scale is None or scale.const_value is None or scale.const_value.size != 1:
        return None
    if number_format.is_float or not users or not all(graphs.is_dequantize(user) for user in users):
        return None
    if {user for user, _ in graphs.consumers(scale)} != {node, *users}:
        return None
    clip = value.producer()
    if clip is not None and CLIP in clip.metadata_props:
        value = clip.inputs[0]
    else:
        clip = None
    if value is None or graphs.rank(value) in (None, 0) or node.outputs[0].is_graph_output():
        return None
    readers = []
    for user in users:
        uses = graphs.consumers(user.outputs[0])
        if user.outputs[0].is_graph_output() or not uses or not all(_takes_back(*use, value) for use in uses):
            return None
        readers += [reader for reader, _ in uses]
    return Conditionable(clip, node, tuple(users), tuple(dict.fromkeys(readers)))


def _takes_back(node: ir.Node, index: int, value: ir.Value) -> bool:
    """Whether a factor of this input is one of the node's output, sample by sample."""
    if not graphs.is_op(node, "Conv", "Gemm", "MatMul") or index > 1 or (node.op_type != "MatMul" and index > 0):
        return False
    if graphs.rank(node.outputs[0]) not in (None, graphs.rank(value)):
        return False
    if node.op_type == "MatMul":
        ranks = [graphs.rank(operand) for operand in node.inputs if operand is not None]
        return all(item is not None and item >= 2 for item in ranks) and max(ranks) == graphs.rank(value)  # type: ignore[type-var]
    transposed, factor = node.attributes.get_int("transA", 0), node.attributes.get_float("beta", 1.0)
    if node.op_type == "Gemm" and (transposed or factor != 1):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or (graphs.is_constant(bias) and (node.op_type == "Conv" or graphs.rank(bias) in (1, 2)))


class TimeConditionedScales(InPlacePass):
    """Give activation quantizers a scale for each step of the sampler.

    Before::

        x ─► Q(s) ─► DQ(s) ─► Conv(W, b)

    After, in the form ``simulation``, for onnxruntime and torch::

        timestep ─► nearest step ─► Gather(table of s) ─┬──────┐
                                           x ─► Q(s_t) ─► DQ(s_t) ─► Conv(W, b)

    in the form ``rescale``, for compilers that want scales to be constant::

        timestep ─► nearest step ─► Gather(table of s/s_t, s_t/s) ─► Split ─┬─────────────────────────┐
                                                                   x ─► Mul ─► Q(s) ─► DQ(s) ─► Conv(W) ─► Mul ─► Add(b)

    (one Gather and one Split for the factors of the whole graph: a node of its own for each costs more than what it
    does), and in the form ``constant`` the scales of a single step are written into Q and DQ.

    All forms make the same codes: exactly where scales are apart by powers of two, and otherwise but for values that
    fall within float32's rounding of the middle between two codes. The model keeps its interface: the step is looked
    up from the timestep, one that the sampler does not visit gets the nearest. Every sample of a batch has its own
    scale, so that batches may mix timesteps; with a timestep of rank 0 or of one element the batch shares it.

    Args:
        timestep: Name of the input.
        timesteps: Of the sampler's steps.
        tables: Scales by step [steps], by the name of the scale that they replace (see :func:`conditionable`).
        form: ``simulation``, ``rescale`` or ``constant``.
        step: For ``constant``: which step's scales.
    """

    def __init__(
        self,
        timestep: str,
        timesteps: Sequence[float],
        tables: Mapping[str, Array],
        form: str = "simulation",
        step: int = 0,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise OnnxqError(f"expected a form of {', '.join(FORMS)}, found {form!r}", hint="use simulation")
        self.timestep, self.timesteps, self.form, self.step = timestep, list(timesteps), form, step
        self.tables = {name: np.asarray(table, np.float64) for name, table in tables.items()}
        for name, table in self.tables.items():
            if table.shape != (len(self.timesteps),) or not (np.isfinite(table).all() and (table > 0).all()):
                raise OnnxqError(
                    f"expected {len(self.timesteps)} positive scales for {name!r}, found shape {list(table.shape)}",
                    hint="one for each step of the sampler",
                )

    def call(self, model: ir.Model) -> PassResult:
        """Replace the scales; those that do not change over the steps stay constants."""
        graph = model.graph
        found = conditionable(graph)
        chosen = {name: table for name, table in self.tables.items() if name in found}
        moving = {name: table for name, table in chosen.items() if np.ptp(table) > 0 and self.form != "constant"}
        for name, table in chosen.items():
            if name not in moving:
                _set_constant(graph, found[name], float(table[self.step]))
        if moving:
            index = self._index(graph)
            if self.form == "simulation":
                for name, table in moving.items():
                    _simulate(graph, found[name], table, index)
            else:
                _rescale_all(graph, {name: found[name] for name in moving}, moving, index)
            common_passes.RemoveUnusedNodesPass()(model)
            models.set_metadata(model, **{METADATA: json.dumps(self.timesteps)})
        return PassResult(model, bool(chosen))

    def _index(self, graph: ir.Graph) -> ir.Value:
        index = step_index(graph, self.timestep, np.asarray(self.timesteps))
        source = graphs.input_named(graph, self.timestep)
        if source.shape is None or list(source.shape) != [1]:
            return index
        tape = ir.tape.Tape()  # one number for the batch, whatever size that is
        single = tape.op("Squeeze", [index])
        tape.nodes[0].name, single.name = "step_index_Squeeze", "step_index_single"
        single.shape, single.type = ir.Shape(()), index.type
        graph.insert_after(index.producer(), tape.nodes)  # type: ignore[arg-type]
        return single


def _dtype(item: Conditionable) -> np.dtype[Any]:
    dtype = item.quantize.inputs[1].dtype  # type: ignore[union-attr]
    assert dtype is not None
    return dtype.numpy()


def _set_constant(graph: ir.Graph, item: Conditionable, scale: float) -> None:
    """One scale for all steps."""
    value, zero_point = item.quantize.inputs[1:3]
    assert value is not None and value.name is not None and value.const_value is not None
    value.const_value = ir.tensor(np.full(value.const_value.shape.numpy(), scale, _dtype(item)), name=value.name)
    if item.clip is not None:
        low, high = _bounds(item, np.asarray(scale), zero_point)
        for index, bound in ((1, low), (2, high)):
            name = f"{item.quantize.name}_bound_{index}"
            if name in graph.initializers:
                graph.initializers[name].const_value = ir.tensor(bound.astype(_dtype(item)), name=name)
            else:
                item.clip.replace_input_with(index, constant(graph, name, bound.astype(_dtype(item))))


def _bounds(item: Conditionable, scales: Array, zero_point: ir.Value | None) -> tuple[Array, Array]:
    """Where the codes of a narrow format end."""
    assert zero_point is not None and zero_point.const_value is not None
    number_format = spec_of(item.quantize).format
    middle = float(zero_point.const_value.numpy())
    return (number_format.low - middle) * scales, (number_format.high - middle) * scales


class _Tape:
    """New nodes for one quantizer, named after it."""

    def __init__(self, graph: ir.Graph, item: Conditionable, index: ir.Value) -> None:
        self.graph, self.item, self.index = graph, item, index
        self.prefix = item.quantize.name or item.value.name or ""
        self.tape = ir.tape.Tape()

    def table(self, kind: str, rows: Array, rank: int) -> ir.Value:
        """The row of this run's step, for each sample: [samples, 1, …] of some rank."""
        rows = rows.reshape(-1, *[1] * (rank - 1))
        return self.op(kind, "Gather", [constant(self.graph, f"{self.prefix}_{kind}_table", rows), self.index])

    def op(self, kind: str, op_type: str, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """A node with one output."""
        value = self.tape.op(op_type, inputs)
        node = self.tape.nodes[-1]
        node.name, value.name = f"{self.prefix}_{kind}_{op_type}", f"{self.prefix}_{kind}"
        if op_type != "Gather":
            value.type, value.shape = self.item.value.type, self.item.value.shape
        else:
            value.type = inputs[0].type  # type: ignore[union-attr]
            value.shape = ir.Shape([*(self.index.shape or ()), *(inputs[0].shape or ())[1:]])  # type: ignore[union-attr]
        return value


def _simulate(graph: ir.Graph, item: Conditionable, table: Array, index: ir.Value) -> None:
    tape = _Tape(graph, item, index)
    zero_point = item.quantize.inputs[2]
    assert zero_point is not None and zero_point.const_value is not None
    dtype, rank = _dtype(item), graphs.rank(item.value) or 1
    scale = tape.table("scale", table.astype(dtype), 1)
    codes = np.full(len(table), zero_point.const_value.numpy())
    zero = tape.table("zero_point", codes, 1)
    source = item.value
    if item.clip is not None:
        low, high = _bounds(item, table, zero_point)
        per_sample = rank if index.shape else 1  # of one number for the batch nothing has to be spread
        lowest = tape.table("low", low.astype(dtype), per_sample)
        highest = tape.table("high", high.astype(dtype), per_sample)
        source = tape.op("clipped_high", "Min", [source, highest])
        source = tape.op("clipped", "Max", [source, lowest])
    graph.insert_before(item.quantize, tape.tape.nodes)
    item.quantize.replace_input_with(0, source)
    for node in (item.quantize, *item.dequantize):
        node.replace_input_with(1, scale)
        node.replace_input_with(2, zero)
        if index.shape:
            node.attributes["axis"] = ir.AttrInt64("axis", 0)


def _rescale_all(
    graph: ir.Graph, items: Mapping[str, Conditionable], tables: Mapping[str, Array], index: ir.Value
) -> None:
    # The reference is one of the scales: where they are powers of two apart, so are the factors.
    references = {name: float(np.sort(table)[len(table) // 2]) for name, table in tables.items()}
    alike: dict[tuple[int, np.dtype[Any]], list[str]] = {}
    for name, item in items.items():
        alike.setdefault((graphs.rank(item.value) or 2, _dtype(item)), []).append(name)
    for (rank, dtype), names in alike.items():
        pairs = [rows for name in names for rows in (references[name] / tables[name], tables[name] / references[name])]
        factors = _factors(graph, np.stack(pairs, axis=1).astype(dtype), rank, index)
        for name, factor, inverse in zip(names, factors[::2], factors[1::2], strict=True):
            _rescale(graph, items[name], references[name], factor, inverse)


def _factors(graph: ir.Graph, table: Array, rank: int, index: ir.Value) -> Sequence[ir.Value]:
    """This run's factors, one value of a rank for each column of a table [steps, factors]."""
    prefix, count = f"step_factors_{rank}_{table.dtype}", table.shape[1]
    axis = len(index.shape or ())  # samples come before factors, if each sample has a step of its own
    rows = constant(graph, f"{prefix}_table", table.reshape(*table.shape, *[1] * (rank - 1 - axis)))
    tape = ir.tape.Tape()
    gathered = tape.op("Gather", [rows, index])
    gathered.shape = ir.Shape([*(index.shape or ()), *rows.shape[1:]])  # type: ignore[index]
    split = tape.op_multi_out("Split", [gathered], {"axis": axis, "num_outputs": count}, num_outputs=count)
    for node in tape.nodes:
        node.name = f"{prefix}_{node.op_type}"
    for position, value in enumerate((gathered, *split)):
        value.name, value.type = f"{prefix}_{position}", rows.type
    for value in split:
        value.shape = ir.Shape([*(index.shape or (1,)), *[1] * (rank - 1)])
    graph.insert_after(index.producer(), tape.nodes)  # type: ignore[arg-type]
    return split


def _rescale(graph: ir.Graph, item: Conditionable, reference: float, factor: ir.Value, inverse: ir.Value) -> None:
    _set_constant(graph, item, reference)
    first, tape = item.clip or item.quantize, ir.tape.Tape()
    scaled = tape.op("Mul", [item.value, factor])
    scaled.name, tape.nodes[0].name = f"{item.quantize.name}_scaled", f"{item.quantize.name}_scaled_Mul"
    scaled.type, scaled.shape = item.value.type, item.value.shape
    graph.insert_before(first, tape.nodes)
    first.replace_input_with(0, scaled)
    for reader in item.readers:
        for _ in range(sum(operand in {node.outputs[0] for node in item.dequantize} for operand in reader.inputs)):
            _take_back(graph, reader, inverse)


def _take_back(graph: ir.Graph, node: ir.Node, inverse: ir.Value) -> None:
    """Multiply a product's output, without its bias, and add the bias behind."""
    output, tape = node.outputs[0], ir.tape.Tape()
    uses = [(reader, index) for reader, index in graphs.consumers(output)]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    result = tape.op("Mul", [output, inverse])
    result.name = f"{output.name}_rescaled"
    if bias is not None:
        assert bias.const_value is not None
        array = bias.const_value.numpy()
        if node.op_type == "Conv":
            dimensions = graphs.rank(output) or graphs.rank(node.inputs[0]) or 4  # type: ignore[arg-type]
            array = array.reshape(1, -1, *[1] * (dimensions - 2))
        name = f"{node.name}_bias"
        while name in graph.initializers:
            name += "_"
        result = tape.op("Add", [result, constant(graph, name, array)])
        result.name = f"{output.name}_biased"
        node.resize_inputs(2)
    for new in tape.nodes:
        new.outputs[0].type, new.outputs[0].shape = output.type, output.shape
    graph.insert_after(node, tape.nodes)
    output.name, result.name = f"{output.name}_scaled", output.name  # what is read keeps the name that it has
    for new in tape.nodes:
        new.name = f"{new.outputs[0].name}_{new.op_type}"
    if output.is_graph_output():
        position = next(index for index, value in enumerate(graph.outputs) if value is output)
        graph.outputs[position] = result
    for reader, index in uses:
        reader.replace_input_with(index, result)
