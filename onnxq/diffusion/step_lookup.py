"""Which step of the sampler a run belongs to, found by the graph itself from its timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs

Array = np.ndarray[Any, Any]

NAME = "step_index"


def step_index(graph: ir.Graph, timestep: str, timesteps: Array) -> ir.Value:
    """A value of the graph that holds the position of the nearest scheduled timestep.

    The model keeps its interface: nobody has to count steps. A timestep that no row belongs to gets the nearest row.
    Asked again for the same timesteps, the graph answers with the value that it has.

    Args:
        graph: The denoiser; its first nodes will compute the index.
        timestep: The input, an integer or float of rank 0 or 1.
        timesteps: What the network is told in each step of the sampler [steps].

    Returns:
        int64 of the timestep's shape.
    """
    rows = np.asarray(timesteps, np.float32)
    values, number = graphs.values(graph), 0
    while (name := f"{NAME}_{number}" if number else NAME) in values:
        known = graph.initializers.get(f"{name}_timesteps")
        if known is not None and known.const_value is not None and np.array_equal(known.const_value.numpy(), rows):
            return values[name]
        number += 1
    table, last = constant(graph, f"{name}_timesteps", rows), constant(graph, f"{name}_axis", np.asarray([-1]))
    source = graphs.input_named(graph, timestep)
    tape = ir.tape.Tape()
    column = tape.op("Unsqueeze", [tape.op("Cast", [source], {"to": ir.DataType.FLOAT}), last])
    distance = tape.op("Abs", [tape.op("Sub", [column, table])])
    index = tape.op("ArgMin", [distance], {"axis": -1, "keepdims": 0})
    for node in tape.nodes:
        node.name = f"{name}_{node.op_type}"
        node.outputs[0].name = f"{name}_{node.op_type.lower()}"
    index.name, index.shape, index.type = name, source.shape, ir.TensorType(ir.DataType.INT64)
    insert_first(graph, tape.nodes)
    return index


def constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new initializer."""
    value = ir.Value(name=name, shape=ir.Shape(array.shape))
    value.const_value = ir.tensor(array, name=name)
    value.type = ir.TensorType(value.const_value.dtype)
    graph.register_initializer(value)
    return value


def insert_first(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Put nodes that read only inputs and constants before all others."""
    graph.insert_before(graph[0], nodes)
