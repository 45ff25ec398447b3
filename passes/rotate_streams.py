"""Turn the channels of residual streams, so that no channel of theirs is an outlier; the function stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import array_of, new_initializer
from onnxq.passes.residual_stream import BrokenStreamError, Gain, Stream, explore, starts
from onnxq.rotation import Array, replace_constant, rotate_constant, rotation


class RotateStreams(InPlacePass):
    """Multiply residual streams by an orthogonal matrix Q, and the weights around them by Q and Qᵀ.

    Before::

        x ─► RMSNorm(g) ─► MatMul(W₁) ─► … ─► MatMul(W₂) ─► Add(x) ─► …

    After::

        x·Q ─► RMSNorm(1) ─► MatMul(Qᵀ·g·W₁) ─► … ─► MatMul(W₂·Q) ─► Add(x·Q) ─► …

    The factors and shifts of norms go into the layers behind them first. Where a norm subtracts the mean of the
    channels, Q maps the vector of ones to itself, so that no layer has to be centred. Shared weights (tied embeddings)
    are copied. A stream that is not closed (see :func:`onnxq.passes.residual_stream.explore`) stays as it is.

    Source: R1 of S. Ashkboos et al., QuaRot, NeurIPS 2024 (arXiv 2404.00456), section 4, and Z. Liu et al., SpinQuant,
    ICLR 2025 (arXiv 2405.16406). Departures: rotations are random, not learned; norms that subtract the mean keep it
    instead of being centred.

    Args:
        seed: Of the random matrices.

    Attributes:
        rotated: The widths of the streams that were turned.
        refused: Why others were not, one line each.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.rotated: list[int] = []
        self.refused: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        """Turn every stream that is closed."""
        seen: set[ir.Value] = set()
        for start in list(starts(model.graph)):
            if start in seen:
                continue
            try:
                stream = explore(start)
            except BrokenStreamError as error:
                if str(error) not in self.refused:
                    self.refused.append(str(error))
                continue
            seen |= stream.values
            self._rotate(model.graph, stream)
            self.rotated.append(stream.channels)
        return PassResult(model, bool(self.rotated))

    def _rotate(self, graph: ir.Graph, stream: Stream) -> None:
        for gain in stream.gains:
            _fold_gain(graph, gain)
        matrix = rotation(stream.channels, self.seed, keeps_mean=stream.has_means)
        for node, index, axis in dict.fromkeys(stream.written):
            rotate_constant(graph, node, index, axis, matrix)
        readers = {item.node: item for item in stream.readers}
        readers |= {item.node: item for gain in stream.gains for item in gain.readers}
        for value in stream.values | {value for gain in stream.gains for value in gain.values}:
            value.name = f"{value.name}_rotated"  # it is not what the float model calls by that name
        for item in readers.values():  # Qᵀ·W: along the axis of the sum, each row is multiplied by Q
            rotate_constant(graph, item.node, 1, item.reduction_axis, matrix)


def _fold_gain(graph: ir.Graph, gain: Gain) -> None:
    """Move a norm's factor into the weights behind it and its shift into their biases."""
    scale = array_of(gain.node.inputs[gain.scale_index]).astype(np.float64)
    for item in gain.readers:
        weight = np.moveaxis(array_of(item.weight).astype(np.float64), item.reduction_axis, -1)  # [out, in]
        if gain.shift is not None:
            shift = array_of(gain.shift[0].inputs[gain.shift[1]]).astype(np.float64).reshape(-1)
            if np.any(shift != 0):
                _add_bias(graph, item, np.broadcast_to(shift, weight.shape[1:]) @ weight.T)
        scaled = np.moveaxis(weight * scale.reshape(-1), -1, item.reduction_axis)
        replace_constant(graph, item.node, 1, scaled)
    replace_constant(graph, gain.node, gain.scale_index, np.ones_like(scale))
    if gain.shift is not None:
        node, index = gain.shift
        replace_constant(graph, node, index, np.zeros_like(array_of(node.inputs[index])))


def _add_bias(graph: ir.Graph, item: layer_nodes.WeightedNode, bias: Array) -> None:
    """Add to a layer's output, in the bias that it has or in one of its own."""
    node, output = item.node, item.node.outputs[0]
    dtype = output.dtype or ir.DataType.FLOAT
    if node.op_type == "Gemm":
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if given is None:
            node.resize_inputs(3)
            node.replace_input_with(2, new_initializer(graph, f"{node.name}_bias", _cast(bias * alpha, dtype), dtype))
            node.attributes.pop("beta", None)
            return
        if graphs.is_constant(given) and beta:
            replace_constant(graph, node, 2, array_of(given) + bias * alpha / beta)
            return
    readers = graphs.consumers(output)
    if len(readers) == 1 and graphs.is_op(readers[0][0], "Add") and not output.is_graph_output():
        add, index = readers[0]
        other = add.inputs[1 - index]
        if graphs.is_constant(other) and array_of(other).size == len(bias):
            replace_constant(graph, add, 1 - index, array_of(other) + bias.reshape(array_of(other).shape))
            return
    constant = new_initializer(graph, f"{node.name}_bias", _cast(bias, dtype), dtype)
    tape = ir.tape.Tape()
    total = tape.op("Add", [output, constant])
    total.type, total.shape = output.type, output.shape
    tape.nodes[0].name = f"{node.name}_add_bias"
    graph.insert_after(node, tape.nodes)
    for reader, index in readers:
        reader.replace_input_with(index, total)
    if output.is_graph_output():
        graph.outputs[list(graph.outputs).index(output)] = total
        total.name, output.name = output.name, f"{output.name}_unbiased"
    else:
        total.name = f"{output.name}_biased"


def _cast(array: Array, dtype: ir.DataType) -> Array:
    return array.astype(dtype.numpy())
