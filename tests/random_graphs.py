"""Random float networks for property tests: what exporters write, in combinations that nobody thought of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

OPSETS = (13, 15, 17, 18, 19, 20, 21, 22, 23)


@dataclass
class Network:
    """A graph under construction.

    Attributes:
        draw: Hypothesis' choice of one element of a list.
        generator: Fills the weights.
        opset: The version of the standard operators.
    """

    draw: Callable[[list[Any]], Any]
    generator: np.random.Generator
    opset: int
    nodes: list[ir.Node] = field(default_factory=list)
    values: dict[str, ir.Value] = field(default_factory=dict)
    weights: list[ir.Value] = field(default_factory=list)
    weight_values: dict[str, tuple[Shape, bool]] = field(default_factory=dict)
    live: list[tuple[str, Shape]] = field(default_factory=list)

    def node(self, op: str, inputs: list[str], shape: Shape, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; returns its first output."""
        operands = [self.values[name] if name else None for name in inputs]
        made = ir.node(op, operands, attributes, num_outputs=outputs, name=f"{op}_{len(self.nodes)}")
        self.nodes.append(made)
        for index, value in enumerate(made.outputs):
            value.name = f"{made.name}_{index}"
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
            self.values[value.name] = value
        first = f"{made.name}_0"
        self.live.append((first, shape))
        return first

    def weight(self, shape: Shape, *, positive: bool = False) -> str:
        """He-initialised values, some with a channel that is much larger, tiny or zero; or shared."""
        shared = [name for name, value in self.weight_values.items() if value == (shape, positive)]
        if shared and self.draw([False, False, False, True]):
            return str(self.draw(shared))
        fan_in = max(int(np.prod(shape[1:])), 1)
        values = self.generator.standard_normal(shape) * (2 / fan_in) ** 0.5
        if positive:
            values = np.abs(values) + 0.5
        elif shape:
            values[0] *= self.draw([1] * 6 + [100, 1e-4, 0])
        name = self.constant(values.astype(np.float32))
        self.weight_values[name] = (shape, positive)
        return name

    def constant(self, values: Array) -> str:
        """Add values as an initializer or as a Constant node."""
        name = f"w{len(self.values)}"
        tensor = ir.tensor(values, name=name)
        if self.draw([True, True, True, False]):
            value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
            self.weights.append(value)
        else:
            made = ir.node("Constant", [], {"value": tensor}, name=f"Constant_{name}")
            self.nodes.append(made)
            value = made.outputs[0]
            value.name = name
        self.values[name] = value
        return name


def convolution(net: Network, x: str, shape: Shape) -> None:
    batch, channels, height, width = shape
    groups = net.draw([1, 1, 1, channels])
    filters = groups * net.draw([1, 2]) if groups > 1 else net.draw([1, 3, 8, 16])
    kernel = net.draw([1, 3]) if min(height, width) >= 3 else 1
    stride = net.draw([1, 1, 2])
    pads = net.draw([[0, 0, 0, 0], [kernel // 2] * 4, [0, 0, kernel // 2, kernel // 2]])
    size = [(length + pads[i] + pads[i + 2] - kernel) // stride + 1 for i, length in enumerate((height, width))]
    inputs = [x, net.weight((filters, channels // groups, kernel, kernel))]
    if net.draw([True, False]):
        inputs.append(net.weight((filters,)))
    net.node(
        "Conv", inputs, (batch, filters, *size), group=groups, strides=[stride] * 2, pads=pads,
        kernel_shape=[kernel] * 2,
    )  # fmt: skip


def transposed_convolution(net: Network, x: str, shape: Shape) -> None:
    batch, channels, height, width = shape
    if max(height, width) > 16:
        return
    filters = net.draw([1, 4])
    inputs = [x, net.weight((channels, filters, 2, 2))]
    net.node("ConvTranspose", inputs, (batch, filters, 2 * height, 2 * width), strides=[2, 2], kernel_shape=[2, 2])


def batch_normalization(net: Network, x: str, shape: Shape) -> None:
    channels = (shape[1],)
    gamma, beta, mean = net.weight(channels, positive=True), net.weight(channels), net.weight(channels)
    net.node("BatchNormalization", [x, gamma, beta, mean, net.weight(channels, positive=True)], shape)


def activation(net: Network, x: str, shape: Shape) -> None:
    op = net.draw(["Relu", "Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Clip", "Tanh", "SiLU", "Elu", "PRelu", "Exp"])
    if op == "Clip":
        net.node("Clip", [x, net.constant(np.float32(0)), net.constant(np.float32(6))], shape)
    elif op == "SiLU":
        net.node("Mul", [x, net.node("Sigmoid", [x], shape)], shape)
    elif op == "PRelu":
        slope = (shape[1], 1, 1) if len(shape) == 4 else (shape[-1],)
        net.node("PRelu", [x, net.weight(slope, positive=True)], shape)
    elif op == "Exp":
        net.node("Exp", [net.node("Tanh", [x], shape)], shape)
    elif op == "HardSwish" and net.opset < 14:
        net.node("HardSigmoid", [x], shape)
    else:
        net.node(op, [x], shape)


def pooling(net: Network, x: str, shape: Shape) -> None:
    op = net.draw(["MaxPool", "AveragePool", "GlobalAveragePool"])
    if op == "GlobalAveragePool" or min(shape[2:]) < 2:
        net.node("GlobalAveragePool", [x], (*shape[:2], 1, 1))
    else:
        size = (shape[2] // 2, shape[3] // 2)
        net.node(op, [x], (*shape[:2], *size), kernel_shape=[2, 2], strides=[2, 2])


def same_shape(net: Network, shape: Shape) -> list[str]:
    return [name for name, other in net.live if other == shape]


def residual(net: Network, x: str, shape: Shape) -> None:
    other = net.draw(same_shape(net, shape))
    op = net.draw(["Add", "Add", "Mul", "Sub"])
    net.node(op, [x, other] if net.draw([True, False]) else [other, x], shape)


def scaled(net: Network, x: str, shape: Shape) -> None:
    sizes: Shape = (shape[1], 1, 1) if len(shape) == 4 else (shape[-1],)
    net.node(net.draw(["Mul", "Add", "Div"]), [x, net.weight(net.draw([sizes, (1,), ()]), positive=True)], shape)


def concatenation(net: Network, x: str, shape: Shape) -> None:
    others = [(n, s) for n, s in net.live if len(s) == len(shape) and s[0] == shape[0] and s[2:] == shape[2:]]
    other, other_shape = net.draw(others)
    if shape[1] + other_shape[1] > 64:
        return
    net.node("Concat", [x, other], (shape[0], shape[1] + other_shape[1], *shape[2:]), axis=1)


def splitting(net: Network, x: str, shape: Shape) -> None:
    if shape[1] % 2:
        return
    half = (shape[0], shape[1] // 2, *shape[2:])
    attributes = {"num_outputs": 2} if net.opset >= 18 else {}
    first = net.node("Split", [x], half, outputs=2, axis=1, **attributes)
    net.live.append((first[:-1] + "1", half))


def resizing(net: Network, x: str, shape: Shape) -> None:
    if max(shape[2:]) > 16:
        return
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    mode = net.draw([{"mode": "nearest", "nearest_mode": "floor"}, {"mode": "linear"}])
    net.node("Resize", [x, "", scales], (*shape[:2], 2 * shape[2], 2 * shape[3]), **mode,
             coordinate_transformation_mode="asymmetric")  # fmt: skip


def padding(net: Network, x: str, shape: Shape) -> None:
    pads = net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    net.node("Pad", [x, pads], (*shape[:2], shape[2] + 2, shape[3] + 2), mode=net.draw(["constant", "edge"]))


def to_tokens(net: Network, x: str, shape: Shape) -> None:
    tokens = shape[2] * shape[3]
    flat = net.node("Reshape", [x, net.constant(np.array([0, shape[1], -1], np.int64))], (*shape[:2], tokens))
    net.node("Transpose", [flat], (shape[0], tokens, shape[1]), perm=[0, 2, 1])


def flatten(net: Network, x: str, shape: Shape) -> None:
    net.node("Flatten", [x], (shape[0], int(np.prod(shape[1:]))), axis=1)


def pooled_tokens(net: Network, x: str, shape: Shape) -> None:
    if net.opset >= 18:
        net.node("ReduceMean", [x, net.constant(np.array([1], np.int64))], (shape[0], shape[2]), keepdims=0)
    else:
        net.node("ReduceMean", [x], (shape[0], shape[2]), axes=[1], keepdims=0)


def linear(net: Network, x: str, shape: Shape) -> None:
    features, size = shape[-1], net.draw([1, 8, 12, 32])
    if len(shape) == 2 and net.draw([True, False]):
        turned = net.draw([0, 1])
        inputs = [x, net.weight((size, features) if turned else (features, size))]
        if net.draw([True, False]):
            inputs.append(net.weight(net.draw([(size,), (1, size), (1,)])))
        net.node("Gemm", inputs, (shape[0], size), transB=turned, alpha=net.draw([1.0, 0.5]), beta=net.draw([1.0, 2.0]))
        return
    product = net.node("MatMul", [x, net.weight((features, size))], (*shape[:-1], size))
    if net.draw([True, False]):
        net.node("Add", [product, net.weight((size,))], (*shape[:-1], size))


def attention(net: Network, x: str, shape: Shape) -> None:
    batch, tokens, features = shape
    query, key, value = (net.node("MatMul", [x, net.weight((features, 8))], (batch, tokens, 8)) for _ in range(3))
    turned = net.node("Transpose", [key], (batch, 8, tokens), perm=[0, 2, 1])
    scores = net.node("MatMul", [query, turned], (batch, tokens, tokens))
    weights = net.node("Softmax", [scores], (batch, tokens, tokens), axis=-1)
    net.node("MatMul", [weights, value], (batch, tokens, 8))


def normalization(net: Network, x: str, shape: Shape) -> None:
    if net.opset >= 17:
        gamma, beta = net.weight(shape[-1:], positive=True), net.weight(shape[-1:])
        net.node("LayerNormalization", [x, gamma, beta], shape, axis=-1)
    else:
        net.node("Softmax", [x], shape, axis=-1)


def heads(net: Network, x: str, shape: Shape) -> None:
    """Self-attention over two heads, with 4-D products of activations."""
    batch, tokens, features = shape
    if features % 2:
        return
    half = features // 2
    split = net.node("Reshape", [x, net.constant(np.array([0, 0, 2, half], np.int64))], (batch, tokens, 2, half))
    query = net.node("Transpose", [split], (batch, 2, tokens, half), perm=[0, 2, 1, 3])
    key = net.node("Transpose", [split], (batch, 2, half, tokens), perm=[0, 2, 3, 1])
    scores = net.node("MatMul", [query, key], (batch, 2, tokens, tokens))
    scaled_scores = net.node("Mul", [scores, net.constant(np.float32(half**-0.5))], (batch, 2, tokens, tokens))
    weights = net.node("Softmax", [scaled_scores], (batch, 2, tokens, tokens), axis=-1)
    mixed = net.node("MatMul", [weights, query], (batch, 2, tokens, half))
    back = net.node("Transpose", [mixed], (batch, tokens, 2, half), perm=[0, 2, 1, 3])
    net.node("Reshape", [back, net.constant(np.array([0, 0, features], np.int64))], shape)


def spatial_normalization(net: Network, x: str, shape: Shape) -> None:
    if shape[2] * shape[3] > 1:
        net.node("InstanceNormalization", [x, net.weight(shape[1:2], positive=True), net.weight(shape[1:2])], shape)


def gate(net: Network, x: str, shape: Shape) -> None:
    """Squeeze and excitation."""
    pooled = net.node("GlobalAveragePool", [x], (*shape[:2], 1, 1))
    inner = net.node("Conv", [pooled, net.weight((4, shape[1], 1, 1))], (shape[0], 4, 1, 1))
    outer = net.node("Conv", [net.node("Relu", [inner], (shape[0], 4, 1, 1)), net.weight((shape[1], 4, 1, 1))],
                     (*shape[:2], 1, 1))  # fmt: skip
    net.node("Mul", [x, net.node("Sigmoid", [outer], (*shape[:2], 1, 1))], shape)


def turned_weight(net: Network, x: str, shape: Shape) -> None:
    """A weight behind a Transpose, as tied embeddings have."""
    turned = net.node("Transpose", [net.weight((8, shape[-1]))], (shape[-1], 8), perm=[1, 0])
    net.live.pop()
    net.node("MatMul", [x, turned], (*shape[:-1], 8))


def passing(net: Network, x: str, shape: Shape) -> None:
    net.node(net.draw(["Identity", "Dropout", "Neg", "Abs"]), [x], shape)


def same_twice(net: Network, x: str, shape: Shape) -> None:
    net.node(net.draw(["Add", "Mul"]), [x, x], shape)


STEPS = {
    4: [convolution] * 6
    + [batch_normalization, activation, activation, pooling, residual, residual, scaled, concatenation, splitting]
    + [transposed_convolution, resizing, padding, to_tokens, flatten, gate, spatial_normalization]
    + [passing, same_twice, turned_weight],
    3: [linear] * 3
    + [attention, activation, normalization, residual, scaled, concatenation, splitting, pooled_tokens]
    + [heads, passing, turned_weight],
    2: [linear] * 3 + [activation, residual, scaled, normalization, concatenation],
}


# What rewrites put behind the name of a value or a node for what they make of it.
ENDINGS = [
    "quantized", "dequantized", "scale", "zero_point", "clipped", "clip_low", "float", "bias", "padded", "codes",
    "levels", "levelled", "smoothing", "smoothed", "exponent", "sign", "shift", "with_shift", "part0", "sum0",
    "base", "term0", "rotated", "or_not", "Q", "DQ",
]  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    """A valid float network of one image input ``x`` and one or two outputs."""
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    net = Network(lambda options: draw(st.sampled_from(options)), generator, draw(st.sampled_from(OPSETS)))
    batch = draw(st.sampled_from([1, 2]))
    shape = (batch, draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([5, 8])), 8)
    free = draw(st.booleans())
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["N", *shape[1:]] if free else shape)
    net.live.append(("x", shape))
    net.values["x"] = x
    for index in range(draw(st.integers(2, 14))):
        name, current = net.live[-1] if draw(st.integers(0, 3)) else net.draw(net.live)
        step = convolution if index == 0 and draw(st.integers(0, 3)) else net.draw(STEPS[len(current)])
        step(net, name, current)
    if not net.nodes:
        activation(net, "x", shape)
    inner = [item for item in net.live if item[0] != "x"]
    chosen = {inner[-1][0]: inner[-1][1]}
    if draw(st.integers(0, 4)) == 0:
        name, current = net.draw(inner)
        chosen[name] = current
    _confuse_names(net, draw(st.lists(st.sampled_from(ENDINGS), max_size=12)), set(chosen))
    for name, sizes in chosen.items():
        net.values[name].shape = ir.Shape(["N", *sizes[1:]] if free else sizes)
    graph = ir.Graph(
        [x],
        [net.values[name] for name in chosen],
        nodes=net.nodes,
        initializers=net.weights,
        opset_imports={"": net.opset},
        name="random",
    )
    return ir.Model(graph, ir_version=8)


def _confuse_names(net: Network, endings: list[str], kept: set[str]) -> None:
    """Give some values the names that a rewrite would give what it makes of others."""
    taken = {value.name for value in net.values.values()}
    for ending in endings:
        value = net.values[net.draw([name for name in net.values if name != "x" and name not in kept] or ["x"])]
        name = f"{net.draw(list(net.values.values())).name}_{ending}"
        if name in taken or value.name == "x":
            continue
        taken.add(name)
        if value.const_value is not None:
            value.const_value.name = name
        value.name = name
