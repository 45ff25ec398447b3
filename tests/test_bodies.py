"""Layers in branches and loops: found, given codes where no range has to be calibrated, and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db
from test_cli_errors import run
from test_specialize import MERGED
from typer.testing import CliRunner

import onnxq
from onnxq import model as models
from onnxq.autograd.blocks import cut
from onnxq.bodies import bodies
from onnxq.cli import app
from onnxq.passes.free_invariants import FreeInvariants
from onnxq.runtime import Session

# A recurrent cell as tf2onnx and paddle2onnx write it: its weights are carried from step to step.
CELL = """<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 64] x, float[5, 1, 64] steps) => (float[1, 64] y, float[n, 1, 64] all, float[64, 64] last)
<int64 length = {5}, bool yes = {1}> {
    [loop] y, carried, changed, all = Loop (length, yes, x, w0, w1) <body = cell
        (int64 i, bool go, float[1, 64] h, float[64, 64] w, float[64, 64] v) =>
        (bool goes, float[1, 64] next, float[64, 64] same, float[64, 64] v_next, float[1, 64] each) {
        goes = Identity (go)
        step = Gather <axis = 0> (steps, i)
        [inside] product = MatMul (h, w)
        both = Add (product, step)
        next = Tanh (both)
        each = Neg (next)
        same = Identity (w)
        v_next = Add (v, w)
    }>
    last = Add (carried, changed)
}"""

SCAN = """<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 64] x, float[5, 1, 64] steps) => (float[1, 64] y, float[5, 1, 64] all) {
    [scan] y, carried, all = Scan <num_scan_inputs = 1, body = cell
        (float[1, 64] h, float[64, 64] w, float[1, 64] step) =>
        (float[1, 64] next, float[64, 64] same, float[1, 64] each) {
        [inside] product = MatMul (h, w)
        both = Add (product, step)
        next = Tanh (both)
        each = Neg (next)
        same = Identity (w)
    }> (x, w0, steps)
}"""

WEIGHTS = {f"w{index}": (64, 64) for index in range(4)}
ROWS = np.random.default_rng(1).normal(size=(2, 6, 64)).astype(np.float32)
SAMPLE = {"x": ROWS, "past": ROWS, "use_cache": np.array([True])}


def loop_feed() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(2)
    return {
        "x": generator.normal(size=(1, 64)).astype(np.float32),
        "steps": generator.normal(size=(5, 1, 64)).astype(np.float32),
    }


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """Both branches have the same weight, as those of one network do."""
    text = MERGED.replace("(a, w2)", "(a, w1)")
    return models.save(add_weights(text, {f"w{index}": (64, 64) for index in (0, 1, 3)}), tmp_path / "merged.onnx")


def op_types(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph.all_nodes()]


@pytest.mark.parametrize(("text", "free", "kept"), [(CELL, 1, 2), (SCAN, 1, 1)])
def test_what_a_loop_only_carries_is_read_from_outside(text: str, free: int, kept: int, tmp_path: Path) -> None:
    """The second matrix of the loop changes and stays carried; what is read of the first behind the loop is itself."""
    shapes = {name: (64, 64) for name in ("w0", "w1") if name in text}
    path = models.save(add_weights(text, shapes), tmp_path / "loop.onnx")
    exact = Session(path).run(loop_feed())
    model = ir.load(path)
    before = next(len(node.inputs) for node in model.graph if node.op_type in ("Loop", "Scan"))
    assert FreeInvariants()(model).modified and not FreeInvariants()(model).modified
    node = next(node for node in model.graph if node.op_type in ("Loop", "Scan"))
    assert len(node.inputs) == before - free and len(node.outputs) == kept + 1
    ir.save(model, tmp_path / "free.onnx")
    for value, expected in zip(Session(tmp_path / "free.onnx").run(loop_feed()), exact, strict=True):
        np.testing.assert_allclose(
            value, expected, rtol=0, atol=1e-5
        )  # constant weights are packed and summed otherwise


def test_a_body_that_nothing_is_done_to_stays_as_it_is(merged: Path) -> None:
    model = ir.load(merged)
    before = ir.to_proto(model).SerializeToString()
    for inner in bodies(model):
        assert [value.name for value in inner.graph.initializers.values()] == ["w1"]
        assert {value.name for value in inner.graph.inputs} <= {"a", "past"}
    assert ir.to_proto(model).SerializeToString() == before


def test_a_body_that_would_hand_on_what_is_outside_gives_a_copy(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <
            then_branch = a () => (p) { n = Neg (x) p = Identity (n) },
            else_branch = b () => (q) { q = Neg (x) }>
    }"""
    model = ir.from_onnx_text(text)
    for inner in bodies(model):
        inner.graph.outputs[0] = inner.graph.inputs[0]
    path = models.save(model, tmp_path / "copied.onnx")
    np.testing.assert_array_equal(Session(path).run({"x": np.ones(2, np.float32), "c": np.array(True)})[0], [1, 1])


@pytest.mark.parametrize("taken", [True, False])
def test_both_branches_run_on_integers_and_share_their_codes(taken: bool, merged: Path, tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    made = onnxq.quantize(merged, [SAMPLE], output=output, recipe="int8-dynamic")
    assert made.numbers["quantized_nodes"] == made.numbers["weighted_nodes"] == 4
    assert made.numbers["integer_kernels"] == 4 and not made.numbers["left_float"]
    assert op_types(output).count("MatMulInteger") == 4
    codes = [value for value in ir.load(output).graph.initializers.values() if value.dtype == ir.DataType.INT8]
    assert len([value for value in codes if value.shape == (64, 64)]) == 3  # that of both branches once
    feed = SAMPLE | {"use_cache": np.array([taken])}
    assert sqnr_db(Session(merged).run(feed)[0], Session(output).run(feed)[0]) > 30


def test_a_loop_runs_on_integers(tmp_path: Path) -> None:
    path, output = tmp_path / "cell.onnx", tmp_path / "quantized.onnx"
    models.save(add_weights(CELL, {"w0": (64, 64), "w1": (64, 64)}), path)
    made = onnxq.quantize(path, [loop_feed()], output=output, recipe="int8-dynamic")
    assert made.numbers["quantized_nodes"] == made.numbers["weighted_nodes"] == 1
    exact, found = Session(path).run(loop_feed()), Session(output).run(loop_feed())
    assert sqnr_db(exact[0], found[0]) > 30 and sqnr_db(exact[1], found[1]) > 30


def test_blocks_of_four_bits_lie_in_the_branch_that_reads_them(merged: Path, tmp_path: Path) -> None:
    """onnxruntime refuses them elsewhere."""
    output = tmp_path / "quantized.onnx"
    made = onnxq.quantize(merged, [SAMPLE], output=output, recipe="int4-weights", target="cpu", weights="int4:32")
    assert made.numbers["quantized_nodes"] == made.numbers["integer_kernels"] == 4
    assert sqnr_db(Session(merged).run(SAMPLE)[0], Session(output).run(SAMPLE)[0]) > 15


def test_calibrated_ranges_stop_at_a_branch(merged: Path) -> None:
    made = onnxq.quantize(merged, [SAMPLE], target="cpu")
    assert set(made.numbers["left_float"]) == {"cached", "fresh"}
    assert any("onnxq specialize" in warning for warning in made.numbers["warnings"])


def test_layers_inside_are_named_alone(merged: Path) -> None:
    made = onnxq.quantize(merged, [SAMPLE], recipe="int8-dynamic", only=["cached"])
    assert made.numbers["quantized_nodes"] == 1 and "cached" not in made.numbers["left_float"]
    assert set(made.numbers["left_float"].values()) == {"excluded"}


def test_layers_inside_are_excluded_by_name(merged: Path) -> None:
    made = onnxq.quantize(merged, [SAMPLE], recipe="int8-dynamic", exclude=["cached"])
    assert made.numbers["quantized_nodes"] == 3 and made.numbers["left_float"] == {"cached": "excluded"}


def test_a_network_that_lies_in_branches_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A static recipe has nothing to calibrate there, and says which one has."""
    text = MERGED.replace("[before] a = MatMul (x, w0)", "a = Relu (x)").replace("MatMul (b, w3)", "Relu (b)")
    path = models.save(add_weights(text, {"w1": (64, 64), "w2": (64, 64)}), tmp_path / "branches.onnx")
    np.savez(tmp_path / "data.npz", **SAMPLE)
    arguments = ["quantize", str(path), "--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "out.onnx")]
    code, error = run(capsys, *arguments, "--target", "cpu")
    assert code == 2 and "--recipe int8-dynamic" in error
    assert CliRunner().invoke(app, [*arguments, "--recipe", "int8-dynamic"]).exit_code == 0
    assert op_types(tmp_path / "out.onnx").count("MatMulInteger") == 2


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int4-weights"])
def test_codes_inside_are_read_back(
    recipe: str, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, floats, fixed = tmp_path / "quantized.onnx", tmp_path / "float.onnx", tmp_path / "fixed.onnx"
    onnxq.quantize(merged, [SAMPLE], output=path, recipe=recipe, target="cpu")
    code, error = run(capsys, "quantize", path)
    assert code == 2 and "quantized already" in error
    assert CliRunner().invoke(app, ["strip", str(path), "-o", str(floats)]).exit_code == 0
    assert set(op_types(floats)) == {"If", "MatMul", "Concat"}
    assert len(ir.load(floats).graph.initializers) == 3
    done = CliRunner().invoke(app, ["lint", str(path), "--target", "cpu", "--fix", str(fixed)])
    assert done.exit_code == 0 and "4 layers on codes, 0 in float" in done.output
    assert sorted(op_types(fixed)) == sorted(op_types(path))
    for feed in (SAMPLE, SAMPLE | {"use_cache": np.array([False])}):
        codes, exact = Session(path).run(feed)[0], Session(floats).run(feed)[0]
        assert sqnr_db(codes, exact) > 35  # either kernel rounds what it multiplies to 8 bits
        assert sqnr_db(codes, Session(fixed).run(feed)[0]) > 90


def test_for_tensorrt_branches_become_float_and_the_rest_keeps_its_codes(merged: Path, tmp_path: Path) -> None:
    path, fixed = tmp_path / "quantized.onnx", tmp_path / "fixed.onnx"
    onnxq.quantize(merged, [SAMPLE], output=path, recipe="int8-dynamic")
    done = CliRunner().invoke(app, ["lint", str(path), "--target", "tensorrt", "--fix", str(fixed)])
    assert done.exit_code == 0, done.output
    assert "2 layers on codes, 2 in float" in done.output and "inside the If" in done.output
    assert op_types(fixed).count("MatMul") == 4


def test_narrow_weights_of_a_channel_have_eight_bits_inside(merged: Path, tmp_path: Path) -> None:
    """Nothing is learned or corrected there."""
    output = tmp_path / "quantized.onnx"
    made = onnxq.quantize(merged, [SAMPLE], output=output, recipe="rex", target="cpu", activations="dynamic")
    assert made.numbers["quantized_nodes"] == 4
    assert sqnr_db(Session(merged).run(SAMPLE)[0], Session(output).run(SAMPLE)[0]) > 30


def test_weights_alone_of_eight_bits_inside(merged: Path, tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    options = {"recipe": "int8", "target": "cpu", "activations": "float"}
    assert onnxq.quantize(merged, [SAMPLE], output=output, **options).numbers["quantized_nodes"] == 4
    assert sqnr_db(Session(merged).run(SAMPLE)[0], Session(output).run(SAMPLE)[0]) > 35


def test_blocks_to_learn_end_where_a_branch_reads() -> None:
    """What a branch reads of the main graph counts as read by its If."""
    text = MERGED.replace("[before] a = MatMul (x, w0)", "[before] m = MatMul (x, w0) a = Add (m, x)")
    text = text.replace("[cached] m = MatMul (a, w1)", "[cached] m2 = MatMul (m, w1)").replace(
        "(past, m)", "(past, m2)"
    )
    model = add_weights(text, WEIGHTS)
    apart, together = cut(model.graph), cut(add_weights(text.replace("(m, w1)", "(a, w1)"), WEIGHTS).graph)
    assert [block.output for block in together] == ["a", "y"]  # a layer and the sum behind it
    assert [block.output for block in apart] == ["m", "y"]
