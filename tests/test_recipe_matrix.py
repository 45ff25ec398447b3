"""The command on every recipe's page, on a small model of each kind: done, or refused in two lines.

The real models go through all recipes in ``tests/benchmarks/recipe_matrix.py``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import onnx_ir as ir
import pytest
from benchmarks.recipe_matrix import knobs_of
from conftest import NETWORK, SHAPES, add_weights
from test_cli_errors import run

from onnxq.recipes import RECIPES

pytest.importorskip("torch", reason="recipes that learn need torch")

PAGES = Path(__file__).resolve().parent.parent / "docs" / "recipes"

TRANSFORMER = """
<ir_version: 10, opset_import: ["" : 18]>
transformer (float[N,3,16,16] x) => (float[N,10] logits)
<int64[3] tokens = {0, 32, -1}, int64[4] heads = {0, 0, 2, 16}, int64[3] together = {0, 0, 32}, float scale = {0.25},
 int64[1] one = {1}>
{
    [patch] c = Conv <strides=[4,4]> (x, w0)
    r = Reshape (c, tokens)                     t = Transpose <perm=[0,2,1]> (r)
    [norm1] n = LayerNormalization (t, g1, b1)
    [query] q0 = MatMul (n, wq)                 q1 = Reshape (q0, heads)   q = Transpose <perm=[0,2,1,3]> (q1)
    [key] k0 = MatMul (n, wk)                   k1 = Reshape (k0, heads)   k = Transpose <perm=[0,2,3,1]> (k1)
    [value] v0 = MatMul (n, wv)                 v1 = Reshape (v0, heads)   v = Transpose <perm=[0,2,1,3]> (v1)
    [scores] s0 = MatMul (q, k)                 s = Mul (s0, scale)        p = Softmax (s)
    [mix] m0 = MatMul (p, v)                    m1 = Transpose <perm=[0,2,1,3]> (m0)   m = Reshape (m1, together)
    [project] o = MatMul (m, wo)                a = Add (t, o)
    [norm2] n2 = LayerNormalization (a, g2, b2)
    [up] u = MatMul (n2, wu)                    h = Relu (u)
    [down] d = MatMul (h, wd)                   f = Add (a, d)
    e = ReduceMean <keepdims=0> (f, one)        [head] logits = Gemm <transB=1> (e, wh, bh)
}
"""
SQUARE = dict.fromkeys(("wq", "wk", "wv", "wo"), (32, 32))
TRANSFORMER_SHAPES: dict[str, tuple[int, ...]] = {
    "w0": (32, 3, 4, 4), **SQUARE, "wu": (32, 64), "wd": (64, 32), "wh": (10, 32), "bh": (10,),
    **{f"{name}{index}": (32,) for name in "gb" for index in (1, 2)},
}  # fmt: skip

DENOISER = """
<ir_version: 10, opset_import: ["" : 17]>
denoiser (float[N,16,8,8] sample, int64[N] timestep) => (float[N,16,8,8] noise)
<float hundred = {100.0}, int64[2] column = {-1, 1}, int64[4] wide = {-1, 32, 1, 1}>
{
    [in] c = Conv <pads=[1,1,1,1]> (sample, w1)
    f = Cast <to=1> (timestep)   d = Div (f, hundred)   t = Reshape (d, column)
    [time1] e1 = Gemm <transB=1> (t, w2, b2)            e2 = Relu (e1)
    [time2] e3 = Gemm <transB=1> (e2, w3, b3)           e = Reshape (e3, wide)
    [add] a = Add (c, e)         r = Relu (a)
    [middle] m = Conv <pads=[1,1,1,1]> (r, w4)          [skip] s = Add (m, r)     k = Concat <axis=1> (s, c)
    [out] noise = Conv <pads=[1,1,1,1]> (k, w5)
}
"""
DENOISER_SHAPES: dict[str, tuple[int, ...]] = {
    "w1": (32, 16, 3, 3), "w2": (32, 1), "b2": (32,), "w3": (32, 32), "b3": (32,), "w4": (32, 32, 3, 3),
    "w5": (16, 64, 3, 3),
}  # fmt: skip

DECODER = """
<ir_version: 10, opset_import: ["" : 17]>
decoder (int64[N,S] input_ids) => (float[N,S,300] logits)
{
    [embed] t = Gather (embedding, input_ids)
    [norm] n = LayerNormalization (t, g1, b1)
    [up] u = MatMul (n, wu)   h = Relu (u)   [down] d = MatMul (h, wd)   a = Add (t, d)
    [norm2] n2 = LayerNormalization (a, g2, b2)
    [head] logits = MatMul (n2, wh)
}
"""
DECODER_SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (300, 128), "wu": (128, 256), "wd": (256, 128), "wh": (128, 300),
    **{f"{name}{index}": (128,) for name in "gb" for index in (1, 2)},
}  # fmt: skip

KINDS = {
    "cnn": (NETWORK, SHAPES), "transformer": (TRANSFORMER, TRANSFORMER_SHAPES),
    "denoiser": (DENOISER, DENOISER_SHAPES), "decoder": (DECODER, DECODER_SHAPES),
}  # fmt: skip

# What a recipe takes, where it refuses some kinds: made images need BatchNormalization or attention, and denoisers and
# decoders bring inputs of their own; block scales need products; tables of time need a timestep.
FINE_TUNED, TIMED, BLOCKS = {"cnn"}, {"denoiser"}, {"decoder"}
MADE = {"cnn", "denoiser", "decoder"}
APPLIES: dict[str, set[str]] = {
    "zeroq": MADE, "dsg": MADE, "genie": MADE, "psaq-vit": {"transformer", "denoiser", "decoder"},
    "gdfq": FINE_TUNED, "adadfq": FINE_TUNED, "hast": FINE_TUNED, "texq": FINE_TUNED, "zaq": {"cnn", "transformer"},
    "tfmq-dm": TIMED, "apq-dm": TIMED, "q-dm": TIMED, "ptqd": TIMED, "diffusion": TIMED,
    "int4-weights": BLOCKS, "awq": BLOCKS, "norm-tweaking": BLOCKS,
}  # fmt: skip


def page_command(recipe: str) -> list[str]:
    lines = re.findall(r"^onnxq .+$", (PAGES / f"{recipe}.md").read_text(), re.MULTILINE)
    assert len(lines) == 1
    return shlex.split(lines[0])[1:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_of_its_page(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    for kind, (text, shapes) in KINDS.items():
        folder = tmp_path / kind
        folder.mkdir()
        ir.save(add_weights(text, shapes), folder / "model.onnx")
        monkeypatch.chdir(folder)
        short = [*knobs_of(recipe), "--budget", "quick", "-n", "4", "--steps", "8", "-q"]
        code, stderr = run(capsys, *page_command(recipe), *short)
        said = stderr.splitlines()
        if code == 0:
            done.append(kind)
            assert [path.name for path in folder.iterdir() if path.suffix == ".onnx" and path.name != "model.onnx"]
        else:
            assert code == 2 and 1 <= len(said) <= 2 and said[0].startswith("error: expected"), (kind, stderr)
            assert [path.name for path in folder.iterdir()] == ["model.onnx"], (kind, "something was left behind")
    assert done == [kind for kind in KINDS if kind in APPLIES.get(recipe, KINDS)]
