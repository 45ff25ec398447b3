"""`onnxq specialize`: a model for one value of an input, or for one size, computes what it computed before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_cli_errors import run
from typer.testing import CliRunner

import onnxq
from onnxq import model as models
from onnxq.cli import app
from onnxq.runtime import Session

# A decoder as exporters merge it: with its cache it reads `past`, without it it does not.
MERGED = """<ir_version: 10, opset_import: ["" : 21]>
g (float[batch, length, 64] x, float[batch, before, 64] past, bool[1] use_cache) => (float[batch, all, 64] y) {
    [before] a = MatMul (x, w0)
    [if] b = If (use_cache) <
        then_branch = with () => (float[batch, all, 64] p) {
            [cached] m = MatMul (a, w1) [join] p = Concat <axis = 1> (past, m)
        },
        else_branch = without () => (float[batch, all, 64] q) { [fresh] q = MatMul (a, w2) }>
    [behind] y = MatMul (b, w3)
}"""


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return models.save(add_weights(MERGED, {f"w{index}": (64, 64) for index in range(4)}), tmp_path / "merged.onnx")


def special(path: Path, *arguments: str) -> Path:
    output = path.with_name("special.onnx")
    done = CliRunner().invoke(app, ["specialize", str(path), "-o", str(output), *arguments])
    assert done.exit_code == 0, done.output
    return output


@pytest.mark.parametrize(("value", "layer", "inputs"), [("true", "cached", ["x", "past"]), ("0", "fresh", ["x"])])
def test_the_branch_that_is_taken_can_be_quantized(value: str, layer: str, inputs: list[str], merged: Path) -> None:
    path = special(merged, "--input", f"use_cache={value}")
    model = models.read(path)
    assert [item.name for item in model.graph.inputs] == inputs
    assert [node.name for node in model.graph if node.op_type == "MatMul"] == ["before", f"if_{layer}", "behind"]
    assert not any(node.op_type == "If" for node in model.graph)
    assert len([name for name in model.graph.initializers if name.startswith("w")]) == 3  # the other branch's is gone
    feed = {name: np.random.default_rng(1).normal(size=(2, 5, 64)).astype(np.float32) for name in ("x", "past")}
    exact = Session(merged).run(feed | {"use_cache": np.array([value == "true"])})[0]
    np.testing.assert_array_equal(Session(path).run({name: feed[name] for name in inputs})[0], exact)
    found = onnxq.quantize(path, [{name: feed[name] for name in inputs}], target="cpu").numbers
    assert found["quantized_nodes"] == found["weighted_nodes"] == 3


def test_layers_in_a_branch_are_left_float_with_the_way_out(merged: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(2, 5, 64)).astype(np.float32)
    numbers = onnxq.quantize(merged, [{"x": rows, "past": rows, "use_cache": np.array([True])}], target="cpu").numbers
    assert set(numbers["left_float"]) == {"cached", "fresh"}
    assert all("onnxq specialize" in reason for reason in numbers["left_float"].values())


def test_sizes_are_fixed_wherever_their_name_stands_and_decide_what_follows(tmp_path: Path) -> None:
    """The second decision hangs on a shape behind the first."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[rows, width] x, float[rows, 64] other, bool[1] squared) => (float[rows, any] y) {
        a = If (squared) <then_branch = one () => (p) { p = Mul (x, x) }, else_branch = two () => (q) { q = Neg (x) }>
        size = Shape <start = 1> (a)
        wide = Equal (size, limit)
        b = If (wide) <then_branch = three () => (r) { r = MatMul (a, w0) }, else_branch = four () => (s) {
            s = MatMul (a, w1)
        }>
        y = Add (b, other)
    }"""
    model = add_weights(text, {"w0": (64, 64), "w1": (32, 64)})
    model.graph.initializers.add(ir.Value(name="limit", const_value=ir.tensor(np.array([64]), name="limit")))
    for node in model.graph:  # the parser made an outer value of its own of what has no producer
        for index, value in enumerate(node.inputs):
            if value is not None and value.name == "limit":
                node.replace_input_with(index, model.graph.initializers["limit"])
    path = special(models.save(model, tmp_path / "sized.onnx"), "--input", "squared=false", "--shapes", "x:3x64")
    found = models.read(path)
    assert [list(value.shape or ()) for value in found.graph.inputs] == [[3, 64], [3, 64]]
    assert list(found.graph.outputs[0].shape or ()) == [3, 64]
    assert {node.op_type for node in found.graph} == {"Neg", "MatMul", "Add"}


def test_a_name_that_stands_for_several_sizes_fixes_none_elsewhere(tmp_path: Path) -> None:
    """Some exporters call every free size alike."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[free, 3, free, free] x) => (float[free, 8, free, free] y)
    <float[free, 3, free, free] a> { a = Relu (x) y = Conv <pads = [1, 1, 1, 1]> (a, w) }"""
    path = models.save(add_weights(text, {"w": (8, 3, 3, 3)}), tmp_path / "free.onnx")
    found = models.read(special(path, "--shapes", "x:1x3x48x192"))
    assert list(found.graph.outputs[0].shape or ()) == [1, 8, 48, 192]
    assert list(found.graph.node(0).outputs[0].shape or ()) == [1, 3, 48, 192]


def test_several_numbers_fill_an_input_in_their_order(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 3] x, float[3] scale, float[2, 1] bias)
    => (float[2, 3] y) { a = Mul (x, scale) y = Add (a, bias) }"""
    path = models.save(add_weights(text, {}), tmp_path / "scaled.onnx")
    found = Session(special(path, "--input", "scale=1,-2,0.5", "--input", "bias=7"))
    np.testing.assert_array_equal(found.run({"x": np.ones((2, 3), np.float32)})[0], [[8.0, 5.0, 7.5], [8.0, 5.0, 7.5]])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected --input or --shapes"),
        (["--input", "use_cache"], "expected NAME=VALUE"),
        (["--input", "nothing=1"], "expected the name of an input, found 'nothing'"),
        (["--input", "use_cache=2"], "expected bool 1 for input 'use_cache', found '2'"),
        (["--input", "use_cache=true,false"], "expected bool 1 for input 'use_cache', found 'true,false'"),
        (["--input", "use_cache=1", "--input", "use_cache=0"], "expected one value of 'use_cache'"),
        (["--input", "past=0"], "expected an input of fixed size for a value, found 'past' of shape ?x?x64"),
        (["--shapes", "x:1x5x32"], "expected a shape that fits input 'x'"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], said: str, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run(capsys, "specialize", str(merged), *arguments)
    assert code == 2
    assert said in stderr
    assert not merged.with_name("merged.special.onnx").exists()


def test_a_number_that_nobody_can_guess_may_become_a_constant(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = run(capsys, "quantize", str(merged), "--shapes", "x:1x5x64", "--shapes", "past:1x5x64")
    assert code == 2
    assert "onnxq specialize MODEL --input use_cache=VALUE" in stderr
