"""A layer that no target gives Q/DQ is counted and named, never silently float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models
from onnxq.passes.expand_fusions import EXPANSIONS

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g (float[2,8,64] x, bool c) => (float[2,8,64] y)'
FIRST = "[first] a = MatMul (x, w0) "
LAST = " [last] y = MatMul (b, w9)"
CASES = {
    "If": (
        "[if] b = If (c) <"
        "then_branch = t () => (float[2,8,64] p) { [inner] p = MatMul (a, w1) }, "
        "else_branch = e () => (float[2,8,64] q) { [other] q = MatMul (a, w2) }>",
        {"inner": "inside the If 'if'", "other": "inside the If 'if'"},
    ),
    "GRU": (
        "[gru] l, h = GRU <hidden_size = 64> (a, wide, wide) b = Squeeze (l, one)",
        {"gru": "the weights of GRU have no form with Q/DQ"},
    ),
    "Einsum": (  # of a diagonal, which no MatMul reads
        '[sum] b = Einsum <equation = "nij,jj->nij"> (a, w1)',
        {"sum": "an Einsum has no kernel for codes"},
    ),
    "domain": (
        "[fused] b = com.microsoft.FusedMatMul (a, w1)",
        {"fused": "it is of the domain com.microsoft"},
    ),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name in CASES for target in ("tensorrt", "cpu") if (name, target) != ("domain", "tensorrt")],
)  # TensorRT has no op of that domain
def test_what_stays_float_is_named(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(EXPANSIONS, "FusedMatMul")  # stands for an op that is not known
    body, expected = CASES[name]
    inits = "<int64[1] one = {1}>" if "one)" in body else ""
    text = f"{HEAD} {inits} {{ {FIRST}{body}{LAST} }}"
    shapes = {f"w{index}": (64, 64) for index in (0, 1, 2, 9) if f"w{index})" in text}
    shapes |= {"wide": (1, 192, 64)} if "wide" in text else {}
    path = models.save(add_weights(text, shapes), tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(size=(2, 8, 64)).astype(np.float32)
    numbers = onnxq.quantize(path, [{"x": x, "c": np.asarray(True)}], target=target).numbers
    assert numbers["quantized_nodes"] == 2
    assert numbers["weighted_nodes"] == 2 + len(expected)
    found = {key: reason.split(";")[0] for key, reason in numbers["left_float"].items()}
    assert found == expected
    assert any(
        f"{len(expected)} of {2 + len(expected)} layers stay float" in warning for warning in numbers["warnings"]
    )
