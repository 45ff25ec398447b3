"""Large inner values, reduced where they are made: the same statistics, and memory of one value instead of all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import job as jobs
from onnxq import model as models
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration.data import input_specs
from onnxq.calibration.observers import OBSERVERS, Statistics
from onnxq.calibration.recording import record
from onnxq.condensed import Condensed, thinned
from onnxq.formats import FORMATS
from onnxq.report import layers
from onnxq.runtime import Session
from onnxq.serialized import serialize

NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
pictures (float[N,3,H,W] x) => (float[N,A,B,C] y)
<float[4] twice = {1, 1, 2, 2}>
{
    [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    [relu] r = Relu (a)
    wide = Resize <mode = "nearest"> (r, , twice)
    [second] b = Conv <pads = [1, 1, 1, 1]> (wide, w2, b2)
    also = Resize <mode = "nearest"> (a, , twice)
    [sum] s = Add (also, b)
    half = Cast <to = 10> (s)
    whole = Cast <to = 1> (half)
    [third] y = Conv <pads = [1, 1, 1, 1]> (whole, w3)
}
"""
SHAPES = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 16, 3, 3), "b2": (16,), "w3": (8, 16, 3, 3)}
TAPS = ["a", "r", "s", "half"]
AXES = {"r": 1, "s": -1}


@pytest.fixture
def network(tmp_path: Path) -> ir.Model:
    return models.load(models.save(add_weights(NETWORK, SHAPES), tmp_path / "pictures.onnx"))


def pictures(count: int, size: int = 80) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((count, 3, size, size)).astype(np.float32)


def test_what_is_left_is_what_numpy_makes_of_the_whole(network: ir.Model) -> None:
    feed = {"x": pictures(2)}
    whole = dict(zip(TAPS, Session(network, taps=TAPS).run(feed, TAPS), strict=True))
    session = Session(serialize(network, TAPS, condense=TAPS, means=True))
    assert session.output_names == ["y", *TAPS] and session.own_output_names == ["y"]
    for name, found in zip(TAPS, session.run(feed, TAPS), strict=True):
        values = whole[name].astype(np.float32)
        rows = values.reshape(2, -1)
        assert isinstance(found, Condensed) and found.size == values.size and found.nbytes == values.nbytes
        np.testing.assert_array_equal(found.lows, rows.min(axis=1))
        np.testing.assert_array_equal(found.highs, rows.max(axis=1))
        np.testing.assert_array_equal(thinned(found), thinned(values))
        assert 1 << 14 <= thinned(found).size < 1 << 16
        assert found.means.keys() == {1, -1}
        for axis, means in found.means.items():
            others = tuple(place for place in range(4) if place != axis % 4)
            np.testing.assert_allclose(means, values.mean(axis=others, dtype=np.float64), rtol=1e-4, atol=1e-6)
    first, second = session.run(feed, ["y", "a"])
    assert isinstance(first, np.ndarray) and isinstance(second, Condensed)
    assert "a" not in {value.name for value in network.graph.outputs}  # the model stays as it was


def test_a_small_value_is_kept_whole(network: ir.Model) -> None:
    feed = {"x": pictures(1, 8)}
    (whole,), (found,) = (
        Session(network, taps=["a"], condense=["a"] if flag else ()).run(feed, ["a"]) for flag in (False, True)
    )
    np.testing.assert_array_equal(found.part, whole.reshape(-1))


def test_a_vector_comes_as_it_is() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[8] x) => (float[8] y) { h = Exp(x) y = Relu(h) }'
    feed = {"x": np.ones(8, np.float32)}
    (found,) = Session(ir.from_onnx_text(text), taps=["h"], condense=["h"]).run(feed, ["h"])
    np.testing.assert_allclose(found, np.exp(feed["x"]))


def test_statistics_are_nearly_those_of_whole_values(network: ir.Model) -> None:
    specs, data = input_specs(network), [{"x": row} for row in pictures(16)]
    recordings = []
    for condense in (False, True):
        session = Session(serialize(network, TAPS, condense=TAPS if condense else (), means=True))
        recordings.append(record(session, TAPS, data, specs, channel_axes=AXES))
    exact, found = recordings
    session = Session(network, taps=TAPS)
    assert exact.first_sizes == found.first_sizes
    for name in TAPS:
        expected, seen = exact.statistics[name], found.statistics[name]
        assert (seen.low, seen.high, seen.rows) == (expected.low, expected.high, expected.rows)
        assert seen.sum_of_highs == pytest.approx(expected.sum_of_highs)
        values = np.concatenate([session.run({"x": row["x"][None]}, [name])[0].reshape(-1) for row in data[:4]])
        for rule in ("robust", "minmax", "mse"):
            errors = []
            for statistics in (expected, seen):
                chosen = OBSERVERS[rule](statistics, FORMATS["int8"], True)
                scale, zero_point = scale_and_zero_point(chosen.low, chosen.high, FORMATS["int8"], symmetric=True)
                rounded = fake_quantize(values.astype(np.float32), scale, zero_point, FORMATS["int8"])
                errors.append(float(np.mean((rounded - values) ** 2)))
            assert errors[1] == pytest.approx(errors[0], rel=0.05)
        np.testing.assert_array_equal(exact.first_taps[name], found.first_taps[name])
    for name in AXES:
        np.testing.assert_allclose(found.channel_means[name], exact.channel_means[name], rtol=1e-4, atol=1e-6)


def test_an_empty_value_counts_nothing() -> None:
    statistics = Statistics()
    statistics.update(np.zeros((2, 0), np.float32))
    assert statistics.rows == 0


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_quantizing_finds_the_same_either_way(
    target: str, network: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, found = [{"x": row[None]} for row in pictures(4)], []
    for limit in (1 << 40, 1 << 10):
        monkeypatch.setattr(jobs, "TAPPED_AT_ONCE", limit)
        found.append(onnxq.quantize(tmp_path / "pictures.onnx", data, target=target))
    assert found[1].numbers["sqnr_db"] == pytest.approx(found[0].numbers["sqnr_db"], abs=0.5)
    assert len(found[1].numbers["layers"]) == len(found[0].numbers["layers"])
    for first, second in zip(*(sorted(item.numbers["layers"], key=str) for item in found), strict=True):
        assert second["sqnr_db"] == pytest.approx(first["sqnr_db"], abs=2)


def test_comparing_looks_at_parts_of_large_values(
    network: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = [{"x": row[None]} for row in pictures(4)], tmp_path / "codes.onnx"
    onnxq.quantize(tmp_path / "pictures.onnx", data, output=output)
    found = []
    for limit in (1 << 40, 1 << 10):
        monkeypatch.setattr(layers, "COMPARED_AT_ONCE", limit)
        found.append(onnxq.compare(tmp_path / "pictures.onnx", output, data, latency=False))
    assert found[0].sqnr_db_literal == found[1].sqnr_db_literal
    named = [{layer["name"]: layer["sqnr_db"] for layer in item.layers} for item in found]
    assert named[1] == pytest.approx(named[0], abs=0.3) and named[1] != named[0] and len(named[0]) == 3


def test_workers_find_the_same_bytes(tmp_path: Path, network: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TAPPED_AT_ONCE", 1 << 10)
    data = tmp_path / "pictures.npz"
    np.savez(data, x=pictures(70, 24))
    files = [tmp_path / f"{count}.onnx" for count in (1, 2)]
    for count, file in enumerate(files, start=1):
        onnxq.quantize(tmp_path / "pictures.onnx", data, output=file, workers=count)
    assert files[0].read_bytes() == files[1].read_bytes()


MEASURED = """
import re, sys
import numpy as np
from onnxq import model as models
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.runtime import Session
from onnxq.serialized import serialize
model = models.load(sys.argv[1])
taps = [value.name for node in model.graph for value in node.outputs if value.name != "y"]
session = Session(serialize(model, taps, condense=taps if sys.argv[2] == "True" else ()))
def peak_kib():  # getrusage's is that of the process that started this one, where that is larger
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak_kib()
session.run({"x": np.zeros((1, 3, 256, 256), np.float32)}, taps)
print((peak_kib() - before) >> 10)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process reached")
def test_memory_is_that_of_a_few_values(tmp_path: Path) -> None:
    """Sixty values of 4 MiB each in a chain: 240 MiB where all are returned."""
    steps = "\n".join(f"a{index + 1} = Mul (a{index}, scale)" for index in range(60))
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    chain (float[N,3,256,256] x) => (float[N,16,256,256] y)
    <float scale = {{0.5}}>
    {{
        a0 = Conv <pads = [1, 1, 1, 1]> (x, w)
        {steps}
        y = Relu (a60)
    }}
    """
    path = models.save(add_weights(text, {"w": (16, 3, 3, 3)}), tmp_path / "chain.onnx")
    whole, condensed = (
        int(subprocess.run(
            [sys.executable, "-c", MEASURED, str(path), flag], capture_output=True, text=True, check=True
        ).stdout)
        for flag in ("False", "True")
    )  # fmt: skip
    assert whole > 100 and condensed < whole / 2
