"""Shapes are known as far as onnx knows them, and sizes that no machine holds bring nothing down."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import MODELS
from onnx_ir.passes.common import ShapeInferencePass

from onnxq import constant_folding, machine, shapes
from onnxq import model as models
from onnxq.errors import OnnxqError

ABSURD = {
    "a vector without end": "t = Cast <to=7> (x)  u = Add (t, t)",
    "filled": "u = ConstantOfShape (size)",
    "known only by following shapes": "s = Cast <to=7> (size)  i = Identity (s)  u = ConstantOfShape (i)",
    "counted": "t = Range (nothing, far, step)  u = Add (t, t)",
    "repeated": "t = Tile (size, size)  u = Add (t, t)",
    "padded": "t = Pad (size, both)  u = Add (t, t)",
    "doubled": "s = Shape (x)  t = ConstantOfShape (s)  d0 = Reshape (t, free) "
    + " ".join(f"d{index + 1} = Concat <axis=0> (d{index}, d{index})" for index in range(40))
    + " u = Add (d40, d40)",
}


def network(body: str, size: int = 3_000_000_000, length: int = 8) -> ir.Model:
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[{length}] x) => (float[1] y) <int64[1] size = {{{size}}}, int64[2] both = {{0, {size}}},
          int64[1] free = {{-1}}, int64 nothing = {{0}}, int64 far = {{{size}}}, int64 step = {{1}}> {{
          {body}
          c = Cast <to=1> (u)  y = ReduceMax <keepdims=1> (c)
        }}"""
    )


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_are_refused_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "absurd.onnx"
    model = network(ABSURD[name], length=2**40 if name.startswith("a vector") else 8)
    ir.save(model, path)
    if name == "doubled" and onnx.__version__.startswith("1.18."):
        pytest.skip("this version of onnx follows fewer shapes")
    before = time.monotonic()
    with pytest.raises(OnnxqError, match="to fit in memory"):
        models.load(path)
    assert time.monotonic() - before < shapes.CHILD_SECONDS + 5


def test_long_vectors_that_fit_are_left_to_the_runtime() -> None:
    """More than inference may follow, less than memory; the float output's shape is known without."""
    model = network("t = Cast <to=7> (x)  u = Add (t, t)", length=2 * shapes.LONGEST_VECTOR)
    shapes.infer(model)
    shapes.check_sizes(model, "it")
    assert model.graph.outputs[0].shape == ir.Shape([1])


def test_constants_are_not_folded_into_huge_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("u = ConstantOfShape (size)", size=2 * constant_folding.FOLDED_ELEMENTS)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 40)
    models.normalise(model)
    assert "ConstantOfShape" in {node.op_type for node in model.graph}


def test_shapes_are_what_onnx_infers_with_all_it_has() -> None:
    for name in ("fashion_unet_guided", "fashion_resnet"):
        mine, theirs = (models.read(MODELS / f"{name}.onnx") for _ in range(2))
        shapes.infer(mine)
        ShapeInferencePass()(theirs)
        found, expected = (
            {value.name: (value.shape, value.type) for node in model.graph for value in node.outputs}
            for model in (mine, theirs)
        )
        assert found == expected
        assert list(mine.graph.initializers) == list(models.read(MODELS / f"{name}.onnx").graph.initializers)


def test_shapes_inside_branches() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (bool b, float[N,4] x) => (float[N,4] y) {
          y = If (b) <then_branch = one () => (o) { t = Relu (x)  o = Neg (t) },
                      else_branch = two () => (p) { p = Abs (x) }>
        }"""
    )
    shapes.infer(model)
    inner = [node.outputs[0] for graph in model.graphs() if graph is not model.graph for node in graph]
    assert len(inner) == 3 and all(value.shape is not None and value.shape[1] == 4 for value in inner)


def test_the_child_does_what_this_process_would() -> None:
    model = network("u = ConstantOfShape (size)", size=5)
    data = ir.to_proto(model).SerializeToString()
    inferred = shapes._infer_in_child(data)
    assert inferred is not None
    sizes = {info.name: list(info.type.tensor_type.shape.dim) for info in inferred.graph.value_info}
    assert [size.dim_value for size in sizes["u"]] == [5]
    assert shapes._infer_in_child(b"no model") is None


def test_models_of_unknown_sizes_are_accepted(tmp_path: Path) -> None:
    """-1, which some exporters write for what is free, is no size."""
    path = tmp_path / "free.onnx"
    model = network("u = Identity (x)")
    model.graph.inputs[0].shape = ir.Shape([-1])
    ir.save(model, path)
    assert shapes.elements(models.load(path).graph.inputs[0]) is None


def test_a_limit_is_a_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("u = ConstantOfShape (size)", size=1000)
    shapes.infer(model)
    shapes.check_sizes(model, "it")
    monkeypatch.setattr(machine, "memory_bytes", lambda: 4 * 3999)
    with pytest.raises(OnnxqError, match=r"found 'u' of shape \[1000\]"):
        shapes.check_sizes(model, "it")
    assert np.isfinite(machine.memory_bytes())
