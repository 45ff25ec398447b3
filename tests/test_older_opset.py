"""`--opset`: a result for runtimes that know no newer one computes the same, and what cannot be written is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db
from test_cli_errors import assert_two_lines, run

import onnxq
from onnxq import model as models
from onnxq.errors import OnnxqError
from onnxq.passes.lower_opset import LowerOpset
from onnxq.runtime import Session

HEAD = '<ir_version: 11, opset_import: ["" : OPSET]> g (float[2,8,6,6] x) => (float[2,?,?,?] y)'
SCALES = "<float[4] sizes = {1.0, 1.0, 2.0, 2.0}, int64[2] axes = {2, 3}, int64[4] flat = {2, 4, 2, 36}>"
OLDER = {
    "ReduceMean": ("[a] y = ReduceMean (x, axes)", ["ReduceMean"], 13),
    "ReduceSum": ("[a] y = ReduceSum (x, axes)", ["ReduceSum"], 13),
    "ReduceMax": ("[a] y = ReduceMax <keepdims = 1> (x, axes)", ["ReduceMax"], 17),
    "Split": ("[a] y, z = Split <axis = 1, num_outputs = 2> (x)", ["Split"], 13),
    "Split that is uneven": ("[a] z, v, y = Split <axis = 1, num_outputs = 3> (x)", ["Split"], 13),
    "LayerNormalization": (
        "[a] y = LayerNormalization <axis = -1, epsilon = 0.001> (x, w6, b6)",
        ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"],
        16,
    ),
    "LayerNormalization of two axes": (
        "[a] y = LayerNormalization <axis = 2> (x, w66)",
        ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"],
        13,
    ),
    "LayerNormalization that exists": ("[a] y = LayerNormalization (x, w6, b6)", ["LayerNormalization"], 17),
    "Gelu": ("[a] y = Gelu (x)", ["Div", "Erf", "Add", "Mul", "Mul"], 13),
    "Gelu by a tangent": (
        '[a] y = Gelu <approximate = "tanh"> (x)', ["Pow", "Mul", "Add", "Mul", "Tanh", "Add", "Mul", "Mul"], 19,
    ),
    "HardSwish": ("[a] y = HardSwish (x)", ["HardSigmoid", "Mul"], 13),
    "Mish": ("[a] y = Mish (x)", ["Softplus", "Tanh", "Mul"], 13),
    "Reshape": ("[a] y = Reshape <allowzero = 1> (x, flat)", ["Reshape"], 13),
    "Resize": ('[a] y = Resize <mode = "linear", antialias = 0> (x, , sizes)', ["Resize"], 13),
    "GroupNormalization": ("[a] y = GroupNormalization <num_groups = 2> (x, w8, b8)", None, 13),
    "GridSample": ('[a] y = GridSample <mode = "linear"> (x, grid)', ["GridSample"], 16),
}  # fmt: skip
SHAPES = {"w6": (6,), "b6": (6,), "w66": (6, 6), "w8": (8,), "b8": (8,), "grid": (2, 3, 3, 2)}


def model_of(body: str, opset: int = 21) -> ir.Model:
    """One op with what it reads."""
    text = f"{HEAD.replace('OPSET', str(opset)).replace('?', 'N')} {SCALES} {{ {body} }}"
    return add_weights(text, {name: shape for name, shape in SHAPES.items() if f", {name}" in body})


@pytest.mark.parametrize("name", OLDER)
def test_an_older_form_computes_the_same(name: str, tmp_path: Path) -> None:
    body, expected, opset = OLDER[name]
    path = models.save(model_of(body), tmp_path / "m.onnx")
    model = models.load(path)
    x = np.random.default_rng(0).normal(size=(2, 8, 6, 6)).astype(np.float32)
    (before,) = Session(model).run({"x": x})
    assert LowerOpset(opset, required=True)(model).modified
    assert model.graph.opset_imports[""] == opset and model.ir_version == {13: 7, 16: 8, 17: 8, 19: 9}[opset]
    (after,) = Session(model).run({"x": x})
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    if expected is not None:
        assert [node.op_type for node in model.graph] == expected


@pytest.mark.parametrize(
    ("body", "opset", "found", "least"),
    [
        ("[a] y = RMSNormalization (x, w6)", 17, "RMSNormalization 'a'", 23),
        ('[a] y = Pad <mode = "wrap"> (x, pads)', 17, "Pad 'a'", 19),
        ("[a] y = LayerNormalization (x, w6) [b] z = BitwiseNot (flat)", 13, "BitwiseNot 'b'", 18),
        ("[a] y = ReduceMean <noop_with_empty_axes = 1> (x)", 17, "ReduceMean 'a'", 18),  # nothing is reduced
        ('[a] y = GridSample <mode = "linear"> (x, grid)', 13, "GridSample 'a'", 16),
    ],
)
def test_what_cannot_be_written_is_named(body: str, opset: int, found: str, least: int) -> None:
    model = model_of(body.replace("pads", "flat"), 23)
    with pytest.raises(
        OnnxqError, match=f"expected a model that opset {opset} can express, found the {found}"
    ) as error:
        LowerOpset(opset, required=True)(model)
    assert f"need opset {least}" in error.value.message and f"--opset {least}" in error.value.hint


def test_a_new_default_is_no_old_one() -> None:
    """RoiAlign's pixels moved by half with opset 16, and nothing in the node says so."""
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1,2,8,8] x, float[3,4] r, int64[3] i) => (float[3,2,1,1] y)'
        " { [a] y = RoiAlign (x, r, i) }"
    )
    with pytest.raises(OnnxqError, match="RoiAlign"):
        LowerOpset(13, required=True)(ir.from_onnx_text(text))


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
@pytest.mark.parametrize("opset", [13, 17, 20])
def test_a_network_at_an_older_opset(network: Path, target: str, opset: int, tmp_path: Path) -> None:
    feed = {"x": np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)}
    usual = onnxq.quantize(network, [feed], target=target, output=tmp_path / "usual.onnx")
    older = onnxq.quantize(network, [feed], target=target, opset=opset, output=tmp_path / "older.onnx")
    written = onnx.load(tmp_path / "older.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", opset)]
    assert written.ir_version == {13: 7, 17: 8, 20: 9}[opset]
    assert older.numbers["quantized_nodes"] == usual.numbers["quantized_nodes"] > 0
    (one,), (other,) = (Session(tmp_path / f"{name}.onnx").run(feed) for name in ("usual", "older"))
    assert sqnr_db(one, other) > 40


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--weights", "fp8", "--activations", "fp8", "--opset", "17"], "found fp8, which needs opset 19"),
        (["--target", "cpu", "--activations", "int16", "--opset", "20"], "found int16, which needs opset 21"),
        (["--opset", "12"], "opset"),
        (["--opset", "99"], "opset"),
    ],
)
def test_refusals(
    network: Path, options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_two_lines(*run(capsys, "quantize", network, "-o", tmp_path / "q.onnx", *options), expected)
    assert not (tmp_path / "q.onnx").exists()
