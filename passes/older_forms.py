"""How nodes were written before their ops were what they are: for opsets from 13 on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.folding import array_of
from onnxq.rewriting import InPlaceOf, become, operand

SAMPLING = {"linear": "bilinear", "cubic": "bicubic"}  # GridSample's modes, and what they were called before opset 20


def _reduced(graph: ir.Graph, node: ir.Node) -> None:
    """Axes were an attribute, and none of them meant all."""
    axes = operand(node, 1)
    if axes is not None and graphs.is_constant(axes) and array_of(axes).size:
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in array_of(axes).ravel()])
        node.attributes.pop("noop_with_empty_axes", None)
        become(node, node.op_type, node.inputs[:1])


def _split(graph: ir.Graph, node: ir.Node) -> None:
    """The number of parts is that of the outputs; parts that are not alike have their sizes."""
    if "num_outputs" not in node.attributes:
        return
    axis = node.attributes.get_int("axis", 0)
    sizes = [None if output.shape is None else output.shape[axis] for output in node.outputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) == len(sizes):
        lengths = InPlaceOf(graph, node).integers("lengths", known)
        node.attributes.pop("num_outputs")
        become(node, "Split", [node.inputs[0], lengths])


def _reshaped(graph: ir.Graph, node: ir.Node) -> None:
    """A size of 0 always meant that of the input; where there is none it does not matter."""
    shape = node.inputs[1]
    if shape is not None and graphs.is_constant(shape) and 0 not in array_of(shape):
        node.attributes.pop("allowzero", None)


def _sampled(graph: ir.Graph, node: ir.Node) -> None:
    """Modes had names for pictures."""
    source, mode = node.inputs[0], node.attributes.get_string("mode", "linear")
    if source is not None and graphs.rank(source) == 4:
        node.attributes["mode"] = ir.AttrString("mode", SAMPLING.get(mode, mode))


def _converted(graph: ir.Graph, node: ir.Node) -> None:
    """What a Q/DQ says beside its zero point of the type that this has."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        node.attributes.pop("output_dtype", None)
    if not any(value.dtype is not None and "FLOAT8" in value.dtype.name for value in _tensors(node)):
        node.attributes.pop("saturate", None)


def _tensors(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in (*node.inputs, *node.outputs) if value is not None)


def _normalised(graph: ir.Graph, node: ir.Node) -> None:
    """LayerNormalization of the last axes, as exporters wrote it before there was one."""
    x, scale, bias = node.inputs[0], node.inputs[1], operand(node, 2)
    rank, axis = None if x is None else graphs.rank(x), node.attributes.get_int("axis", -1)
    if rank is None or any(output.uses() for output in node.outputs[1:]):
        return
    made = InPlaceOf(graph, node)
    axes = {"axes": list(range(axis % rank - rank, 0)), "keepdims": 1}
    centred = made.op("centred", "Sub", [x, made.op("mean", "ReduceMean", [x], axes)])
    variance = made.op("variance", "ReduceMean", [made.op("square", "Pow", [centred, made.number("two", 2.0)])], axes)
    epsilon = made.number("epsilon", node.attributes.get_float("epsilon", 1e-5))
    deviation = made.op("deviation", "Sqrt", [made.op("above_zero", "Add", [variance, epsilon])])
    result = made.main("Mul", [made.op("normal", "Div", [centred, deviation]), scale])
    made.take_over(result if bias is None else made.op("moved", "Add", [result, bias]))


def _gelu(graph: ir.Graph, node: ir.Node) -> None:
    made, x = InPlaceOf(graph, node), node.inputs[0]
    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = made.op("cube", "Pow", [x, made.number("three", 3.0)])
        bent = made.op("bent", "Add", [x, made.op("small", "Mul", [cube, made.number("part", 0.044715)])])
        wide = made.op("wide", "Mul", [bent, made.number("width", math.sqrt(2 / math.pi))])
        share = made.op("share", "Tanh", [wide])
    else:
        share = made.op("share", "Erf", [made.op("narrow", "Div", [x, made.number("root", math.sqrt(2))])])
    twice = made.op("twice", "Mul", [x, made.op("above_zero", "Add", [share, made.number("one", 1.0)])])
    made.take_over(made.main("Mul", [twice, made.number("half", 0.5)]))


def _hard_swish(graph: ir.Graph, node: ir.Node) -> None:
    made, x = InPlaceOf(graph, node), node.inputs[0]
    gate = made.op("gate", "HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5})
    made.take_over(made.main("Mul", [x, gate]))


def _mish(graph: ir.Graph, node: ir.Node) -> None:
    made, x = InPlaceOf(graph, node), node.inputs[0]
    made.take_over(made.main("Mul", [x, made.op("gate", "Tanh", [made.op("soft", "Softplus", [x])])]))


OLDER_FORMS: dict[str, Callable[[ir.Graph, ir.Node], None]] = {
    **dict.fromkeys(
        ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
         "ReduceLogSumExp", "ReduceSumSquare"), _reduced,
    ),
    **dict.fromkeys(graphs.QDQ, _converted),
    "Split": _split, "Reshape": _reshaped, "GridSample": _sampled,
    "LayerNormalization": _normalised, "Gelu": _gelu, "HardSwish": _hard_swish, "Mish": _mish,
}  # fmt: skip
"""How a node is written before its op was what it is."""
