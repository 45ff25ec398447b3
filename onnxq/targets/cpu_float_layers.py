"""Layers that onnxruntime's CPU provider could run on codes, and that are as fast or faster in float."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.passes.level_gates import GATED, gate_of
from onnxq.shapes import elements
from onnxq.targets.cpu_ops import after_activation
from onnxq.targets.cpu_regions import Regions
from onnxq.targets.placement import first_layers

STEM_CHANNELS = 4
STEM_DEPTHWISE_CHANNELS = 32
STEM_WEIGHTS = 6000  # with more of them the products are what counts: 3 to 64 channels, 7 × 7, are faster on codes
# Pairs of input and output channels of a convolution that is no faster on codes: gathering its inputs costs more than
# the products. Of 2 by 8 channels, 3 × 3, codes take 2.3 times as long, of 8 by 8 1.4 times, of 12 by 16 as long.
NARROW_PAIRS = 64
NARROW_PAIRS_OF_VOLUMES = 128  # 3 × 3 × 3: of 8 by 8 channels codes take 2.6 times as long, of 8 by 16 1.6 times
# Products for each result of a first layer whose codes would be made for it alone: 4 channels of 2 × 2 gain 3 to
# 8 % of the layer, 16 of them 19 %, which is nothing of the network; and what codes round there all layers behind get.
FEW_PRODUCTS = 64
VOLUME_RANK = 5
SMALL_SHARE = 1 / 32  # of a network's weights that such a layer has at most


def layers_better_in_float(
    graph: ir.Graph, chosen: Sequence[layer_nodes.WeightedNode], skipped: set[str]
) -> dict[str, str]:
    """Names of such layers, and why.

    Args:
        graph: The float graph.
        chosen: The layers that may have codes.
        skipped: Names of nodes that the user excludes.
    """
    reasons = dict.fromkeys(_thin_stem(graph, chosen), "a thin first layer is faster in float")
    reasons |= {item.node.name or "": reason for item in chosen if (reason := _why_narrow(item))}
    others = [item for item in chosen if item.node.name not in reasons]
    alone = _alone(graph, others, skipped)
    return reasons | dict.fromkeys(alone, "a small layer alone between floats gains nothing from codes")


def _why_narrow(item: layer_nodes.WeightedNode) -> str:
    """Why a convolution is too narrow for codes, or an empty string.

    Not where its result goes from sum to sum: what becomes codes behind a float layer keeps float's layout, and so
    would all of that stream, with a transposition behind each convolution (of ResNet-56, a twentieth of the time).
    """
    assert item.weight is not None and item.weight.shape is not None
    if item.node.op_type != "Conv" or item.node.attributes.get_int("group", 1) > 1:
        return ""
    outputs, width = map(int, item.weight.shape.numpy()[:2])
    most = NARROW_PAIRS_OF_VOLUMES if len(item.weight.shape) == VOLUME_RANK else NARROW_PAIRS
    if outputs * width > most or any(_sums(following) for following in _sums(item.node)):
        return ""
    return f"{width} by {outputs} channels, which are faster in float"


def _sums(node: ir.Node) -> list[ir.Node]:
    """The sums that read what a node gives, activation included."""
    return [reader for reader, _ in graphs.consumers(after_activation(node)) if graphs.is_op(reader, "Add")]


def _thin_stem(graph: ir.Graph, chosen: Sequence[layer_nodes.WeightedNode]) -> list[str]:
    """The first convolution of an image, and a narrow depthwise one right after it.

    With so few channels the integer kernels pad most of their lanes, and the conversion of a full-size image to
    codes comes on top; in float the layer takes a third of the time. Only where one quantized convolution reads
    the result, activation included, or a MaxPool, which leaves a quarter of it to convert: a shortcut there would
    drag float into the integer region.
    """
    by_node = {item.node: item for item in chosen}
    names: list[str] = []
    for value in graph.inputs:
        readers = graphs.consumers(value)
        node = readers[0][0] if len(readers) == 1 else None
        limit = STEM_CHANNELS
        while node is not None and node in by_node and _is_thin(by_node[node], limit):
            following = [reader for reader, _ in graphs.consumers(_after_gate(after_activation(node)))]
            if len(following) != 1:
                break
            is_read_by_layer = following[0] in by_node and following[0].op_type == "Conv"
            if not is_read_by_layer and not graphs.is_op(following[0], "MaxPool"):
                break
            names.append(node.name or "")
            node = following[0]
            is_depthwise = node.attributes.get_int("group", 1) > 1
            if len(names) == 2 or not is_depthwise:
                break
            limit = STEM_DEPTHWISE_CHANNELS
    return names


def _alone(graph: ir.Graph, chosen: Sequence[layer_nodes.WeightedNode], skipped: set[str]) -> list[str]:
    """Small layers whose neighbours are float: codes would be made for them alone.

    Depthwise convolutions, as in ConvNeXt: such blocks of 192 channels, 28² and 3 × 3, take 0.73 of float's time so and
    0.82 with codes; those of 24 channels, 56² and 7 × 7, 1.07 and 2.52. And first layers of few products, as those that
    cut latents into patches: eight blocks of a DiT with 384 channels have 37.0 dB so, and 35.4 with codes.
    """
    most = SMALL_SHARE * sum(map(_weights, chosen))
    first = first_layers(graph) & {item.node for item in chosen if _is_small(item, most)}
    small = [
        item for item in chosen
        if layer_nodes.depthwise_channels(item.node) is not None
        or (item.node in first and _reads_numbers(item.activation))
    ]  # fmt: skip
    if not small:
        return []
    regions = Regions(graph, chosen, skipped)
    return [item.node.name or "" for item in small if regions.is_alone(item)]


def _weights(item: layer_nodes.WeightedNode) -> int:
    """How many numbers a layer's weight has, if it is known."""
    return 0 if item.weight is None else elements(item.weight) or 0


def _is_small(item: layer_nodes.WeightedNode, most: float) -> bool:
    """Whether a layer has at most so many weights, and few products make each of its results."""
    weights = _weights(item)
    if not 0 < weights <= most:
        return False
    assert item.weight is not None and item.weight.shape is not None
    return weights // int(item.weight.shape.numpy()[item.channel_axis]) <= FEW_PRODUCTS


def _reads_numbers(value: ir.Value) -> bool:
    """Whether what a first layer reads is made of an input's numbers, and not looked up by whole ones, as words are."""
    return any(item.is_graph_input() and graphs.is_float(item) for item in graphs.computed_from(value))


def _after_gate(value: ir.Value) -> ir.Value:
    """What HardSwish, SiLU or Gelu makes of a value that nothing else reads; the value itself where there is none.

    Levelled or not: whether a first layer is thin must not depend on that.
    """
    readers = list(dict.fromkeys(reader for reader, _ in graphs.consumers(value)))
    if value.is_graph_output():
        return value
    if len(readers) == 1 and graphs.is_op(readers[0], "HardSwish", "Gelu"):
        return readers[0].outputs[0]
    products = [reader for reader in readers if graphs.is_op(reader, "Mul") and GATED not in reader.metadata_props]
    if len(readers) != 2 or len(products) != 1:
        return value
    gate = gate_of(next(reader for reader in readers if reader is not products[0]))
    if gate is None or not graphs.is_op(gate, "Sigmoid", "HardSigmoid"):
        return value
    return products[0].outputs[0] if graphs.only_reader(gate.outputs[0]) is products[0] else value


def _is_thin(item: layer_nodes.WeightedNode, channels: int) -> bool:
    """Whether a layer is a convolution that reads at most so many channels and has few weights."""
    if item.node.op_type != "Conv" or not 0 < _weights(item) <= STEM_WEIGHTS:
        return False
    assert item.weight is not None and item.weight.shape is not None
    return int(item.weight.shape.numpy()[1]) * item.node.attributes.get_int("group", 1) <= channels
