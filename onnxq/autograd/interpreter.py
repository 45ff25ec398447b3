"""Run an ONNX graph, or any region of it, in torch with gradients.

The graph is not converted: its nodes run one by one through the table of :mod:`onnxq.autograd.ops`, so that values
keep the names they have in the file. Float initializers are tensors that an optimiser may change in place and
:meth:`TorchGraph.write_back` stores by name. QuantizeLinear rounds with a straight-through gradient, so a Q/DQ graph
trains as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxq import cuda, dynamic_fp4
from onnxq import graph as graphs
from onnxq.autograd.ops import OPS, takes_outputs
from onnxq.autograd.ops.operands import TORCH_TYPES, to_torch
from onnxq.autograd.ops.quantization import quantize_blocks
from onnxq.errors import LESS_MEMORY, OnnxqError, ran_out_of_memory
from onnxq.passes.expand_attention import with_attention_apart

PLANS_KEPT = 64
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Replacement:
    """A value computed in another way than by its node.

    Attributes:
        sources: The values that ``function`` reads; may be empty.
        function: From the sources to the value.
    """

    sources: tuple[str, ...]
    function: Callable[..., Tensor]


@dataclass(frozen=True)
class _Step:
    """One node, ready to run: its function, where its operands are, and what nothing reads after it."""

    function: Callable[..., Any]
    attributes: Mapping[str, Any]
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    finished: tuple[str, ...]
    label: str


class TorchGraph:
    """An ONNX graph that torch runs.

    Args:
        model: The graph, in the form of :func:`onnxq.model.load` (opset 18 or later).
        device: Where tensors live, ``cpu`` or ``cuda``; integers that describe shapes stay on the CPU.
        in_half: Whether what the graph computes in float16 or bfloat16 is computed so here. In float32 gradients of
            small numbers are not lost, and learned scales and roundings meet weights of their own precision.

    Attributes:
        parameters: Float initializers by name, made when they are first needed. They ask for no gradient until
            :meth:`trainable` says so.
        shared: Where samples have to run one by one, because an input without a batch axis differs between them, as a
            single timestep does: the names of given values that are the same for all of them. ``None``: samples run
            together.
    """

    def __init__(self, model: ir.Model, device: str = "cpu", *, in_half: bool = False) -> None:
        self.model, self._in_half = model, in_half
        self.device = torch.device(device)
        if self.device.type == "cuda":
            cuda.prepare_torch()
        self.parameters: dict[str, Tensor] = {}
        self.shared: set[str] | None = None
        self._each: dict[str, int] = {}  # rows of one sample, where samples run one by one; 0: not even an axis
        self.input_names = [value.name or "" for value in model.graph.inputs if not value.is_initializer()]
        self.output_names = [value.name or "" for value in model.graph.outputs]
        self._constants: dict[str, Tensor] = {}
        graph = with_attention_apart(model).graph
        self._nodes = list(graph)
        self._values = graphs.values(graph)
        self._plans: dict[Hashable, list[_Step]] = {}

    def run(
        self,
        given: Mapping[str, Tensor],
        wanted: Iterable[str],
        *,
        replaced: Mapping[str, Replacement] | None = None,
    ) -> dict[str, Tensor]:
        """Compute values from other values; nodes that are not needed in between do not run.

        Args:
            given: Known values by name: graph inputs, inner values, or initializers to run with another tensor, on
                any device. Their batch may differ from one that the export fixed: several of those run then, the
                last filled with repeated rows. What differs between samples that run one by one has an axis for
                them in front, if it has no batch axis.
            wanted: Names of the values to return.
            replaced: Values that are computed by a function instead of by their node.

        Returns:
            The wanted values by name.

        Raises:
            OnnxqError: a value or an input is missing, an op has no torch implementation, or a node fails.
        """
        names = tuple(wanted)
        replaced = replaced or {}
        given = {name: self._placed(tensor) for name, tensor in given.items()}
        chunks = self._chunks(given)
        if not chunks:
            return self._run(given, names, replaced)
        rest = {name: tensor for name, tensor in given.items() if name not in chunks}

        def one(chunk: dict[str, Tensor]) -> dict[str, Tensor]:
            return self._run(rest | chunk, names, replaced)

        found = torch.func.vmap(one, randomness="different")(chunks)
        first, chunk = next(iter(chunks.items()))
        rows, total = len(given[first]), math.prod(chunk.shape[:2])
        if self.shared is not None:  # nothing was filled up
            self._each |= {name: value.shape[1] if value.ndim > 1 else 0 for name, value in found.items()}
            rows = total

        def joined(value: Tensor) -> Tensor:
            """All rows of a value, of which there may be several for each sample."""
            return value.flatten(0, 1)[: math.prod(value.shape[:2]) * rows // total] if value.ndim > 1 else value

        return {name: joined(value) for name, value in found.items()}

    def runs(self, given: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """What a runtime that has no other batch than the graph's is given instead, run by run (see :meth:`run`)."""
        chunks = self._chunks(given)
        rest = {name: tensor for name, tensor in given.items() if name not in chunks}
        for index in range(len(next(iter(chunks.values()))) if chunks else 1):
            yield rest | {name: chunk[index] for name, chunk in chunks.items()}

    def _samples(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a value, laid out as samples [samples, …] of the graph's own shape."""
        if name not in self.input_names:
            each = self._each.get(name, 1)
            return rows.reshape(-1, each, *rows.shape[1:]) if each else rows
        declared = self._values[name].shape
        if declared is None or rows.ndim > len(declared):
            return rows
        batch = declared[0] if isinstance(declared[0], int) else 1  # one that the export fixed has equal rows
        return rows[:, None].expand(len(rows), batch, *rows.shape[1:])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The graph's outputs for its inputs, in their order."""
        return tuple(self.run(dict(zip(self.input_names, inputs, strict=True)), self.output_names).values())

    def trainable(self, names: Iterable[str]) -> list[Tensor]:
        """The named float initializers, as tensors that collect gradients.

        Raises:
            OnnxqError: one of them is not a float initializer.
        """
        tensors = []
        for name in names:
            tensor = self._initializer(name)
            if name not in self.parameters:
                raise OnnxqError(f"expected a float initializer to train, found {name!r}", hint="check its name")
            tensors.append(tensor.requires_grad_(True))
        return tensors

    def write_back(self, names: Iterable[str] | None = None) -> None:
        """Store parameters (all that were made, if none are named) in the model's initializers."""
        for name in self.parameters if names is None else names:
            value = self.model.graph.initializers[name]
            assert value.dtype is not None
            array = self.parameters[name].detach().cpu().to(torch.float32).numpy().astype(value.dtype.numpy())
            value.const_value = ir.Tensor(np.ascontiguousarray(array), dtype=value.dtype, name=name)

    def reload(self, names: Iterable[str]) -> None:
        """Forget what was read of the named initializers, because the model has new ones."""
        for name in names:
            self.parameters.pop(name, None)
            self._constants.pop(name, None)

    def _run(
        self, given: Mapping[str, Tensor], wanted: tuple[str, ...], replaced: Mapping[str, Replacement]
    ) -> dict[str, Tensor]:
        alive: dict[str | None, Tensor | None] = {None: None}
        alive.update(given)
        for step in self._plan(given, wanted, replaced):
            for name in step.inputs:
                if name not in alive:
                    alive[name] = self._initializer(name or "")
            function = replaced[step.outputs[0]].function if step.outputs[0] in replaced else step.function
            try:
                result = function(*self._together([alive[name] for name in step.inputs]), **step.attributes)
            except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError) as error:
                hint = "check the shapes that the data gives it; an op or attribute may not be supported here"
                raise OnnxqError(
                    f"expected {step.label} to run in torch, found: {' '.join(str(error).split())[:300]}",
                    hint=LESS_MEMORY if ran_out_of_memory(error) else hint,
                ) from error
            if isinstance(result, Tensor):
                alive[step.outputs[0]] = self._moved(result)
            else:
                alive.update(zip(step.outputs, map(self._moved, result), strict=False))
            for name in step.finished:
                alive.pop(name, None)  # a node may give fewer outputs than it names
        found = {}
        for name in wanted:
            if name not in alive:
                alive[name] = self._initializer(name)
            found[name] = self._as_declared(name, alive[name])
        return found

    def _plan(
        self, given: Mapping[str, Tensor], wanted: tuple[str, ...], replaced: Mapping[str, Replacement]
    ) -> list[_Step]:
        key = (frozenset(given), wanted, frozenset((name, item.sources) for name, item in replaced.items()))
        if key not in self._plans:
            while len(self._plans) >= PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = list(self._planned(frozenset(given), wanted, replaced))
        return self._plans[key]

    def _planned(
        self, given: Collection[str], wanted: tuple[str, ...], replaced: Mapping[str, Replacement]
    ) -> Iterator[_Step]:
        """The steps between the given and the wanted values, in order, each with what may be freed after it."""
        needed = set(wanted) - set(given)
        chosen: list[tuple[ir.Node, tuple[str | None, ...], tuple[str, ...]]] = []
        for node in reversed(self._nodes):
            outputs = tuple(value.name or "" for value in node.outputs)
            if not needed.intersection(outputs):
                continue
            if outputs[0] in replaced:
                inputs: tuple[str | None, ...] = replaced[outputs[0]].sources
            else:
                inputs = tuple(None if value is None else value.name for value in node.inputs)
            needed.difference_update(outputs)
            needed.update(name for name in inputs if name is not None and name not in given)
            chosen.append((node, inputs, outputs))
        missing = sorted(name for name in needed if not graphs.is_constant(self._values.get(name)))
        if missing:
            raise OnnxqError(
                f"expected {', '.join(map(repr, missing[:3]))} to be given or computed, found neither",
                hint="give every input that the wanted values depend on",
            )
        chosen.reverse()
        last = {name: index for index, (_, inputs, _) in enumerate(chosen) for name in inputs if name is not None}
        keep = set(wanted)
        for index, (node, inputs, outputs) in enumerate(chosen):
            finished = {name for name in inputs if name is not None and last[name] == index and name not in keep}
            finished |= {name for name in outputs if name not in last and name not in keep}
            label = f"node {node.name!r} ({node.op_type})"
            if outputs[0] in replaced:
                yield _Step(replaced[outputs[0]].function, {}, inputs, outputs, tuple(sorted(finished)), label)
                continue
            function = OPS.get(node.op_type) if node.domain in graphs.ONNX_DOMAINS else None
            if dynamic_fp4.stands_for(node):
                function = quantize_blocks
            if function is None:
                raise OnnxqError(
                    f"expected ops that have a gradient here, found {node.domain or 'ONNX'} op {node.op_type} at node "
                    f"{node.name!r}",
                    hint="--recipe default needs no gradients; control flow has to be exported away",
                )
            attributes = self._attributes(node)
            if takes_outputs(function):
                attributes["outputs"] = len(outputs)
            yield _Step(function, attributes, inputs, outputs, tuple(sorted(finished)), label)

    def _attributes(self, node: ir.Node) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR:
                attributes[name] = self._placed(to_torch(attribute.value))
            else:
                attributes[name] = (
                    list(attribute.value)
                    if isinstance(attribute.value, Sequence) and not isinstance(attribute.value, str)
                    else attribute.value
                )
        if graphs.is_quantize(node):
            attributes["output_dtype"] = int(_code_type(node))  # torch has no 4-bit integers
        return attributes

    def _initializer(self, name: str) -> Tensor:
        if name in self.parameters:
            return self.parameters[name]
        if name in self._constants:
            return self._constants[name]
        value = self.model.graph.initializers.get(name, self._values.get(name))
        if value is None or value.const_value is None:
            raise OnnxqError(f"expected a value named {name!r} in the graph, found none", hint="check its name")
        tensor = to_torch(value.const_value)
        if tensor.is_floating_point():
            self.parameters[name] = self._placed(tensor)
            return self.parameters[name]
        self._constants[name] = self._placed(tensor)
        return self._constants[name]

    def _placed(self, tensor: Tensor) -> Tensor:
        """The tensor where it is used: integers that may describe shapes on the CPU, all else on the device."""
        return tensor if tensor.dtype == torch.int64 else self._widened(tensor.to(self.device))

    def _widened(self, tensor: Tensor) -> Tensor:
        """The tensor in float32, if it is half as wide and need not be."""
        return tensor.float() if tensor.dtype in HALVES and not self._in_half else tensor

    def _together(self, operands: list[Tensor | None]) -> list[Tensor | None]:
        """Operands of one node where it runs: on the device if one is there, but for integers, which it may read."""
        if self.device.type == "cpu" or all(one is None or one.device.type == "cpu" for one in operands):
            return operands
        return [None if one is None else self._placed(one) for one in operands]

    def _moved(self, result: Tensor) -> Tensor:
        """A node's result; floats that came of integers on the CPU, such as a time step, go to the device."""
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        return self._widened(result.to(self.device))

    def _as_declared(self, name: str, tensor: Any) -> Any:
        """Codes travel as floats between Q and DQ, to carry gradients; whoever asks for them gets integers."""
        value = self._values.get(name)
        producer = None if value is None else value.producer()
        if producer is None or not tensor.is_floating_point():
            return tensor
        if graphs.is_op(producer, "DynamicQuantizeLinear") and value is not producer.outputs[1]:
            return tensor.to(torch.uint8)
        return tensor.to(TORCH_TYPES[_code_type(producer)]) if graphs.is_quantize(producer) else tensor

    def _chunks(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Given values laid out as runs [runs, …], of what has rows; none where all rows go into one run."""
        if self.shared is None:
            return {
                name: _filled(given[name], size).reshape(-1, size, *given[name].shape[1:])
                for name, size in self._batched(given).items()
            }
        return {
            name: self._samples(name, tensor)
            for name, tensor in given.items()
            if name not in self.shared and not graphs.is_constant(self._values.get(name))
        }

    def _batched(self, given: Mapping[str, Tensor]) -> dict[str, int]:
        """Given values whose batch is not the one that the export fixed, and that fixed batch."""
        found: dict[str, int] = {}
        for name, tensor in given.items():
            value = self._values.get(name)
            declared = None if value is None or value.is_initializer() or not value.shape else value.shape[0]
            if not isinstance(declared, int) or not tensor.ndim or tensor.shape[0] == declared:
                continue
            if declared < 1 or not len(tensor):
                raise OnnxqError(
                    f"expected rows in batches of {declared} for {name!r}, found {len(tensor)}",
                    hint="export the model with a free batch",
                )
            found[name] = declared
        return found


def _filled(tensor: Tensor, size: int) -> Tensor:
    """The tensor with rows that repeat its last one, to a multiple of ``size``."""
    missing = -len(tensor) % size
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


def _code_type(node: ir.Node) -> ir.DataType:
    """The type of the codes that a QuantizeLinear makes."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
