"""Write an Einsum as the products, sums and transpositions that it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.rewriting import InPlaceOf

ELLIPSIS = "..."
AXES_OF_AN_ELLIPSIS = "9876543210"  # from the right, where axes are aligned


class ExpandEinsum(InPlacePass):
    """Take every Einsum apart whose products a MatMul can make; the function stays as it was.

    Before, as exporters write what Keras' attention, einops and many papers' sources are made of::

        x, w ─► Einsum("abc,cde->abde") ─► y                q, k ─► Einsum("bihd,bjhd->bhij") ─► scores

    After, with the weight's own axes joined when the model is read::

        x, w ─► MatMul ─► Reshape ─► y                      q, k ─► Transpose ─► MatMul ─► scores

    No kernel reads codes in an Einsum, while a MatMul is a layer to every pass. Operands are multiplied from left to
    right, a constant one is the right factor, and what only the left one has is a stack of matrices. An Einsum
    that reads a diagonal, or joins axes of unknown sizes, stays as it is, and so does one of integers.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Expand every Einsum of a known form, in the graph itself and in those inside it."""
        modified = False
        for graph in model.graphs():
            found = [node for node in graph if graphs.is_op(node, "Einsum")]
            names = graphs.Names(graph) if found else None
            for node in found:
                operands = [value for value in node.inputs if value is not None and value.shape is not None]
                terms = read(node.attributes["equation"].as_string(), [len(value.shape or ()) for value in operands])
                if terms is None or len(operands) != len(node.inputs) or not graphs.is_float(node.outputs[0]):
                    continue
                expansion = _Expansion(InPlaceOf(graph, node, names), operands, terms[:-1])
                result = expansion.to(terms[-1])
                if result is not None:
                    expansion.made.take_over(result)
                    modified = True
        return PassResult(model, modified)


def read(equation: str, ranks: Sequence[int]) -> list[str] | None:
    """A letter for each axis of each operand, and for those of the result.

    Args:
        equation: As the attribute has it; the result may be left out.
        ranks: How many axes each operand has.

    Returns:
        A term for each operand and one for the result; ``None`` where an axis is named twice, ranks do not fit, or an
        ellipsis is summed.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    hidden = [rank - len(term.replace(ELLIPSIS, "")) for term, rank in zip(terms, ranks, strict=True)]
    if any(count < 0 or (count > 0 and ELLIPSIS not in term) for term, count in zip(terms, hidden, strict=True)):
        return None
    if not arrow:
        letters = left.replace(ELLIPSIS, "").replace(",", "")
        right = (ELLIPSIS if ELLIPSIS in left else "") + "".join(sorted(x for x in letters if letters.count(x) == 1))
    most = max(hidden)
    if most > len(AXES_OF_AN_ELLIPSIS) or (most > 0 and ELLIPSIS not in right):
        return None
    written = [
        term.replace(ELLIPSIS, AXES_OF_AN_ELLIPSIS[len(AXES_OF_AN_ELLIPSIS) - count :])
        for term, count in zip([*terms, right], [*hidden, most], strict=True)
    ]
    return None if any(len(set(term)) < len(term) for term in written) else written


class _Expansion:
    """The ops for one Einsum, and the sizes of its axes as far as they are known."""

    def __init__(self, made: InPlaceOf, operands: Sequence[ir.Value], terms: Sequence[str]) -> None:
        self.made, self.operands, self.terms = made, operands, terms
        self.sizes: dict[str, int] = {}
        self.stretched: set[str] = set()  # of size 1 somewhere, and of another elsewhere
        for value, term in zip(operands, terms, strict=True):
            for axis, size in zip(term, value.shape or (), strict=True):
                if isinstance(size, int) and self.sizes.setdefault(axis, size) != size:
                    self.stretched.add(axis)

    def to(self, result: str) -> ir.Value | None:
        """The result with these axes, or ``None``."""
        value, term = self.operands[0], self.terms[0]
        for index in range(1, len(self.operands)):
            other, other_term = self.operands[index], self.terms[index]
            wanted = set(result).union(*self.terms[index + 1 :])
            value, term = self._summed(f"left_{index}", value, term, wanted | set(other_term))
            other, other_term = self._summed(f"right_{index}", other, other_term, wanted | set(term))
            kept = "".join(axis for axis in dict.fromkeys(term + other_term) if axis in wanted)
            last = index == len(self.operands) - 1
            product = self._product(index, (value, term), (other, other_term), result if last else kept, last)
            if product is None:
                return None
            value, term = product, result if last else kept
        if len(self.operands) == 1:
            value, term = self._summed("sum", value, term, set(result))
            value = self._transposed("result", value, term, result)
        return self.made.op("same", "Identity", [value]) if value is self.operands[0] else value

    def _product(
        self, index: int, left: tuple[ir.Value, str], right: tuple[ir.Value, str], result: str, last: bool
    ) -> ir.Value | None:
        """Two operands multiplied, with the axes of ``result``."""
        (x, a), (y, b) = left, right
        shared = [axis for axis in result if axis in a and axis in b]
        summed = "".join(axis for axis in a if axis in b and axis not in result)
        own_x, own_y = ("".join(axis for axis in result if axis in term and axis not in shared) for term in (a, b))
        if not summed or not (own_x or own_y):
            layout = result + summed
            x, y = (self._spread(f"{side}_{index}", v, term, layout) for side, v, term in (("x", x, a), ("y", y, b)))
            return self._summed(f"product_{index}", self._made(index, "Mul", x, y, last), layout, set(result))[0]
        constant_x, constant_y = graphs.is_constant(x), graphs.is_constant(y)
        if (constant_x and not constant_y) or (constant_x == constant_y and len(own_y) > len(own_x)):
            (x, a, own_x), (y, b, own_y) = (y, b, own_y), (x, a, own_x)
        unknown = [axis for term in (summed, own_y) if len(term) > 1 for axis in term if axis not in self.sizes]
        if unknown or self.stretched & set(summed + own_y):
            return None
        batch = "".join(shared)
        outer = own_x[:-1] + batch
        x = self._transposed(f"x_{index}", x, a, outer + own_x[-1:] + summed)
        y = self._transposed(f"y_{index}", y, b, batch + summed + own_y)
        if not own_x:
            x = self._with(f"x_{index}_row", "Unsqueeze", x, [len(outer)])
        if not own_y:
            y = self._with(f"y_{index}_column", "Unsqueeze", y, [len(batch) + len(summed)])
        if len(summed) > 1:
            x = self._with(f"x_{index}_joined", "Reshape", x, [0] * (len(outer) + 1) + [self._together(summed)])
        if len(summed) > 1 or len(own_y) > 1:
            size = self._together(summed) if len(summed) > 1 else 0
            y = self._with(f"y_{index}_joined", "Reshape", y, [0] * len(batch) + [size, -1])
        value = self._made(index, "MatMul", x, y, last)
        if len(own_y) > 1:
            sizes = [self.sizes[axis] for axis in own_y]
            value = self._with(f"product_{index}_apart", "Reshape", value, [0] * (len(outer) + 1) + sizes)
        if not own_y:
            value = self._with(f"product_{index}_column", "Squeeze", value, [len(outer) + 1])
        if not own_x:
            value = self._with(f"product_{index}_row", "Squeeze", value, [len(outer)])
        return self._transposed(f"product_{index}", value, outer + own_x[-1:] + own_y, result)

    def _made(self, index: int, op_type: str, x: ir.Value, y: ir.Value, last: bool) -> ir.Value:
        """A product; the last one has the node's name."""
        return self.made.main(op_type, [x, y]) if last else self.made.op(f"product_{index}", op_type, [x, y])

    def _summed(self, name: str, value: ir.Value, term: str, wanted: set[str]) -> tuple[ir.Value, str]:
        """The sum over the axes that nothing else has."""
        axes = [index for index, axis in enumerate(term) if axis not in wanted]
        if not axes:
            return value, term
        summed = self.made.op(f"{name}_sum", "ReduceSum", [value, self._integers(name, axes)], {"keepdims": 0})
        return summed, "".join(axis for axis in term if axis in wanted)

    def _transposed(self, name: str, value: ir.Value, term: str, wanted: str) -> ir.Value:
        """The same with its axes in another order."""
        if term == wanted:
            return value
        return self.made.op(f"{name}_transposed", "Transpose", [value], {"perm": [term.index(axis) for axis in wanted]})

    def _spread(self, name: str, value: ir.Value, term: str, result: str) -> ir.Value:
        """The same as another operand of an elementwise product: axes in their order, those that it lacks of size 1."""
        value = self._transposed(name, value, term, "".join(axis for axis in result if axis in term))
        missing = [index for index, axis in enumerate(result) if axis not in term]
        return self._with(f"{name}_axes", "Unsqueeze", value, missing) if missing else value

    def _with(self, name: str, op_type: str, value: ir.Value, numbers: Sequence[int]) -> ir.Value:
        """The result of an op with a second input of whole numbers."""
        return self.made.op(name, op_type, [value, self._integers(name, numbers)])

    def _integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        return self.made.integers(f"{name}_shape", numbers)

    def _together(self, term: str) -> int:
        """The number of elements along several axes."""
        return math.prod(self.sizes[axis] for axis in term)
