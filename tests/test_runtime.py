"""Sessions: several batches at once, in order, and no more of them in memory than that."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import MODELS, add_weights

from onnxq import model as models
from onnxq.diffusion import denoiser as denoisers
from onnxq.errors import OnnxqError
from onnxq.runtime import LOST_OUTPUT, Session
from onnxq.serialized import serialize
from onnxq.value_sizes import rows_that_fit

TEXT = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 8] x) => (float[n, 8] y) { h = Exp(x)  y = Relu(h) }
"""


def batches(count: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {"x": random.standard_normal((2, 8), np.float32), "label": np.full(2, index, np.int64)}
        for index in range(count)
    ]


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_runs_at_once_come_back_in_order(at_once: int, count: int) -> None:
    given = batches(count)
    session = Session(ir.from_onnx_text(TEXT), taps=["h"], at_once=at_once)
    found = list(session.run_each(given, ["y", "h"]))
    assert [batch["label"][0] for batch, _ in found] == list(range(count))
    for batch, (y, h) in found:
        wanted = session.run({"x": batch["x"]}, ["y", "h"])
        np.testing.assert_array_equal(y, wanted[0])
        np.testing.assert_array_equal(h, wanted[1])


@pytest.mark.parametrize("at_once", [1, 2])
def test_few_batches_are_read_ahead_and_none_is_kept(at_once: int) -> None:
    read: list[weakref.ref[np.ndarray]] = []

    def drawn():
        for index in range(12):
            batch = {"x": np.full((2, 8), index, np.float32)}
            read.append(weakref.ref(batch["x"]))
            yield batch
            del batch

    for position, (batch, outputs) in enumerate(Session(ir.from_onnx_text(TEXT), at_once=at_once).run_each(drawn())):
        del batch, outputs
        gc.collect()
        assert len(read) <= position + 1 + at_once
        assert sum(reference() is not None for reference in read) <= at_once + 1


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_error_of_one_run_is_the_callers(at_once: int) -> None:
    given = [*batches(3), {"x": np.zeros((2, 9), np.float32)}]
    with pytest.raises(OnnxqError, match=r"float32\[2, 9\]"):
        list(Session(ir.from_onnx_text(TEXT), at_once=at_once).run_each(given))


def test_a_tap_that_onnxruntime_loses_is_returned() -> None:
    """Its layout for convolutions fuses the sum into one whose output is an output of the model too, and loses that."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[1,64,16,16] x) => (float[1,128,8,8] y)
    {
        a = Conv <group=64, pads=[3,3,3,3], strides=[2,2]> (x, w1, c1)
        b = Conv <group=64, pads=[1,1,1,1], strides=[2,2]> (x, w2, c2)
        y = Add (a, b)
    }
    """
    model = add_weights(text, {"w1": (128, 1, 7, 7), "w2": (128, 1, 3, 3), "c1": (128,), "c2": (128,)})
    x = np.random.default_rng(0).normal(size=(1, 64, 16, 16)).astype(np.float32)
    data = serialize(model, ["a"]).model.SerializeToString()
    try:
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"], enable_fallback=0)
    except RuntimeError as error:
        assert LOST_OUTPUT in str(error)
    else:
        pytest.skip("this onnxruntime does not lose it")
    for found, expected in zip(
        Session(model, taps=["a"]).run({"x": x}), Session(model, taps=["a"], optimize=False).run({"x": x}), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


SCORES = """
<ir_version: 10, opset_import: ["" : 21]>
attention (float[N,4,2048,8] q) => (float[N,4,2048,8] y)
{
    k = Transpose <perm = [0, 1, 3, 2]> (q)
    scores = MatMul (q, k)
    shares = Softmax (scores)
    y = MatMul (shares, q)
}
"""


def test_as_many_rows_run_at_once_as_the_largest_value_lets(tmp_path: Path) -> None:
    model = models.load(models.save(add_weights(SCORES, {}), tmp_path / "attention.onnx"))
    assert rows_that_fit(model.graph, 1000) == 2**28 // (4 * 2048**2) == 16
    assert rows_that_fit(model.graph, 4) == 4


def test_a_denoiser_predicts_the_same_in_parts() -> None:
    model = models.load(MODELS / "fashion_unet_guided.onnx")
    denoiser = denoisers.find(model)
    assert denoiser.most_rows > 1000  # small pictures run together
    generator = np.random.default_rng(0)
    feed = {}
    for spec in denoiser.specs:
        rows = generator.standard_normal((7, *spec.row_shape)) if spec.dtype.kind == "f" else np.full(7, 3)
        feed[spec.name] = rows.astype(spec.dtype)
    seen: list[int] = []

    class Counted(Session):
        def run(self, feed: Any, outputs: Any = None) -> list[Any]:
            seen.append(len(feed[denoiser.sample.name]))
            return super().run(feed, outputs)

    session = Counted(model)
    expected = denoiser.predict(session, feed)
    found = dataclasses.replace(denoiser, most_rows=3).predict(session, feed)
    assert seen == [7, 3, 3, 3] and found.shape == expected.shape == (7, *denoiser.noise_shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)
