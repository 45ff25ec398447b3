"""Sizes that a model leaves free: chosen on the command line for made inputs and images; the file keeps them free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_cli_errors import assert_two_lines, run

import onnxq
from onnxq import OnnxqError, kinds
from onnxq import model as models
from onnxq.calibration import data, sizes

ANY_SIZE = """
<ir_version: 8, opset_import: ["" : 17]>
any_size (float[N,3,H,W] x) => (float[N,8] y)
{
    [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
    [norm] b = BatchNormalization (a, g, c, m, v)
    [act] r = Relu (b)
    [second] s = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w2)
    [pool] p = GlobalAveragePool (s)
    [flat] f = Flatten (p)
    [last] y = Gemm <transB = 1> (f, w3)
}
"""
WEIGHTS = {"w1": (16, 3, 3, 3), "g": (16,), "c": (16,), "m": (16,), "v": (16,), "w2": (32, 16, 3, 3), "w3": (8, 32)}
RECURRENT = """
<ir_version: 8, opset_import: ["" : 17]>
detector (float[batch,time,32] x, int64 rate, float[2,batch,64] h) => (float[batch,time,64] y, float[2,batch,64] next)
{
    [layer] y = MatMul (x, w)
    [keep] next = Relu (h)
}
"""


@pytest.fixture
def any_size(tmp_path: Path) -> Path:
    return models.save(add_weights(ANY_SIZE, WEIGHTS), tmp_path / "any_size.onnx")


def test_a_size_that_nothing_says_is_asked_for_with_an_example(
    any_size: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run(capsys, "quantize", any_size, "-o", tmp_path / "q.onnx")
    assert_two_lines(code, stderr, "expected the size of input 'x'")
    assert "--shapes x:1x3x224x224" in stderr


def test_the_example_names_every_free_input_and_gives_states_no_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RECURRENT.replace(", int64 rate", "")
    model = models.save(add_weights(text, {"w": (32, 64)}), tmp_path / "recurrent.onnx")
    result = tmp_path / "q.onnx"
    code, stderr = run(capsys, "quantize", model, "-o", result)
    assert_two_lines(code, stderr, "expected the size of input 'x'")
    assert "--shapes x:1x224x32 --shapes h:2x1x64" in stderr
    assert run(capsys, "quantize", model, "--shapes", "x:1x50x32", "--shapes", "h:2x1x64", "-o", result)[0] == 0


def test_inputs_are_made_in_the_chosen_size_and_the_result_takes_any(
    any_size: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, made = tmp_path / "q.onnx", tmp_path / "made.npz"
    chosen = ("--shapes", "x:1x3x24x40")
    assert run(capsys, "quantize", any_size, *chosen, "-n", 8, "--budget", "quick", "-o", result)[0] == 0
    assert list(ir.load(result).graph.inputs[0].shape)[1] == 3
    assert all(isinstance(ir.load(result).graph.inputs[0].shape[axis], ir.SymbolicDim) for axis in (0, 2, 3))
    for size in (24, 48):
        array = np.random.default_rng(0).normal(size=(3, 3, size, 40)).astype(np.float32)
        np.savez(tmp_path / "d.npz", x=array)
        assert onnxq.compare(any_size, result, tmp_path / "d.npz", latency=False, layers=False).sqnr_db > 20
    assert run(capsys, "synthesize", any_size, *chosen, "-n", 4, "--steps", 2, "-o", made)[0] == 0
    with np.load(made) as archive:
        assert archive["x"].shape == (4, 3, 24, 40)


def test_images_are_cut_to_the_chosen_size(any_size: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 48, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{index}.png")
    found = onnxq.quantize(any_size, folder, shapes={"x": (1, 3, 24, 40)})
    assert found.numbers["samples"] == 3
    assert not any("224" in line for line in found.numbers["warnings"])
    assert any("--shapes" in line for line in onnxq.quantize(any_size, folder).numbers["warnings"])


@pytest.mark.parametrize(
    ("shape", "word"),
    [("y:1x3x8x8", "found one of 'y'"), ("x:1x4x8x8", "found 1x4x8x8"), ("x:3x8x8", r"?x3x?x?"), ("x", "shapes like")],
)
def test_what_does_not_fit_is_refused(
    shape: str, word: str, any_size: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run(capsys, "quantize", any_size, "--shapes", shape, "-o", tmp_path / "q.onnx")
    assert_two_lines(code, stderr, word)
    assert not (tmp_path / "q.onnx").exists()


def test_a_batch_of_one_stays_free_unless_a_state_depends_on_it(any_size: Path) -> None:
    model = models.load(any_size)
    sizes.choose(model, {"x": (1, 3, 24, 40)})
    assert data.input_specs(model)[0].shape == (None, 3, 24, 40)
    sizes.choose(model, {"x": (2, 3, 24, 40)})
    assert data.input_specs(model)[0].shape == (2, 3, 24, 40)
    states = add_weights(RECURRENT, {"w": (32, 64)})
    sizes.choose(states, {"x": (1, 12, 32)})
    assert [spec.shape for spec in data.input_specs(states)] == [(1, 12, 32), (), (2, 1, 64)]
    with pytest.raises(OnnxqError, match="\\?x\\?x32"):
        sizes.choose(states, {"x": (1, 12, 16)})


def test_a_recurrent_state_is_no_sample_of_a_denoiser() -> None:
    assert kinds.kind_of(add_weights(RECURRENT, {"w": (32, 64)})) is kinds.Kind.CNN
