"""Let what a graph draws at random be the same numbers in every session and every run."""

from __future__ import annotations

import math
import zlib

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.rewriting import InPlaceOf

PRIME = 2**31 - 1
FACTORS = (48271, 69621, 16807)  # each generates all remainders of the prime; a round of mixing for each


class RepeatDraws(InPlacePass):
    """Make the numbers that nodes draw at random from their places and the node's name.

    Before, as in encoders of latents and in speech that is made with noise::

        x ─► RandomNormalLike ─► noise

    After, a hash of each place and the inverse of a distribution::

        x ─► Shape ─► Range ─► Mul, Mod, … ─► Log, Cos, … ─► Reshape ─► noise

    onnxruntime goes on with its generator from run to run, and starts it at the node's place in the graph, so that a
    model differs from itself, and from the same with Q/DQ by more than its codes do. For judging alone: what is written
    draws as before. Multinomial stays as it is.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Replace every draw in the graph and in those inside it."""
        modified = False
        for graph in list(model.graphs()):
            for node in [node for node in graph if graphs.is_op(node, *graphs.DRAWS)]:
                _replace(graph, node)
                modified = True
        return PassResult(model, modified)


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    """Draw once for all runs."""
    made, attributes = InPlaceOf(graph, node), node.attributes
    like = node.inputs[0] if node.inputs else None
    wanted = attributes.get_int("dtype", 0)
    dtype = ir.DataType(wanted) if wanted else (None if like is None else like.dtype) or ir.DataType.FLOAT
    made.dtype = ir.DataType.FLOAT
    shape = made.integers("shape", attributes["shape"].as_ints()) if like is None else made.op("shape", "Shape", [like])
    source = _Places(made, shape)
    if node.op_type == "Bernoulli":
        assert like is not None
        result = made.op("drawn", "Less", [source.uniform("u"), made.as_type("chance", like, made.dtype)])
    elif node.op_type.startswith("RandomUniform"):
        low, high = attributes.get_float("low", 0.0), attributes.get_float("high", 1.0)
        result = source.scaled(source.uniform("u"), high - low, low)
    else:
        scale, mean = attributes.get_float("scale", 1.0), attributes.get_float("mean", 0.0)
        result = source.scaled(source.normal(), scale, mean)
    made.take_over(made.op("result", "Cast", [result], {"to": dtype}))


class _Places:
    """Numbers that look drawn, one for each place of a tensor.

    Args:
        made: Where the ops go; its type is float32.
        shape: The tensor's shape.
    """

    def __init__(self, made: InPlaceOf, shape: ir.Value) -> None:
        self.made, self.shape = made, shape
        count = made.op("count", "ReduceProd", [shape], {"keepdims": 0})
        self.places = made.op("places", "Range", [made.integers("first", 0), count, made.integers("step", 1)])
        self.prime = made.integers("prime", PRIME)

    def uniform(self, name: str) -> ir.Value:
        """Between 0 and 1, and never 0."""
        start = zlib.crc32(f"{self.made.node.name}/{name}".encode()) % PRIME
        number = self._op(f"{name}_moved", "Add", self.places, self.made.integers(f"{name}_start", start))
        before = number
        for step, factor in enumerate(FACTORS):
            inner = f"{name}_{step}"
            square = self._op(
                f"{inner}_remainder", "Mod", self._op(f"{inner}_square", "Mul", number, number), self.prime
            )
            wide = self._op(f"{inner}_wide", "Mul", square, self.made.integers(f"{inner}_factor", factor))
            mixed = self._op(f"{inner}_mixed", "Add", wide, before)
            number, before = self._op(inner, "Mod", mixed, self.prime), number
        drawn = self.made.as_type(f"{name}_number", number, self.made.dtype)
        above = self._op(f"{name}_above", "Add", drawn, self.made.number(f"{name}_half", 0.5))
        flat = self._op(name, "Mul", above, self.made.number(f"{name}_unit", 1 / PRIME))
        return self.made.op(f"{name}_shaped", "Reshape", [flat, self.shape], {"allowzero": 1})

    def normal(self) -> ir.Value:
        """With mean 0 and deviation 1 (Box and Muller)."""
        logarithm = self.made.op("log", "Log", [self.uniform("u")])
        squared = self._op("squared_radius", "Mul", logarithm, self.made.number("minus_two", -2.0))
        angle = self._op("angle", "Mul", self.uniform("v"), self.made.number("turn", 2 * math.pi))
        radius, cosine = self.made.op("radius", "Sqrt", [squared]), self.made.op("cosine", "Cos", [angle])
        return self._op("normal", "Mul", radius, cosine)

    def scaled(self, value: ir.Value, scale: float, offset: float) -> ir.Value:
        """``value * scale + offset``."""
        wide = self._op("scaled", "Mul", value, self.made.number("scale", scale))
        return self._op("moved", "Add", wide, self.made.number("offset", offset))

    def _op(self, name: str, op_type: str, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.made.op(name, op_type, [x, y])
