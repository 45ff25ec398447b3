"""Codes are spent on what the readers of a value tell apart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq.calibration import calibrate
from onnxq.calibration.let_through import EVERYTHING, let_through
from onnxq.calibration.observers import Statistics

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
PAIR = """
<float scale = {0.1}, uint8 zero = {7}, float one = {1.0}, float minus = {-2.0}>
{
    q = QuantizeLinear (x, scale, zero)
    d = DequantizeLinear (q, scale, zero)
"""


def quantizer(body: str, outputs: str = "float[N,8] y") -> ir.Node:
    model = ir.from_onnx_text(f"{HEAD}\none (float[N,8] x) => ({outputs}){PAIR}{body}\n}}")
    return next(node for node in model.graph if node.op_type == "QuantizeLinear")


@pytest.mark.parametrize(
    ("body", "interval"),
    [
        ("y = HardSwish (d)", (-3.0, math.inf)),
        ("y = Relu (d)", (0.0, math.inf)),
        ("s = Sigmoid (d)\n y = Mul (d, s)", (-8.0, math.inf)),
        ("s = Sigmoid (d)\n y = Mul (s, s)", (-6.0, 6.0)),
        ("y = HardSigmoid <alpha = 0.25> (d)", (-2.0, 2.0)),
        ("y = Clip (d, minus, one)", (-2.0, 1.0)),
        ("y = Clip (d, minus)", (-2.0, math.inf)),
        ("a = HardSwish (d)\n b = Relu (d)\n y = Add (a, b)", (-3.0, math.inf)),
        ("a = HardSwish (d)\n y = Add (a, d)", EVERYTHING),
        ("y = Neg (d)", EVERYTHING),
    ],
)
def test_what_readers_tell_apart(body: str, interval: tuple[float, float]) -> None:
    assert let_through(quantizer(body)) == interval


def test_an_output_of_the_graph_tells_everything_apart() -> None:
    assert let_through(quantizer("y = HardSwish (d)", "float[N,8] y, float[N,8] d")) == EVERYTHING


def test_statistics_between_two_ends_keep_what_lies_there() -> None:
    statistics = Statistics()
    values = np.random.default_rng(0).normal(size=(64, 200)).astype(np.float32) * 4
    statistics.update(values, values.size)
    moved = statistics.between(-3, np.inf)
    assert (moved.low, moved.high) == (-3, statistics.high)
    found, counts = moved.distribution()
    assert found.min() == -3 and counts.sum() == values.size
    assert abs((counts[found == -3]).sum() / values.size - (values <= -3).mean()) < 0.01
    assert statistics.low == values.min()
    assert statistics.between(-np.inf, np.inf) is statistics


NETWORK = f"""{HEAD}
swish (float[N,16,9,9] x) => (float[N,24] y)
{{
    [first] a = Conv (x, w1)
    h = HardSwish (a)
    [second] c = Conv <pads = [1, 1, 1, 1]> (h, w2)
    g = HardSwish (c)
    [third] d = Conv (g, w3)
    p = GlobalAveragePool (d)
    y = Flatten (p)
}}
"""


def test_steps_before_hard_swish_are_not_spent_on_what_it_makes_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_weights(NETWORK, {"w1": (32, 16, 1, 1), "w2": (32, 32, 3, 3), "w3": (24, 32, 1, 1)})
    for name in ("w1", "w2"):  # as deep below zero as trained networks reach
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * 6 - 0.1, name=name)
    ir.save(model, tmp_path / "m.onnx")
    data = [{"x": np.random.default_rng(1).random((64, 16, 9, 9)).astype(np.float32)}]
    aware = onnxq.quantize(tmp_path / "m.onnx", data, target="cpu").numbers["sqnr_db"]
    monkeypatch.setattr(calibrate, "let_through", lambda quantizer: EVERYTHING)
    assert aware > onnxq.quantize(tmp_path / "m.onnx", data, target="cpu").numbers["sqnr_db"] + 1
