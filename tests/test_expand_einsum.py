"""An Einsum is the products it stands for: the same numbers, and layers that get codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models
from onnxq.passes.expand_einsum import ExpandEinsum, read
from onnxq.runtime import Session

SIZES = dict(zip("abcdefghijkmnqtvwx", (2, 3, 4, 5, 3, 2, 4, 6, 5, 3, 2, 4, 3, 2, 5, 3, 4, 2), strict=True))
EQUATIONS = (
    "nij,jk->nik", "abc,cde->abde", "abde,dec->abc", "bihd,bjhd->bhij", "bhij,bjhd->bihd", "bhdn,bhen->bhde",
    "nkctv,kvw->nctw", "bhwc,hkc->bhwk", "bhwc,wkc->bhwk", "b i d, b j d -> b i j", "ij,jk", "ji,jk", "ij->ji", "ij->i",
    "ij->", "ij->ij", "i,j->ij", "i,i->", "bij,bij->b", "bij,bij->bij", "bqd,dk->bq", "abc,dc->abd", "dc,abc->dab",
    "kd,bkq->bdq", "abij,abjk->ik", "i,ij->j", "aij,bjk->abik", "aijx,bjk->abixk", "ni,ij,jk->nk", "ij,kj,kx,xq->iq",
    "bqd,kd,ke->bqe", "ij,ik,jk->", "aij,bij->ab",
)  # fmt: skip
OTHERS = (
    ("...ij,...jk->...ik", ((2, 3, 4), (2, 4, 5))),
    ("...ij,...jk", ((2, 1, 3, 4), (2, 3, 4, 5))),  # 1 is stretched
    ("...ij,jk->...ik", ((2, 3, 4, 5), (5, 6))),
    ("...ij,...jk->...ik", ((2, 3, 4, 5), (3, 5, 6))),  # axes are aligned from the right
    ("ij,...jk->...ik", ((4, 5), (2, 3, 5, 6))),
    ("b...,b...->b...", ((2, 3, 4), (2, 3, 4))),
    ("b...c->bc...", ((2, 3, 4, 5),)),
)


def sized(equation: str) -> tuple[str, list[tuple[int, ...]]]:
    """An equation of letters with the shapes of its operands."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    return equation, [tuple(SIZES[axis] for axis in term) for term in terms]


CASES = [*map(sized, EQUATIONS), *((equation, list(shapes)) for equation, shapes in OTHERS)]


def model_of(equation: str, shapes: list[tuple[int, ...]], constant: int | None, rank: int) -> ir.Model:
    """One Einsum, whose batch may be of any size, with one operand a constant."""
    names = [f"x{index}" for index in range(len(shapes))]
    given = ", ".join(
        f"float[{','.join(map(str, shape))}] {name}"
        for index, (name, shape) in enumerate(zip(names, shapes, strict=True))
        if index != constant
    )
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> g ({given}) => (float[{",".join(["?"] * rank)}] y) '
        f'{{ [sum] y = Einsum <equation = "{equation}"> ({", ".join(names)}) }}'
    )
    return add_weights(text.replace("?", "N"), {} if constant is None else {names[constant]: shapes[constant]})


@pytest.mark.parametrize(("equation", "shapes"), CASES, ids=[case[0] for case in CASES])
def test_it_computes_the_same(equation: str, shapes: list[tuple[int, ...]]) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    expected = np.einsum(equation.replace(" ", ""), *arrays)
    for constant in (None, *range(len(arrays))) if len(arrays) > 1 else (None,):
        model = model_of(equation, shapes, constant, expected.ndim)
        feed = {f"x{index}": array for index, array in enumerate(arrays) if index != constant}
        if constant is not None:
            held = model.graph.initializers[f"x{constant}"]
            held.const_value = ir.tensor(arrays[constant], name=held.name)
        assert ExpandEinsum()(model).modified
        assert not any(node.op_type == "Einsum" for node in model.graph)
        (found,) = Session(model).run(feed)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_stays_as_it_is_in_the_file() -> None:
    """Axes that a weight has in the right order cost neither a Transpose nor a Reshape of what it multiplies."""
    for equation, shapes in (("nij,jk->nik", [(3, 5, 3), (3, 2)]), ("...ij,jk->...ik", [(2, 3, 5, 3), (3, 2)])):
        model = model_of(equation, shapes, 1, len(shapes[0]))
        ExpandEinsum()(model)
        assert [(node.op_type, node.name) for node in model.graph] == [("MatMul", "sum")]


@pytest.mark.parametrize(
    ("equation", "operands", "sizes"),
    [
        ("ii->i", "x", ["3,3"]),  # a diagonal
        ("...i,...i->i", "x, x", ["2,3"]),  # an ellipsis that is summed
        ("aij,bjk->abik", "x, z", ["A,I,J", "B,J,K"]),  # two axes of a right factor whose sizes are not known
    ],
)
def test_other_forms_stay(equation: str, operands: str, sizes: list[str]) -> None:
    given = ", ".join(f"float[{size}] {name}" for size, name in zip(sizes, "xz", strict=False))
    rank = len(equation.split("->")[1])
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> g ({given}) => (float[{",".join("PQRS"[:rank])}] y) '
        f'{{ y = Einsum <equation = "{equation}"> ({operands}) }}'
    )
    model = ir.from_onnx_text(text)
    assert not ExpandEinsum()(model).modified
    assert [node.op_type for node in model.graph] == ["Einsum"]


def test_terms() -> None:
    assert read("ij,jk", [2, 2]) == ["ij", "jk", "ik"]
    assert read("ba", [2]) == ["ba", "ab"]  # letters of a result that is not written are in their own order
    assert read("...a,b->...ab", [3, 1]) == ["10a", "b", "10ab"]
    assert read("ij,jk->ik", [2]) is None
    assert read("ij->i", [3]) is None


ATTENTION = (
    '<ir_version: 10, opset_import: ["" : 21]> g (float[B,16,64] x) => (float[B,16,64] y) <float[1] s = {0.25}> {'
    ' [query] q = Einsum <equation = "abc,cde->abde"> (x, wq)'
    ' [key] k = Einsum <equation = "abc,cde->abde"> (x, wk)'
    ' [value] v = Einsum <equation = "abc,cde->abde"> (x, wv)'
    " scaled = Mul (q, s)"
    ' [scores] p = Einsum <equation = "aecd,abcd->acbe"> (k, scaled)'
    " soft = Softmax <axis = -1> (p)"
    ' [mix] m = Einsum <equation = "acbe,aecd->abcd"> (soft, v)'
    ' [out] y = Einsum <equation = "abcd,cde->abe"> (m, wo) }'
)


@pytest.mark.parametrize(("target", "quantized"), [("tensorrt", 6), ("cpu", 4)])
def test_attention_as_keras_writes_it(target: str, quantized: int, tmp_path: Path) -> None:
    """Four weights of three axes and two products: layers like any others, under the names that the file gave them."""
    shapes = {"wq": (64, 4, 16), "wk": (64, 4, 16), "wv": (64, 4, 16), "wo": (4, 16, 64)}
    path = models.save(add_weights(ATTENTION, shapes), tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(size=(8, 16, 64)).astype(np.float32)
    numbers = onnxq.quantize(path, [{"x": x}], target=target).numbers
    assert (numbers["quantized_nodes"], numbers["weighted_nodes"]) == (quantized, 6)
    assert numbers["sqnr_db"] > 25
    excluded = onnxq.quantize(path, [{"x": x}], target=target, exclude=["query"]).numbers
    assert excluded["quantized_nodes"] == quantized - 1
