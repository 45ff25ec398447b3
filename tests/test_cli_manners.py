"""What a newcomer tries: wrong words, outputs over inputs, JSON in a pipe, quiet and verbose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli_errors import assert_two_lines, run

from onnxq import recipes
from onnxq.cli import app


@pytest.mark.parametrize(
    ("arguments", "word", "tip"),
    [
        (["quantise", "m.onnx"], "Did you mean 'quantize'", "onnxq --help"),
        (["quantize"], "missing argument 'MODEL'", "onnxq quantize --help"),
        (["quantize", "m.onnx", "--dta", "x"], "--dta", "onnxq quantize --help"),
        (["quantize", "m.onnx", "--seed", "abc"], "'--seed'", "onnxq quantize --help"),
        (["quantize", "m.onnx", "--samples", "0"], "samples", "onnxq quantize --help"),
        (["lint", "m.onnx", "--sm", "abc"], "'--sm'", "onnxq lint --help"),
    ],
)
def test_wrong_words_are_two_lines(
    arguments: list[str], word: str, tip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_two_lines(*run(capsys, *arguments), word, tip)


def test_no_words_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "onnxq"], capture_output=True, text=True)
    assert done.returncode == 2 and "quantize" in done.stdout + done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize("option", ["-o", "--json", "--report"])
def test_data_is_never_written_over(
    option: str, network: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = calibration.read_bytes()
    outputs = {"-o": network.with_name("q.onnx")} | {option: calibration}
    words = [word for pair in outputs.items() for word in pair]
    assert_two_lines(*run(capsys, "quantize", network, "--data", calibration, *words), "one of the inputs")
    assert_two_lines(*run(capsys, "statistics", network, "--data", calibration, "-o", calibration), "inputs")
    assert calibration.read_bytes() == before


def test_two_outputs_are_two_files(network: Path, calibration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = network.with_name("q.onnx")
    code, stderr = run(capsys, "quantize", network, "--data", calibration, "-o", output, "--json", output)
    assert_two_lines(code, stderr, "q.onnx twice")


def test_recipes_are_listed_and_each_shows_its_paper_formats_and_knobs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    app(["recipes"], standalone_mode=False)
    listed = capsys.readouterr().out
    for name, entry in recipes.RECIPES.items():
        assert f"{name} " in listed and entry.line in listed
        app(["recipes", name, "--json", str(tmp_path / "recipe.json")], standalone_mode=False)
        shown, numbers = capsys.readouterr().out, json.loads((tmp_path / "recipe.json").read_text())
        assert numbers["recipe"] == name and numbers["knobs"]
        assert all(f"  {knob} = " in shown for knob in numbers["knobs"])
        assert "Formats (--weights, --activations):" in shown and "Source:" in shown
    app(["recipes", "--json", str(tmp_path / "all.json")], standalone_mode=False)
    assert set(json.loads((tmp_path / "all.json").read_text())) == set(recipes.RECIPES)
    assert_two_lines(*run(capsys, "recipes", "int9"), "int9")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "onnxq", *map(str, arguments)]


def test_json_goes_into_a_pipe_alone(network: Path, calibration: Path, tmp_path: Path) -> None:
    arguments = command("quantize", network, "--data", calibration, "-o", tmp_path / "q.onnx", "--json", "-")
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout)["output"] == str(tmp_path / "q.onnx")
    assert "SQNR" in done.stderr and not (tmp_path / "-").exists()
    done = subprocess.run(command("lint", tmp_path / "q.onnx", "--json", "-"), capture_output=True, text=True)
    assert json.loads(done.stdout) == {"errors": [], "warnings": []} and "0 errors" in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(command("recipes", "int8"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.wait(60)
    assert process.stderr.read() == b""


def test_a_float_model_is_said_to_be_one(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxq.cli

    sys.argv, before = ["onnxq", "lint", str(network)], sys.argv
    try:
        onnxq.cli.main()
    finally:
        sys.argv = before
    assert "0 errors, 0 warnings for tensorrt: it holds no Q/DQ" in capsys.readouterr().out


def test_quiet_says_nothing_and_verbose_every_stage(
    network: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("quantize", network, "--data", calibration, "-o", tmp_path / "q.onnx")
    assert run(capsys, *arguments, "--quiet") == (0, "")
    code, stderr = run(capsys, *arguments, "--verbose")
    assert code == 0 and {"Loading", "Calibrating", "Checking"} <= {
        line.partition(":")[0] for line in stderr.splitlines()
    }


def test_formats_are_checked_before_the_work(
    network: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run(capsys, "analyze", network, "--data", calibration, "--narrow", "int9", "--verbose")
    assert_two_lines(code, stderr, "'int9'")


def test_spaces_and_unicode_in_names(
    network: Path,
    calibration: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "sp ace" / "ünï"
    folder.mkdir(parents=True)
    model = network.rename(folder / "mödel 1.onnx")
    monkeypatch.chdir(folder)
    assert run(capsys, "quantize", model.name, "--data", calibration, "--report", "r é.html", "-q")[0] == 0
    assert (folder / "mödel 1.int8.onnx").is_file() and (folder / "r é.html").is_file()


def test_a_constant_activation_is_drawn() -> None:
    from onnxq.calibration.observers import Statistics

    statistics = Statistics()
    statistics.update(np.full((4, 20), -170.48301696777344, np.float32), 1 << 20)
    edges, counts = statistics.drawing()
    assert len(edges) == 65 and sum(counts) == 80 and (np.diff(edges) > 0).all()
