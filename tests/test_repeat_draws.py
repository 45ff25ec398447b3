"""What a graph draws at random is the same wherever it is judged, and stays a draw in what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import model as models
from onnxq.passes.repeat_draws import RepeatDraws
from onnxq.runtime import Session

SIGNATURE = '<ir_version: 10, opset_import: ["" : 21]> g (TYPE[100,200] x) => (TYPE[100,200] y)'
NODES = {
    "[noise] y = RandomNormalLike <scale = 2.0, mean = 3.0> (x)": (3.0, 2.0),
    "[noise] y = RandomNormal <shape = [100,200]> ()": (0.0, 1.0),
    "[noise] y = RandomUniformLike <low = -1.0, high = 5.0> (x)": (2.0, 6 / 12**0.5),
    "[noise] y = RandomUniform <shape = [100,200]> ()": (0.5, 1 / 12**0.5),
    "[noise] y = Bernoulli (x)": (0.25, 0.1875**0.5),
}


@pytest.mark.parametrize(("node", "moments"), NODES.items(), ids=[node.split()[3] for node in NODES])
def test_draws_are_of_their_distribution(node: str, moments: tuple[float, float]) -> None:
    model = ir.from_onnx_text(f"{SIGNATURE.replace('TYPE', 'float')} {{ {node} }}")
    RepeatDraws()(model)
    session = Session(model)
    feed = {"x": np.full((100, 200), 0.25, np.float32)}
    (first,), (second,) = session.run(feed), session.run(feed)
    np.testing.assert_array_equal(first, second)
    mean, deviation = moments
    assert abs(first.mean() - mean) < 0.02 * deviation and abs(first.std() - deviation) < 0.02 * deviation
    centred = (first - mean) / deviation
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[:, 7:] * centred[:, :-7]):
        assert abs(shifted.mean()) < 0.02, "neighbours know nothing of each other"


def test_two_nodes_draw_apart_and_types_stay() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float16[64,64] x) => (float16[64,64] y, float[64,64] z) '
        "{ [one] y = RandomNormalLike (x) [other] z = RandomNormalLike <dtype = 1> (x) }"
    )
    one, other = Session(model).run({"x": np.zeros((64, 64), np.float16)})
    assert one.dtype == np.float16 and other.dtype == np.float32
    assert abs(np.corrcoef(one.ravel().astype(np.float32), other.ravel())[0, 1]) < 0.05


SAMPLER = (
    '<ir_version: 10, opset_import: ["" : 21]> g (float[N,64] x) => (float[N,64] y) {'
    " [mean] m = MatMul (x, w1) [noise] n = RandomNormalLike (m) s = Add (m, n) r = Relu (s) [out] y = MatMul (r, w2) }"
)


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_a_network_that_samples_is_judged_by_its_codes(target: str, tmp_path: Path) -> None:
    """As an encoder of latents: the noise was another in the quantized model, and hid all else (3 dB)."""
    path = models.save(add_weights(SAMPLER, {"w1": (64, 64), "w2": (64, 64)}), tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    result = onnxq.quantize(path, [{"x": x}], target=target, output=tmp_path / "q.onnx")
    assert result.numbers["quantized_nodes"] == 2 and result.numbers["sqnr_db"] > 30
    assert "RandomNormalLike" in {node.op_type for node in models.read(tmp_path / "q.onnx").graph}
    compared = onnxq.compare(path, tmp_path / "q.onnx", [{"x": x}])
    assert compared.sqnr_db > 30
