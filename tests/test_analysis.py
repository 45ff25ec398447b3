"""What a layer costs alone: the switches tell the truth, the sensitive layer is found, and leaving it out helps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS, add_weights
from typer.testing import CliRunner

import onnxq
from onnxq import analysis, switchboard, targets
from onnxq import model as models
from onnxq.calibration import observers
from onnxq.calibration.data import Spread, input_specs, open_source
from onnxq.calibration.recording import record
from onnxq.cli import app
from onnxq.runtime import Session
from onnxq.sensitivity import Probe, batch_power, judged_samples

FASHION = (MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz")

CHAIN = """
<ir_version: 10, opset_import: ["" : 21]>
chain (float[N,32] x) => (float[N,16] y)
{
    [first] a = Gemm <transB=1> (x, w1)
    [relu] r = Relu (a)
    [fragile] b = Gemm <transB=1> (r, w2)
    [relu2] s = Relu (b)
    [last] y = Gemm <transB=1> (s, w3)
}
"""


def fragile(folder: Path) -> tuple[Path, Path]:
    """A network whose second layer reads one value a thousand times larger than what matters."""
    model = add_weights(CHAIN, {"w1": (32, 32), "w2": (32, 32), "w3": (16, 32)})
    first, second = (np.array(model.graph.initializers[name].const_value.numpy()) for name in ("w1", "w2"))
    first[0] *= 1000
    second[:, 0] = 0
    for name, array in (("w1", first), ("w2", second)):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    ir.save(model, folder / "chain.onnx")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32))
    return folder / "chain.onnx", folder / "data.npz"


def test_the_fragile_layer_is_named_and_its_suggestion_works(tmp_path: Path) -> None:
    model, data = fragile(tmp_path)
    found = analysis.analyze(model, data)
    assert found.layers[0].name == "fragile" and found.layers[0].sqnr_db < found.layers[1].sqnr_db - 10
    assert found.suggestions[0].startswith("--exclude fragile   #")
    plain = onnxq.quantize(model, data).numbers["sqnr_db"]
    without = onnxq.quantize(model, data, exclude=["fragile"]).numbers["sqnr_db"]
    assert without > plain + 10 and found.cumulative[1] > found.cumulative[0] + 10


def test_switches_off_are_the_float_model_and_on_the_quantized_one() -> None:
    loaded = models.load(FASHION[0])
    target = targets.get("tensorrt")
    target.prepare(loaded)
    specs, source = input_specs(loaded), open_source(FASHION[1], input_specs(loaded))
    scheme = target.scheme(None, None)
    layers = switchboard.layers_of(loaded.graph, lambda node: scheme, target.place(loaded.graph, scheme).left_float)
    taps = switchboard.activations_of(loaded.graph, layers)
    session = Session(loaded, taps=[name for name in taps if name != "x"])
    statistics = record(session, taps, source, specs, samples=32).statistics
    judged = judged_samples(session, source, specs, 16)
    probe = Probe(loaded, judged, statistics, specs, observers.get("minmax"))
    board = probe.board(layers)
    assert probe.error(board, []).db > 90
    alone = probe.errors_alone(layers)
    together = probe.error(board, board.layers)
    errors = [sum(power.error.values()) for power in alone.values()]
    assert max(errors) < sum(together.error.values()) < 4 * sum(errors)


def test_outputs_of_other_sizes_count_alike() -> None:
    """A layer behind scores below 1 costs what the same layer behind boxes in pixels costs."""
    text = """
    <ir_version: 8, opset_import: ["" : 21]>
    detector (float[N,16] x) => (float[N,8] boxes, float[N,8] scores)
    <float pixels = {640.0}>
    {
        [box] b = MatMul (x, w)
        boxes = Mul (b, pixels)
        [score] scores = MatMul (x, w2)
    }
    """
    model = add_weights(text, {"w": (16, 8), "w2": (16, 8)})
    weights = model.graph.initializers
    weights["w2"].const_value = ir.tensor(weights["w"].const_value.numpy().copy(), name="w2")
    specs = input_specs(model)
    source = open_source([{"x": np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)}], specs)
    session = Session(model)
    samples = judged_samples(session, source, specs, 16)

    def power(scale: tuple[float, float]) -> float:
        found = [array * (1 + part) for array, part in zip(samples[0].expected, scale, strict=True)]
        return batch_power(samples[0], found).db

    assert power((0.1, 0.0)) == pytest.approx(power((0.0, 0.1)), abs=1e-3)
    assert power((0.1, 0.1)) == pytest.approx(20, abs=1e-3)


def test_narrow_weights_cost_more(tmp_path: Path) -> None:
    options = ["--data", str(FASHION[1]), "-n", "16", "--narrow", "int6", "--narrow", "int3"]
    done = CliRunner().invoke(app, ["analyze", str(FASHION[0]), *options, "--json", str(tmp_path / "analysis.json")])
    assert done.exit_code == 0, done.output
    layers = json.loads((tmp_path / "analysis.json").read_text())["layers"]
    weighted = [layer["narrow_db"] for layer in layers if layer["narrow_db"]]
    assert len(weighted) >= 10
    assert all(item["int6"] > item["int3"] + 6 for item in weighted)


def test_steps_are_judged_one_by_one(tmp_path: Path) -> None:
    """Samples with steps: the worst one is found where the signal is small."""
    model, data = fragile(tmp_path)
    with np.load(data) as arrays:
        x = arrays["x"]
    step = np.arange(64) // 16
    quiet = np.where(step[:, None] == 3, np.float32(0.05), np.float32(1)) * x
    np.savez(data, x=quiet, step=step)
    assert analysis.analyze(model, data).layers[0].worst_step == 3

    def worst_db(floor_db: float, *exclude: str) -> tuple[float, dict[str, str]]:
        numbers = onnxq.quantize(model, data, knobs={"step_floor_db": floor_db}, exclude=exclude).numbers
        return min(numbers["step_sqnr_db"].values()), numbers["left_float"]

    (all_db, nothing), (best_db, _) = worst_db(0.0), worst_db(0.0, "fragile")
    assert not nothing and best_db > all_db + 6
    floor_db = (all_db + best_db) / 2
    held_db, left_float = worst_db(floor_db)
    assert held_db >= floor_db
    assert list(left_float) == ["fragile"] and "every sampler step keeps" in left_float["fragile"]


def test_the_worst_steps_are_judged_on_more_samples(tmp_path: Path) -> None:
    """In a last step some samples lose far more than others: two or three of them say little."""
    model, data = tmp_path / "chain.onnx", tmp_path / "data.npz"
    ir.save(add_weights(CHAIN, {"w1": (32, 32), "w2": (32, 32), "w3": (16, 32)}), model)
    x = np.random.default_rng(0).standard_normal((400, 32)).astype(np.float32)
    step = np.arange(400) // 10
    loudness = np.where(step == 39, np.geomspace(0.1, 0.02, 10)[np.arange(400) % 10], 1).astype(np.float32)
    x = x * loudness[:, None]
    np.savez(data, x=x, step=step)

    def result(floor_db: float) -> onnxq.Result:
        knobs = {"step_floor_db": floor_db, "bias_correction": False, "observer": "minmax"}
        return onnxq.quantize(model, data, samples=400, knobs=knobs)

    few = result(0.0).numbers["step_sqnr_db"]
    worst = min(few, key=lambda step: few[step])
    close = result(few[worst] - 5)
    assert worst == 39 and not close.numbers["left_float"]
    rows = {"x": x[step == 39]}
    wanted, found = (Session(item, optimize=False).run(rows)[0] for item in (models.load(model), close.model))
    whole_db = 10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum())
    assert abs(close.numbers["step_sqnr_db"][39] - whole_db) < 0.05 < abs(few[39] - whole_db)


def test_spread_takes_evenly_and_of_the_steps_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.arange(40, dtype=np.float32), step=np.arange(40) // 10)
    source = open_source(tmp_path / "data.npz", input_specs(ir.from_onnx_text(CHAIN))[:1])
    taken = [float(sample["x"]) for sample in Spread(source, 5)]
    assert taken == [0, 10, 20, 29, 39]
    taken = [float(sample["x"]) for sample in Spread(source, 4, {1, 3})]
    assert taken == [10, 16, 33, 39]


def test_outputs_that_are_no_numbers_are_refused_and_perfect_ones_need_nothing() -> None:
    with pytest.raises(onnxq.OnnxqError, match="finite outputs"):
        analysis._suggestions(["first", "second"], [float("nan"), 20.0])
    assert "nothing to leave out" in analysis._suggestions(["first"], [float("inf"), float("inf")])[0]
