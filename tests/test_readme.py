"""What the README shows is what happens: its commands run, its settings are valid, its options and recipes exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import MODELS
from PIL import Image
from test_cli_errors import run
from typer.testing import CliRunner

from onnxq import recipes
from onnxq.cli import app
from onnxq.config import make_settings

README = (MODELS.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"```(\w+)\n(.*?)```", README, re.DOTALL)]
COMMANDS = [
    line for language, text in BLOCKS if language == "sh" for line in text.splitlines() if line.startswith("onnxq ")
]


def test_commands_on_the_shipped_model_run(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(MODELS)
    ran = [line for line in COMMANDS if "models/" in line or "fashion.int8.onnx" in line]
    assert {line.split()[1] for line in ran} >= {"quantize", "compare", "lint", "build"}
    for line in ran:
        done = subprocess.run(
            [sys.executable, "-m", "onnxq.cli", *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_commands_on_a_model_of_ones_own_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, with the shipped classifier under the names that they use; learning is cut short."""
    pytest.importorskip("torch", reason="one of them learns")
    (tmp_path / "model.onnx").symlink_to(MODELS / "fashion_resnet.onnx")
    (tmp_path / "calibration.npz").symlink_to(MODELS / "fashion_calibration.npz")
    quantize_with_onnxruntime(tmp_path / "model.onnx", tmp_path / "by_onnxruntime.onnx")
    monkeypatch.chdir(tmp_path)
    own = [line for line in COMMANDS if "sd15/" not in line]  # test_prompts has those of a pipeline
    lines = [line for line in own if "model.onnx" in line or "by_onnxruntime" in line]
    assert {line.split()[1] for line in lines} == {"quantize", "statistics", "lint"}
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        short = ["-n", "8", "--set", "iterations=2"] if "qdrop" in words else []
        code, stderr = run(capsys, *words, *short)
        finds_errors = words[0] == "lint" and "--fix" not in words
        assert code == (1 if finds_errors else 0), f"{line}\n{stderr}"
    assert run(capsys, "lint", "fixed.onnx")[0] == 0


def quantize_with_onnxruntime(model: Path, output: Path) -> None:
    """Static quantization with its defaults: unsigned activations with zero points, and int32 biases."""
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            with np.load(MODELS / "fashion_calibration.npz") as arrays:
                name = next(key for key in arrays.files if key != "labels")
                self.feeds = iter([{name: arrays[name][:8]}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    quantization.quantize_static(model, output, Reader())


@pytest.mark.parametrize("line", COMMANDS)
def test_options_of_every_command_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    help_text = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for word in words[2:]:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word.partition('=')[0])}(?![\w-])", help_text), (word, line)


def test_settings_are_valid() -> None:
    texts = [text for language, text in BLOCKS if language == "yaml"]
    assert texts
    for text in texts:
        make_settings(yaml.safe_load(text))


def test_every_recipe_is_described() -> None:
    missing = [name for name in recipes.RECIPES if f"`{name}`" not in README and f"--recipe {name}" not in README]
    assert not missing


def test_image_folders_are_read_as_the_settings_say(tmp_path: Path) -> None:
    """A classifier judged on picture files is as good as on the arrays that they were made from."""
    with np.load(MODELS / "fashion_test.npz") as arrays:
        name = next(key for key in arrays.files if key != "labels")
        inputs, labels = arrays[name][:120], arrays["labels"][:120]
    low, high = float(inputs.min()), float(inputs.max())
    pixels = np.round((inputs - low) / (high - low) * 255).astype(np.uint8)
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = tmp_path / "pictures" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{index}.png")
    mean, std = -low / (high - low), 1 / (high - low)
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"preprocess: {{mean: [{mean}], std: [{std}], resize: squash}}")
    model = str(MODELS / "fashion_resnet.onnx")
    report = tmp_path / "numbers.json"
    arguments = ["compare", model, model, "--data", str(tmp_path / "pictures"), "--config", str(settings)]
    done = CliRunner().invoke(app, [*arguments, "--json", str(report), "--no-latency", "--no-layers"])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(report.read_text())["top1_float"] > 0.85
