"""The initializers that learning changes: each layer's own, so that nothing else changes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.biases import bias_place
from onnxq.folding import array_of, new_initializer
from onnxq.learning.hessian import Layer, layer
from onnxq.learning.quantizers import Quantizer


def separate_weights(graph: ir.Graph) -> bool:
    """Give each weight quantizer an initializer of its own, where other nodes read the float weight too."""
    modified = False
    for node in graph:
        weight = node.inputs[0] if graphs.is_quantize(node) else None
        if weight is None or not graphs.is_constant(weight) or weight.const_value is None:
            continue
        if len(weight.uses()) > 1 or weight.is_graph_output():
            node.replace_input_with(0, _copy(graph, f"{weight.name}_rounded", weight))
            modified = True
    return modified


def readers_of(graph: ir.Graph, quantizers: Sequence[Quantizer]) -> dict[str, list[Layer]]:
    """The layers that read each quantized weight, by the weight's output; none where another op reads it too."""
    outputs = {item.output for item in quantizers if item.is_weight}
    found: dict[str, list[Layer]] = {}
    for item in layer_nodes.weighted_nodes(graph):
        weight = item.weight
        if weight is None or weight.name not in outputs:
            continue
        as_layer = layer(item)
        if as_layer is not None:
            found.setdefault(weight.name, []).append(as_layer)
    values = graphs.values(graph)
    return {name: layers for name, layers in found.items() if len(layers) == len(values[name].uses())}


def own_biases(graph: ir.Graph, readers: Mapping[str, Sequence[Layer]]) -> dict[str, str]:
    """The initializer that each layer's bias alone uses, by the weight's output; where there is none yet, of zeros."""
    found: dict[str, str] = {}
    for output, layers in readers.items():
        if len(layers) != 1:
            continue
        place = bias_place(layers[0].item)
        if place is None:
            continue
        rows = layers[0].shape[layers[0].item.channel_axis]
        bias = place.value
        if bias is None:
            name, like = f"{place.node.outputs[0].name}_bias", layers[0].item.weight
            dtype = (like.dtype if like is not None else None) or ir.DataType.FLOAT
            place.put(new_initializer(graph, name, np.zeros(rows, dtype.numpy()), dtype))
        elif not graphs.is_constant(bias) or {array_of(bias).size, *array_of(bias).shape[-1:]} != {rows}:
            continue
        elif len(bias.uses()) > 1:
            place.put(_copy(graph, f"{bias.name}_own", bias))
        own = place.value
        assert own is not None and own.name is not None
        found[output] = own.name
    return found


def _copy(graph: ir.Graph, name: str, value: ir.Value) -> ir.Value:
    return new_initializer(graph, name, np.array(array_of(value)), value.dtype or ir.DataType.FLOAT)
