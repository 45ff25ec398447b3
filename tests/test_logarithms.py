"""Layers that a logarithm is computed from stay float, as the filters of a spectrogram; those of a network do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq.targets import logarithms

# What networks for audio begin with: a Fourier transform as two convolutions, squares, mel filters, a logarithm.
LISTENER = """
<ir_version: 10, opset_import: ["" : 21]>
listener (float[N,1,4096] sound) => (float[N,16] y)
<float floor = {1e-10}, int64[1] time = {2}>
{
    [real] a = Conv <strides=[64]> (sound, cosines)
    [imaginary] b = Conv <strides=[64]> (sound, sines)
    a2 = Mul (a, a)
    b2 = Mul (b, b)
    power = Add (a2, b2)
    rows = Transpose <perm=[0, 2, 1]> (power)
    [mel] bands = MatMul (rows, filters)
    held = Clip (bands, floor)
    loudness = Log (held)
    columns = Transpose <perm=[0, 2, 1]> (loudness)
    [first] c = Conv <pads=[1, 1]> (columns, w1)
    r = Relu (c)
    [second] d = Conv <pads=[1, 1]> (r, w2)
    s = Relu (d)
    mean = ReduceMean <keepdims=0> (s, time)
    [last] y = Gemm <transB=1> (mean, w3)
}
"""
WINDOW, BINS, BANDS = 128, 64, 32


def listener(folder: Path) -> tuple[Path, Path]:
    """Such a network, and tones from loud to faint for it."""
    shapes = {"cosines": (BINS, 1, WINDOW), "sines": (BINS, 1, WINDOW), "filters": (BINS, BANDS)}
    model = add_weights(LISTENER, shapes | {"w1": (32, BANDS, 3), "w2": (32, 32, 3), "w3": (16, 32)})
    angles = 2 * np.pi * np.arange(BINS)[:, None] * np.arange(WINDOW) / WINDOW
    bins = np.arange(BINS)[:, None]
    weights = {
        "cosines": (np.cos(angles) * np.hanning(WINDOW))[:, None],
        "sines": (np.sin(angles) * np.hanning(WINDOW))[:, None],
        "filters": np.maximum(0, 1 - np.abs(bins / 2 - np.arange(BANDS))),
    }
    for name, array in weights.items():
        model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
    ir.save(model, folder / "listener.onnx")
    generator = np.random.default_rng(0)
    tones = np.sin(generator.uniform(0.05, 2.5, (64, 1, 1)) * np.arange(4096))
    sound = tones * 10 ** generator.uniform(-3, 0, (64, 1, 1)) + generator.normal(0, 1e-4, (64, 1, 4096))
    np.savez(folder / "sound.npz", sound=sound.astype(np.float32))
    return folder / "listener.onnx", folder / "sound.npz"


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_filters_before_a_logarithm_stay_float(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = listener(tmp_path)
    result = onnxq.quantize(model, data, target=target)
    left = {name for name, reason in result.numbers["left_float"].items() if reason == logarithms.REASON}
    assert left == {"real", "imaginary", "mel"}
    monkeypatch.setattr(logarithms, "before_logarithms", lambda graph: set())
    assert result.numbers["sqnr_db"] > onnxq.quantize(model, data, target=target).numbers["sqnr_db"] + 5


@pytest.mark.parametrize(
    "between",
    [
        "r = Relu (a)   e = Add (r, one)   y = Log (e)",  # words' weights of SPLADE
        "r = Clip (a, zero)   e = Add (r, one)   y = Log (e)",  # a Relu too
        "e = Softmax (a)   y = Log (e)",
        "e = Exp (a)   f = Add (e, one)   y = Log (f)",  # a Softplus taken apart
        "e = Sigmoid (a)   y = Log (e)",
    ],
)
def test_behind_an_activation_a_logarithm_says_nothing(between: str) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        network (float[N,32] x) => (float[N,32] y) <float one = {1.0}, float zero = {0.0}>
        { [layer] a = MatMul (x, w)   BETWEEN }
    """
    assert not logarithms.before_logarithms(add_weights(text.replace("BETWEEN", between), {"w": (32, 32)}).graph)
