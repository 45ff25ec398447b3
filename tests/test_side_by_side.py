"""Denoisers are compared step by step, and those of several graphs graph by graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_cli_errors import assert_two_lines, run
from test_temporal_features import NETWORK, SHAPES
from typer.testing import CliRunner

import onnxq
from onnxq.calibration.data import Iterables
from onnxq.cli import app
from onnxq.diffusion.router import Router, Served
from onnxq.runtime import Session

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser, its graph for all steps and those for three groups of them, and inputs recorded along its sampler."""
    folder = tmp_path_factory.mktemp("denoiser")
    model = folder / "denoiser.onnx"
    ir.save(add_weights(NETWORK, SHAPES), model)
    knobs = {"groups": 3, "lowering": "subgraphs", "step_floor_db": 0.0, "trajectories": 4, "kept_steps": STEPS}
    options = {"steps": STEPS, "exclude": ["first", "last"], "recipe": "apq-dm"}
    onnxq.quantize(model, output=folder / "quantized.onnx", knobs=knobs | {"cache": False}, **options)
    arguments = ["trajectories", str(model), "-o", str(folder / "seen.npz"), "-n", "5", "--seed", "7", "-q"]
    assert CliRunner().invoke(app, [*arguments, "--steps", str(STEPS), "--keep", "4"]).exit_code == 0
    return folder


def test_a_graph_for_each_group_is_judged_on_its_own_steps(folder: Path) -> None:
    whole, parts = (
        onnxq.compare(folder / "denoiser.onnx", folder / name, folder / "seen.npz", latency=False)
        for name in ("quantized.onnx", "quantized.groups.json")
    )
    groups = json.loads((folder / "quantized.groups.json").read_text())["groups"]
    assert len(groups) > 1 and [group["file"] for group in parts.groups] == [group["file"] for group in groups]
    assert parts.samples == whole.samples == sum(group["samples"] for group in parts.groups) == 20
    assert parts.step_sqnr_db.keys() == whole.step_sqnr_db.keys() == set(range(STEPS))
    for step, ratio in whole.step_sqnr_db.items():
        assert parts.step_sqnr_db[step] == pytest.approx(ratio, abs=1e-2)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-2)
    assert {layer["name"] for layer in parts.layers} == {layer["name"] for layer in whole.layers}
    files = [folder / group["file"] for group in groups]
    weights = (folder / "quantized.onnx.data").stat().st_size
    assert parts.quantized_bytes == sum(file.stat().st_size for file in files) + weights


def test_ratios_by_step_are_what_numpy_finds(folder: Path) -> None:
    found = onnxq.compare(folder / "denoiser.onnx", folder / "quantized.onnx", folder / "seen.npz", latency=False)
    with np.load(folder / "seen.npz") as arrays:
        inputs, step = {name: arrays[name] for name in ("x", "t", "y")}, arrays["step"]
    sessions = [Session(folder / name) for name in ("denoiser.onnx", "quantized.onnx")]
    for number in range(STEPS):
        rows = [
            {"x": x[None], "t": np.asarray(t), "y": y[None]}
            for x, t, y, s in zip(*inputs.values(), step, strict=True)
            if s == number
        ]
        wanted, quantized = (np.concatenate([session.run(row)[0] for row in rows]) for session in sessions)
        ratio = 10 * np.log10((wanted**2).sum() / ((wanted - quantized) ** 2).sum())
        assert found.step_sqnr_db[number] == pytest.approx(ratio, abs=1e-3)
        assert found.timestep_sqnr_db[float(rows[0]["t"])] == found.step_sqnr_db[number]


def test_inputs_without_steps_are_told_apart_by_their_timesteps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(folder / "seen.npz") as arrays:
        np.savez(tmp_path / "plain.npz", **{name: arrays[name] for name in ("x", "t", "y")})
    outputs = ("--json", tmp_path / "a.json", "--report", tmp_path / "a.html")
    models = (folder / "denoiser.onnx", folder / "quantized.groups.json")
    assert run(capsys, "compare", *models, "--data", tmp_path / "plain.npz", "-n", 17, *outputs)[0] == 0
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert "step_sqnr_db" not in numbers and len(numbers["timestep_sqnr_db"]) == STEPS
    assert numbers["samples"] == 17 and numbers["latency_ms_quantized"] > 0
    page = (tmp_path / "a.html").read_text()
    assert "at worst (timestep " in page and "quantized.group0.onnx" in page


def test_the_table_names_the_worst_step_and_graph(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from onnxq.report.table import plain_lines

    found = onnxq.compare(
        folder / "denoiser.onnx", folder / "quantized.groups.json", folder / "seen.npz", latency=False
    )
    step = min(found.step_sqnr_db, key=lambda step: found.step_sqnr_db[step])
    worst = min(found.groups, key=lambda group: group["sqnr_db"])
    lines = plain_lines(found.to_json())
    assert f"worst step: {found.step_sqnr_db[step]:.1f} dB (step {step})" in lines
    assert f"worst graph: {worst['sqnr_db']:.1f} dB ({worst['file']}, of {len(found.groups)})" in lines


def test_a_source_is_divided_among_the_graphs(folder: Path) -> None:
    router = Router(folder / "quantized.groups.json")
    samples = Iterables([{"x": np.zeros((1, 1, 4, 4), np.float32), "t": time} for time in router.timesteps])
    parts = [list(Served(samples, router, number)) for number in range(len(router.files))]
    assert [len(part) for part in parts] == [int((router.groups == number).sum()) for number in range(len(parts))]


def test_every_graph_of_an_index_is_linted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = folder / "quantized.groups.json"
    assert run(capsys, "lint", index, "--json", tmp_path / "right.json")[0] == 0
    assert json.loads((tmp_path / "right.json").read_text())["errors"] == []
    assert run(capsys, "lint", index, "--target", "tensorrt", "--fix", tmp_path / "out.onnx")[0] == 2
    for file in folder.glob("quantized*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = ir.load(tmp_path / "quantized.group1.onnx")
    rounded = next(node for node in broken.graph if node.op_type == "QuantizeLinear")
    rounded.inputs[2].const_value = ir.tensor(np.asarray(3, np.int8), name=rounded.inputs[2].name)
    ir.save(broken, tmp_path / "quantized.group1.onnx")
    assert run(capsys, "lint", tmp_path / index.name, "--json", tmp_path / "wrong.json")[0] == 1
    errors = json.loads((tmp_path / "wrong.json").read_text())["errors"]
    assert errors and {item["file"] for item in errors} == {"quantized.group1.onnx"}


def test_commands_for_one_graph_say_what_an_index_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = folder / "quantized.groups.json"
    assert_two_lines(*run(capsys, "view", index), "quantized.group0.onnx")
    for command in ("quantize", "strip", "analyze"):
        assert_two_lines(*run(capsys, command, index, *(["-o", "x.onnx"] if command == "strip" else [])), "found JSON")
