"""Scales by sampler step: groups of steps, the forms of a graph that has them, and what is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DATA, add_weights
from test_cli_errors import assert_two_lines, run
from test_temporal_features import NETWORK, SHAPES

import onnxq
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.calibration import observers, timesteps
from onnxq.calibration.archives import Npz
from onnxq.calibration.data import input_specs
from onnxq.calibration.timesteps import StepStatistics
from onnxq.config import make_settings
from onnxq.diffusion.comparison import sample
from onnxq.diffusion.partition import ScaleCosts, optimal, scale_costs, uniform
from onnxq.diffusion.router import Router
from onnxq.diffusion.source import open_sampler
from onnxq.errors import OnnxqError
from onnxq.formats import FORMATS
from onnxq.passes.time_conditioned_scales import TimeConditionedScales, conditionable
from onnxq.runtime import Session

INT8 = FORMATS["int8"]
OPTIONS = {"recipe": "apq-dm", "steps": 10, "samples": 40}
# Without tables: most of what moves with the step in so small a network depends on the timestep alone.
QUICK = {"step_floor_db": 0.0, "trajectories": 4, "kept_steps": 10, "cache": False}


def statistics_of(deviations: np.ndarray, rows: int = 4, seed: int = 0) -> StepStatistics:
    """Normally distributed activations whose deviation follows the step."""
    generator, found = np.random.default_rng(seed), StepStatistics()
    for step, deviation in enumerate(deviations):
        found.update(generator.standard_normal((rows, 1000)) * deviation, np.full(rows, step))
    return found


def costs_of(statistics: StepStatistics, steps: int, **options: bool) -> ScaleCosts:
    static = observers.mse(statistics.together(), INT8, True).high / 127
    return scale_costs(statistics, steps, INT8, static, 0, observers.mse, symmetric=True, **options)


GEOMETRIC = np.geomspace(1, 20, 100)


def test_statistics_of_steps_merge() -> None:
    generator = np.random.default_rng(0)
    values, steps = generator.standard_normal((12, 500)), generator.integers(0, 3, 12)
    whole, first, second = StepStatistics(), StepStatistics(), StepStatistics()
    whole.update(values, steps, 1 << 20)
    first.update(values[:5], steps[:5], 1 << 20)
    second.update(values[5:], steps[5:], 1 << 20)
    first.merge(second)
    assert first.by_step.keys() == whole.by_step.keys() == set(steps.tolist())
    for step, statistics in whole.by_step.items():
        merged = first.by_step[step]
        assert (merged.low, merged.high, merged.count) == (statistics.low, statistics.high, statistics.count)
        for mine, theirs in zip(merged.distribution(), statistics.distribution(), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_more_groups_never_cost_more(powers_of_two: bool) -> None:
    costs = costs_of(statistics_of(GEOMETRIC), 100, powers_of_two=powers_of_two)
    errors = [costs.error(costs.table(optimal([costs], groups))) for groups in (1, 2, 4, 8, 100)]
    assert errors == sorted(errors, reverse=True)
    assert set(costs.table(optimal([costs], 1))) == {costs.scales[0]}  # the static scale
    best = costs.costs.min(axis=1).sum()
    np.testing.assert_allclose(errors[-1], best, rtol=1e-9)
    for groups in (2, 8):
        assert costs.error(costs.table(uniform(100, groups))) >= errors[(1, 2, 4, 8).index(groups)]


def test_eight_groups_are_nearly_as_good_as_a_scale_for_each_step() -> None:
    costs = costs_of(statistics_of(GEOMETRIC), 100)
    best = costs.costs.min(axis=1).sum()
    assert costs.error(costs.table(optimal([costs], 8))) <= 1.4 * best
    assert costs.error(costs.table(optimal([costs], 1))) >= 15 * best


def test_a_scale_for_each_step_gains_nothing_on_other_trajectories() -> None:
    deviations = np.geomspace(1, 6, 100)
    few, other = costs_of(statistics_of(deviations, rows=8), 100), statistics_of(deviations, rows=8, seed=1)
    held_out = dataclasses.replace(few, costs=_judged(few, other))
    eight, each = (held_out.error(few.table(optimal([few], groups))) for groups in (8, 100))
    assert each >= 0.9 * eight  # where the ranges of a group are within 25 % of each other


def _judged(costs: ScaleCosts, statistics: StepStatistics) -> np.ndarray:
    found = np.zeros_like(costs.costs)
    for step, seen in statistics.by_step.items():
        values, counts = seen.distribution()
        moments = observers.Moments(values, counts)
        found[step] = moments.error(-128 * costs.scales, 127 * costs.scales, costs.scales) / (counts @ values**2)
    return found


@pytest.mark.parametrize("common", [False, True])
def test_three_regimes_are_found(common: bool) -> None:
    deviations = np.repeat([1.0, 8.0, 0.2], [20, 35, 45])
    layers = [costs_of(statistics_of(deviations * factor), 100) for factor in ((1, 3) if common else (1,))]
    groups = optimal(layers, 3)
    ends = np.flatnonzero(np.diff(groups)) + 1
    np.testing.assert_allclose(ends, [20, 55], atol=1)


def test_a_step_without_samples_joins_its_neighbour() -> None:
    statistics = statistics_of(np.asarray([1.0, 1.0, 9.0, 9.0, 9.0]))
    del statistics.by_step[1], statistics.by_step[4]
    groups = optimal([costs_of(statistics, 5)], 2)
    np.testing.assert_array_equal(groups, [0, 0, 1, 1, 1])


HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
GRAPHS = {
    "conv": (
        """net (float[N,16,6,6] x, float[N] t) => (float[N,24,6,6] y)
        { [silu] a = Relu (x) [conv] c = Conv <pads=[1,1,1,1]> (a, w, b) [end] y = Tanh (c) }""",
        {"w": (24, 16, 3, 3), "b": (24,)},
    ),
    "gemm": (
        """net (float[N,32] x, float[N] t) => (float[N,24] y)
        { [a] a = Relu (x) [fc] y = Gemm (a, w, b) }""",
        {"w": (32, 24), "b": (24,)},
    ),
    "product": (
        """net (float[N,8,32] x, float[N] t) => (float[N,8,8] y)
        { [a] a = Sin (x) [b] b = Cos (x) [tr] bt = Transpose <perm=[0,2,1]> (b) [mm] y = MatMul (a, bt) }""",
        {},
    ),
}
TIMES = [900.0, 500.0, 100.0, 0.0]


@pytest.fixture(params=list(GRAPHS))
def single(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    text, shapes = GRAPHS[request.param]
    path = tmp_path / "net.onnx"
    ir.save(add_weights(f"{HEAD}\n{text}", shapes), path)
    return path


def forms(path: Path, activations: str, factors: list[float]) -> tuple[ir.Model, dict[str, np.ndarray], list[str]]:
    generator = np.random.default_rng(0)
    shape = [size if isinstance(size, int) else 40 for size in models.load(path).graph.inputs[0].shape or ()]
    data = [{"x": generator.standard_normal(shape).astype(np.float32), "t": np.zeros(40, np.float32)}]
    model = onnxq.quantize(path, data, activations=activations).model
    found = conditionable(model.graph)
    assert found
    tables = {
        name: float(item.quantize.inputs[1].const_value.numpy()) * np.asarray(factors) for name, item in found.items()
    }
    return model, tables, [item.quantize.outputs[0].name or "" for item in found.values()]


def outputs(model: ir.Model, codes: list[str], times: np.ndarray, rows: int = 40) -> list[np.ndarray]:
    session = Session(model, taps=codes, optimize=False)
    shape = [size if isinstance(size, int) else rows for size in model.graph.inputs[0].shape or ()]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return session.run({"x": x, "t": times.astype(np.float32)}, [model.graph.outputs[0].name or "", *codes])


@pytest.mark.parametrize("activations", ["int8", "int6"])
def test_powers_of_two_are_exact_in_every_form(single: Path, activations: str) -> None:
    model, tables, codes = forms(single, activations, [0.5, 1.0, 2.0, 0.25])
    times = np.resize(np.asarray([900, 510, 90, 0]), 40)  # between scheduled ones: the nearest
    found = {}
    for form in ("simulation", "rescale"):
        changed = model.clone()
        assert TimeConditionedScales("t", TIMES, tables, form)(changed).modified
        found[form] = outputs(changed, codes, times)
    for wanted, given in zip(found["simulation"][1:], found["rescale"][1:], strict=True):
        np.testing.assert_array_equal(wanted, given)
    np.testing.assert_allclose(found["rescale"][0], found["simulation"][0], rtol=1e-4, atol=1e-4)
    for step in range(4):  # and each step as if its scales were all that there is
        changed = model.clone()
        TimeConditionedScales("t", TIMES, tables, "constant", step)(changed)
        alone = outputs(changed, codes, times)
        for wanted, given in zip(alone[1:], found["simulation"][1:], strict=True):
            np.testing.assert_array_equal(wanted[step::4], given[step::4])


def test_other_scales_give_the_same_codes_but_for_ties(single: Path) -> None:
    model, tables, codes = forms(single, "int8", [0.61, 1.0, 1.37, 0.29])
    found = []
    for form in ("simulation", "rescale"):
        changed = model.clone()
        TimeConditionedScales("t", TIMES, tables, form)(changed)
        found.append(outputs(changed, codes, np.resize(TIMES, 40)))
    for wanted, given in zip(found[0][1:], found[1][1:], strict=True):
        difference = np.abs(wanted.astype(int) - given.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3
    again = changed.clone()
    assert not TimeConditionedScales("t", TIMES, {"no such scale": np.ones(4)})(again).modified


def test_the_simulation_runs_in_torch(single: Path) -> None:
    torch = pytest.importorskip("torch")
    from onnxq.autograd.interpreter import TorchGraph

    model, tables, codes = forms(single, "int6", [0.5, 1.0, 2.0, 0.25])
    TimeConditionedScales("t", TIMES, tables)(model)
    wanted = outputs(model, codes, np.resize(TIMES, 40))
    shape = [size if isinstance(size, int) else 40 for size in model.graph.inputs[0].shape or ()]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    given = {"x": torch.from_numpy(x), "t": torch.from_numpy(np.resize(TIMES, 40).astype(np.float32))}
    found = TorchGraph(model).run(given, codes)
    for name, expected in zip(codes, wanted[1:], strict=True):
        assert (found[name].numpy() != expected).mean() <= 1e-3


def test_factors_of_all_layers_are_looked_up_at_once(tmp_path: Path) -> None:
    path, shapes = tmp_path / "net.onnx", {"w": (24, 16, 3, 3), "b": (24,), "v": (16, 24, 3, 3)}
    for timestep, factor_shape in (("float[N] t", ["N", 1, 1, 1]), ("float t", [1, 1, 1, 1])):
        text = f"""net (float[N,16,6,6] x, {timestep}) => (float[N,16,6,6] y) {{
            [a] a = Relu (x) [first] c = Conv <pads=[1,1,1,1]> (a, w, b)
            [s] d = Sin (c) [second] y = Conv <pads=[1,1,1,1]> (d, v) }}"""
        ir.save(add_weights(f"{HEAD}\n{text}", shapes), path)
        x = np.random.default_rng(0).standard_normal((40, 16, 6, 6)).astype(np.float32)
        model = onnxq.quantize(path, [{"x": x, "t": np.zeros(40 if "[N]" in timestep else (), np.float32)}]).model
        names = conditionable(model.graph)
        tables = {name: np.asarray([0.5, 1.0, 2.0, 0.25]) * (1 + place) for place, name in enumerate(names)}
        assert len(tables) == 2
        TimeConditionedScales("t", TIMES, tables, "rescale")(model)
        ops = [node.op_type for node in model.graph]
        assert ops.count("Gather") == ops.count("Split") == 1
        split = next(node for node in model.graph if node.op_type == "Split")
        assert len(split.outputs) == 4
        session = Session(model, taps=[value.name or "" for value in split.outputs], optimize=False)
        rows = 2 if "[N]" in timestep else 1
        times = np.asarray([500.0, 100.0][:rows], np.float32).reshape([2] if rows == 2 else [])
        found = session.run({"x": x[:2], "t": times}, [value.name or "" for value in split.outputs])
        assert [value.shape for value in found] == [(rows, 1, 1, 1)] * 4, factor_shape
        np.testing.assert_array_equal(np.stack(found[::2]) * np.stack(found[1::2]), 1)


def test_on_cpus_no_factor_costs_an_integer_kernel(tmp_path: Path, denoiser: Path) -> None:
    kernels, found = {}, {}
    for groups in (1, 4):
        knobs = {**QUICK, "groups": groups, "least_gain_db": 0.0}
        result = onnxq.quantize(denoiser, target="cpu", knobs=knobs, **OPTIONS)
        kernels[groups], found[groups] = result.numbers["integer_kernels"], result.numbers
    assert kernels[4] == kernels[1] > 0
    assert found[1]["time_scales"]["moving"] == 0
    assert 0 < found[4]["time_scales"]["moving"] < found[4]["time_scales"]["values"]
    assert any("keep one scale for all steps" in line for line in found[4]["warnings"])


def test_a_table_has_a_row_for_each_step() -> None:
    with pytest.raises(OnnxqError, match="4 positive scales"):
        TimeConditionedScales("t", TIMES, {"s": np.ones(3)})


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.onnx"
    ir.save(add_weights(NETWORK, SHAPES), path)
    return path


def feeds(path: Path) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    return [
        {
            "x": generator.standard_normal((3, 1, 4, 4)).astype(np.float32),
            "t": np.asarray(time),
            "y": np.asarray([0, 1, 2]),
        }
        for time in (900, 450, 0)
    ]


def test_subgraphs_share_weights_and_route(denoiser: Path, tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    result = onnxq.quantize(denoiser, output=output, knobs={"groups": 3, "lowering": "subgraphs", **QUICK}, **OPTIONS)
    index = json.loads((tmp_path / "quantized.groups.json").read_text())
    served = sorted(step for group in index["groups"] for step in group["steps"])
    assert served == list(range(10))
    assert 1 < len(index["groups"]) <= 3
    whole = Session(output, optimize=False)
    router = Router(tmp_path / "quantized.groups.json")
    for feed in feeds(denoiser):
        wanted = whole.run(feed)[0]
        np.testing.assert_allclose(router.predict(feed["x"], feed["t"], y=feed["y"]), wanted, rtol=1e-4, atol=1e-5)
    stored = {tuple(path.name for path in tmp_path.glob("*.data"))}
    assert stored == {("quantized.onnx.data",)}
    for group in index["groups"]:
        part = ir.load(tmp_path / group["file"])
        large = [value for value in part.graph.initializers.values() if value.const_value.nbytes > 256]
        assert large
        assert all(value.const_value.location == "quantized.onnx.data" for value in large)
        assert not [node for node in part.graph if node.op_type == "ArgMin"]
    assert result.numbers["subgraphs"] == str(tmp_path / "quantized.groups.json")
    by_step = np.asarray(list(result.numbers["scales_by_step"].values()))
    assert by_step.shape == (result.numbers["time_scales"]["values"], 10)
    assert 1 < len(np.unique(by_step, axis=1).T) <= 3  # all follow the same groups
    with pytest.raises(OnnxqError, match="one group"):
        router.predict(np.zeros((2, 1, 4, 4), np.float32), np.asarray([999, 0]), y=np.zeros(2))
    with pytest.raises(OnnxqError, match="conditions y"):
        router.predict(np.zeros((2, 1, 4, 4), np.float32), 0)


def test_images_of_the_graphs_of_all_groups_are_those_of_the_one_for_all_steps(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "quantized.onnx"
    onnxq.quantize(denoiser, output=output, knobs={"groups": 3, "lowering": "subgraphs", **QUICK}, **OPTIONS)
    numbers = []
    for model in (output, tmp_path / "quantized.groups.json"):
        arguments = ("--against", denoiser, "--steps", 10, "-n", 3, "-q", "--json", tmp_path / "numbers.json")
        assert run(capsys, "sample", model, *arguments)[0] == 0
        numbers.append(json.loads((tmp_path / "numbers.json").read_text()))
    for key in ("trajectory_sqnr_db", "same_seed_sqnr_db"):
        np.testing.assert_allclose(*[np.asarray(found[key], float) for found in numbers], atol=1e-3)
    other = ir.load(tmp_path / "quantized.group1.onnx")
    flat = ir.node("ReduceMean", [other.graph.outputs[0]], {"keepdims": 0}, name="flat")
    other.graph.append(flat)
    flat.outputs[0].name, other.graph.outputs[0].name = other.graph.outputs[0].name, "inner"
    other.graph.outputs[0] = flat.outputs[0]
    ir.save(other, tmp_path / "quantized.group1.onnx")
    found = run(capsys, "sample", tmp_path / "quantized.groups.json", "--steps", 10, "-n", 1, "-q")
    assert_two_lines(*found, "expected a denoiser", "quantized.group1.onnx")
    (tmp_path / "quantized.groups.json").write_text("{}")
    found = run(capsys, "sample", tmp_path / "quantized.groups.json", "--steps", 10, "-n", 1, "-q")
    assert_two_lines(*found, "expected an index of subgraphs")


def test_rescale_passes_the_lint_and_is_the_default(denoiser: Path, tmp_path: Path) -> None:
    from onnxq.targets import get

    knobs = {"groups": 4, "powers_of_two": True, "least_gain_db": 0.0, **QUICK}
    rescaled = onnxq.quantize(denoiser, knobs=knobs, **OPTIONS)
    simulated = onnxq.quantize(denoiser, knobs={**knobs, "lowering": "none"}, **OPTIONS)
    assert not [item for item in get("tensorrt").lint(rescaled.model) if item.severity == "error"]
    assert any("looked up" in line for line in simulated.numbers["warnings"])
    sessions = [Session(item.model, optimize=False) for item in (rescaled, simulated)]
    for feed in feeds(denoiser):
        first, second = (session.run(feed)[0] for session in sessions)
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
    assert any(node.op_type == "ArgMin" for node in rescaled.model.graph)
    scales = [node.inputs[1] for node in rescaled.model.graph if graphs.is_quantize(node)]
    assert scales and all(graphs.is_constant(scale) for scale in scales)


def test_tables_of_time_come_first_and_leave_fewer_values_to_rescale(denoiser: Path) -> None:
    moving = {}
    for cache in (False, True):
        knobs = {**QUICK, "groups": 4, "cache": cache, "least_gain_db": 0.0}
        result = onnxq.quantize(denoiser, knobs=knobs, **OPTIONS)
        moving[cache] = result.numbers["time_scales"]["moving"]
    assert moving[True] < moving[False]
    assert "onnxq.temporal_timesteps" in result.model.metadata_props


def test_values_that_gain_too_little_keep_one_scale(denoiser: Path) -> None:
    for least, moving in ((0.0, lambda count: count > 0), (60.0, lambda count: count == 0)):
        result = onnxq.quantize(denoiser, knobs={"groups": 4, "least_gain_db": least, **QUICK}, **OPTIONS)
        assert moving(result.numbers["time_scales"]["moving"])
        assert any(node.op_type == "ArgMin" for node in result.model.graph) == (least == 0)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_rescaled_products_compile_to_integers(tmp_path: Path) -> None:
    from onnxq.engines import build

    text, shapes = GRAPHS["conv"]
    path = tmp_path / "net.onnx"
    ir.save(add_weights(f"{HEAD}\n{text}", shapes), path)
    model, tables, _ = forms(path, "int8", [0.61, 1.0, 1.37, 0.29])
    TimeConditionedScales("t", TIMES, tables, "rescale")(model)
    models.save(model, tmp_path / "rescaled.onnx")
    engine = build(tmp_path / "rescaled.onnx", tmp_path / "net.engine", runtime="tensorrt-rtx")
    assert engine.low_precision_nodes == ("conv",)
    assert not engine.promised_but_float


def test_errors_are_two_lines(denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for knob in ("groups=11", "groups=0", "lowering=engines", "partition=random", "scope=block"):
        given = ["--recipe", "apq-dm", "--set", knob, "--steps", "10", "-n", "20", "-o", str(tmp_path / "o.onnx")]
        code, text = run(capsys, "quantize", str(denoiser), "--quiet", *given)
        assert_two_lines(code, text)
        assert knob.split("=")[1] in text
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.groups.json").write_text('{"groups": [{"file": "b.onnx", "timesteps": [1]}]}')
    with pytest.raises(OnnxqError, match=r"b\.onnx, which the index names, found none"):
        Router(tmp_path / "a.groups.json")
    (tmp_path / "a.groups.json").write_text("{")
    with pytest.raises(OnnxqError, match="index of subgraphs"):
        Router(tmp_path / "a.groups.json")


def test_values_without_a_row_for_each_sample_have_no_statistics(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        f"""{HEAD} net (float[N,4,6] x) => (float[N,4,6] y) <int64[2] fold = {{-1, 6}}, int64[3] back = {{-1, 4, 6}}>
        {{ [f] a = Reshape (x, fold) [r] b = Relu (a) [u] y = Reshape (b, back) }}"""
    )
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((8, 4, 6)).astype(np.float32), step=np.arange(8) % 2)
    source = Npz(path, input_specs(model))
    session = Session(model, taps=["b"])
    found = timesteps.record(session, ["x", "b", "y"], source, input_specs(model))
    assert found.keys() == {"x", "y"}
    assert found["x"].by_step[1].rows == 4


@pytest.mark.skipif(not (DATA / "denoisers").is_dir(), reason="the real denoisers are not here")
def test_a_real_denoiser_gains_in_its_worst_step() -> None:
    path = DATA / "denoisers" / "mnist_unet_attention.onnx"
    sampler, _ = open_sampler(models.load(path), path, make_settings({"steps": 20}))
    other = dataclasses.replace(sampler, seed=77)
    error, worst = {}, {}
    for groups in (1, 8):
        knobs = {"groups": groups, "step_floor_db": 0.0, "trajectories": 6, "kept_steps": 20, "cache": False}
        result = onnxq.quantize(path, recipe="apq-dm", steps=20, samples=120, knobs=knobs)
        sessions = {"float": (other, Session(path)), "quantized": (other, Session(result.model, optimize=False))}
        error[groups] = result.numbers["time_scales"]["error"]
        worst[groups] = sample(sessions, 8, 0).numbers["worst_step_sqnr_db"]
    assert error[8] < 0.7 * error[1]
    assert worst[8] > worst[1] + 1.0, worst


def test_all_subgraphs_are_written_at_the_opset_that_is_asked_for(denoiser: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.onnx"
    knobs = {"groups": 3, "lowering": "subgraphs", **QUICK}
    onnxq.quantize(denoiser, output=output, opset=17, knobs=knobs, **OPTIONS)
    written = [ir.load(path) for path in (output, *sorted(tmp_path.glob("q.group?.onnx")))]
    assert len(written) > 1
    assert {(model.ir_version, model.graph.opset_imports[""]) for model in written} == {(8, 17)}
