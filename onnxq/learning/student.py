"""The quantized network as one that trains: float weights behind straight-through rounding, and learned steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.learning.activations import LearnedStep, gradient_factor
from onnxq.learning.quantizers import Grid, Quantizer, as_float, read, scale_gradient

NORMALISATIONS = (
    "BatchNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization",
)  # fmt: skip


class LearnedWeight:
    """A weight that trains in float and is rounded whenever it is used, with the step learned beside it.

    Source: LSQ, arXiv 1902.08153, equations 1 to 3 and section 2.2; steps are learned as logarithms.

    Args:
        grid: The weight's grid.
        learn_step: Whether the step is learned.
        scaled: Whether the step's gradient is multiplied by LSQ's factor.
        keep_codes: Whether the weight grows with its step, so that a step by itself changes no code: roundings that
            were chosen together would fall apart.
    """

    def __init__(self, grid: Grid, learn_step: bool, scaled: bool, keep_codes: bool = False) -> None:
        self.grid, self.scaled, self.keep_codes = grid, scaled, keep_codes
        self.log_step = torch.zeros_like(grid.scale, requires_grad=learn_step)

    @property
    def step(self) -> Tensor:
        """The step size, in the shape of the scale initializer."""
        return self.grid.scale * self.log_step.exp()

    def __call__(self, weight: Tensor) -> Tensor:
        """The float weight on its grid."""
        step = self.step
        if self.scaled:
            step = scale_gradient(step, gradient_factor(weight.numel() // max(1, step.numel()), self.grid.high))
        if self.keep_codes:
            weight = weight * self.grid.spread(self.log_step.exp())
        return self.grid.nearest(weight, step)


class Student:
    """What of a Q/DQ graph learns, and how to run it; the float network, its teacher, is in the same graph.

    BatchNormalization is folded by the time a graph has Q/DQ: its scale and shift train as weight and bias, and its
    statistics are those of the float model.

    Args:
        graph: The Q/DQ graph in torch, with all scales set.
        quantizers: All of its quantizers.
        within: Names of the values whose nodes train; ``None``: all.
        frozen: Names of initializers that stay as they are, because another block has learned them.
        starts: Where weights and biases start that do not start at the float network's, by initializer; without
            ``learn_weights`` they stay there.
        learn_weights: Whether weights, biases and the factors of normalisations learn.
        learn_steps: Whether steps of weights and activations learn.
        learn_zero_points: Whether zero points of asymmetric activations learn.
        scaled: Whether gradients of steps are multiplied by LSQ's factor.

    Attributes:
        masters: Float initializers that train, by name.
        weights: How weights are rounded, by the name of the rounded value.
        activations: The learned activation quantizers, one for each scale.
        input_sizes: How large the inputs of the network are that a weight multiplies, by its name, where they are
            large; its own numbers are small by as much, and it learns as slowly as if both were of the usual size.
    """

    def __init__(
        self,
        graph: TorchGraph,
        quantizers: Sequence[Quantizer],
        within: Collection[str] | None = None,
        frozen: Collection[str] = (),
        starts: Mapping[str, Tensor] | None = None,
        *,
        learn_weights: bool = True,
        learn_steps: bool = True,
        learn_zero_points: bool = True,
        scaled: bool = False,
    ) -> None:
        self.graph, starts = graph, starts or {}
        self.quantizers = [item for item in quantizers if within is None or item.output in within]
        self._teacher = as_float(quantizers)
        self.weights: dict[str, LearnedWeight] = {}
        self.activations: list[LearnedStep] = []
        self._replaced: dict[str, Replacement] = {}
        by_scale: dict[str, LearnedStep] = {}
        for item in self.quantizers:
            if item.float_type is not None:
                continue  # the graph's own nodes round it, with a straight-through gradient
            learns = learn_steps and item.scale not in frozen
            if item.is_weight:
                weight = LearnedWeight(Grid(graph, item), learns, scaled, item.source in starts)
                self.weights[item.output] = weight
                self._replaced[item.output] = Replacement((item.source,), weight)
                continue
            shifts = learns and learn_zero_points and not item.symmetric
            step = LearnedStep(graph, item, learn_zero_point=shifts, scaled=scaled)
            step.log_step.requires_grad_(learns)
            if item.scale in by_scale:
                step.log_step, step.shift = by_scale[item.scale].log_step, by_scale[item.scale].shift
            else:
                by_scale[item.scale] = step
                self.activations.append(step)
            self._replaced[item.output] = step.replacement()
        self.input_sizes: dict[str, float] = {}
        self.masters: dict[str, Tensor] = {}
        names = [item.source for item in self.quantizers if item.is_weight]
        names = list(dict.fromkeys([*names, *_float_parameters(graph.model.graph, within)]))
        if within is None and not starts.keys() <= set(names):
            raise ValueError(f"nothing that learns starts at {sorted(starts.keys() - set(names))}")
        for name in names:
            start = starts.get(name)
            if name in frozen or (start is None and not learn_weights):
                continue
            own = read(graph, name) if start is None else graph.run({name: start}, [name])[name]  # never in halves
            self.masters[name] = own.clone().requires_grad_(learn_weights)

    def run(self, given: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
        """Values of the quantized network as it is now, with gradients."""
        return self.graph.run({**given, **self.masters}, wanted, replaced=self._replaced)

    def teach(self, given: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
        """The float network's values; gradients reach the inputs alone."""
        return self.graph.run(given, wanted, replaced=self._teacher)

    def steps(self) -> list[Tensor]:
        """The variables of steps and zero points that learn."""
        found = [item.log_step for item in self.weights.values()]
        for step in self.activations:
            found += [step.log_step, step.shift]
        return [tensor for tensor in found if tensor.requires_grad]

    def learned(self) -> dict[str, Tensor]:
        """The new initializers by name; weights lie on their grid, so that storing their codes changes nothing."""
        found = {name: tensor.detach() for name, tensor in self.masters.items()}
        with torch.no_grad():
            for step in self.activations:
                if step.log_step.requires_grad:
                    found |= step.learned()
            for weight in self.weights.values():
                quantizer = weight.grid.quantizer
                source = self.masters.get(quantizer.source)
                found[quantizer.source] = weight(weight.grid.weight if source is None else source)
                if weight.log_step.requires_grad:
                    found[quantizer.scale] = weight.step
        return found


def _float_parameters(graph: ir.Graph, within: Collection[str] | None) -> list[str]:
    """Names of float initializers that train and are not rounded: biases, factors of norms, weights left in float."""
    found = []
    for node in graph:
        if within is not None and not any(value.name in within for value in node.outputs):
            continue
        for value in _parameters_of(node):
            if value is not None and value.is_initializer() and graphs.is_float(value) and graphs.rank(value):
                found.append(value.name or "")
    return found


def _parameters_of(node: ir.Node) -> Sequence[ir.Value | None]:
    if _is_layer(node):
        return node.inputs
    if graphs.is_op(node, *NORMALISATIONS):
        return node.inputs[1:3]  # never the statistics
    if graphs.is_op(node, "Add", "Mul"):
        producers = [value.producer() for value in node.inputs if value is not None]
        producers += [source for item in producers for source in _before_factor(item)]
        if any(item is not None and (_is_layer(item) or graphs.is_op(item, *NORMALISATIONS)) for item in producers):
            return node.inputs
    return ()


def _before_factor(node: ir.Node | None) -> list[ir.Node | None]:
    """What a factor that was looked up by the sampler's step multiplies: a layer's bias then stands behind it."""
    if node is None or not graphs.is_op(node, "Mul"):
        return []
    sources = [None if value is None else value.producer() for value in node.inputs]
    return sources if any(graphs.is_op(source, "Gather") for source in sources) else []


def _is_layer(node: ir.Node) -> bool:
    """Whether the node has a weight; what is added to a product of two activations is a mask and no bias."""
    found = layer_nodes.weighted(node)
    return found is not None and found.weight_index is not None


def input_weights(graph: ir.Graph, quantizers: Sequence[Quantizer]) -> dict[str, str]:
    """The weights of a Q/DQ graph that multiply an input of it, and that input, by the initializers' names."""
    sources = {item.output: item.source for item in quantizers}
    names = {value.name or "" for value in graph.inputs}
    found = {}
    for item in layer_nodes.weighted_nodes(graph):
        if item.weight is None:
            continue
        weight, activation = (
            sources.get(value.name or "", value.name or "") for value in (item.weight, item.activation)
        )
        if activation in names:
            found[weight] = activation
    return found
