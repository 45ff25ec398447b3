"""Where biases are read, and that what is corrected there is what was wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import layer_nodes
from onnxq.biases import bias_place
from onnxq.calibration import bias_correction
from onnxq.runtime import Session

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
SIZE = 12  # inputs, outputs and rows alike, so that only the place tells one axis from another
PLACES = {
    "y = Gemm (x, w, b)": ("Gemm", 2),
    "y = Gemm <transA=1> (x, w, b)": ("Gemm", 2),
    "y = Gemm (x, w)": ("Gemm", 2),
    "y = Gemm <alpha=0.5> (x, w, b)": None,
    "p = Gemm (x, w) y = Add (p, x)": ("Gemm", 2),
    "p = Gemm (x, w) y = Add (b, p)": ("Add", 0),
    "p = MatMul (x, w) y = Add (p, b)": ("Add", 1),
    "p = MatMul (x, w) y = Add (p, x)": None,
    "p = MatMul (w, x) y = Add (p, b)": None,
    "y = MatMul (x, w)": None,
}


def model_of(body: str) -> ir.Model:
    text = f"{HEAD} g (float[{SIZE},{SIZE}] x) => (float[{SIZE},{SIZE}] y) {{ {body} }}"
    shapes = {"w": (SIZE, SIZE)} | ({"b": (SIZE,)} if "b" in body else {})
    return add_weights(text, shapes)


@pytest.mark.parametrize("body", PLACES)
def test_biases_are_found_where_they_can_be_changed(body: str) -> None:
    (item,) = layer_nodes.weighted_nodes(model_of(body).graph)
    place = bias_place(item)
    assert (None if place is None else (place.node.op_type, place.index)) == PLACES[body]


@pytest.mark.parametrize("body", [body for body in PLACES if "(w, x)" not in body])  # that stays float
def test_correction_takes_the_mean_error_away_or_changes_nothing(body: str, tmp_path: Path) -> None:
    """With one row of inputs for all, the mean error is all of the error: none or all of it is left."""
    ir.save(model_of(body), tmp_path / "model.onnx")
    column = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    x = np.tile(column[:, None] if "transA" in body else column, (1, SIZE) if "transA" in body else (SIZE, 1))
    outputs = []  # of the graph as written: onnxruntime's own kernel for such products rounds their inputs to 8 bits
    for corrects in (False, True):
        onnxq.quantize(
            tmp_path / "model.onnx", [{"x": x}], output=tmp_path / "out.onnx", weights="int4", activations="float",
            knobs={"bias_correction": corrects},
        )  # fmt: skip
        outputs.append(Session(tmp_path / "out.onnx", optimize=False).run({"x": x})[0])
    (exact,) = Session(tmp_path / "model.onnx").run({"x": x})
    alone, corrected = (float(np.abs(output - exact).max()) for output in outputs)
    assert alone > 1e-2
    assert corrected < 1e-5 if PLACES[body] is not None else corrected == alone


def test_means_of_a_transposed_input_are_those_of_its_rows() -> None:
    axes = bias_correction.channel_axes(model_of("y = Gemm <transA=1> (x, w, b)").graph)
    assert axes == {"x": 0}
