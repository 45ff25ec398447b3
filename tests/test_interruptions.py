"""Killed at any moment without warning: the same command goes on, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onnxq.pipeline import checkpoint_folder

KILLS = int(os.environ.get("ONNXQ_KILLS", "1"))

QUANTIZE = ["quantize", "{network}", "-o", "{output}.onnx"]
COMMANDS = {
    "adaround": [*QUANTIZE, "--data", "{data}", "--recipe", "adaround", "--weights", "int4", "--set", "iterations=150"],
    "lsq": [*QUANTIZE, "--data", "{data}", "--recipe", "lsq", "--set", "distil=blocks", "--set", "steps=150"],
    "int8": [*QUANTIZE, "--data", "{data}"],
    "made inputs": [*QUANTIZE, "--synthesis", "zeroq", "-n", "32"],
    "synthesize": ["synthesize", "{network}", "-o", "{output}.npz", "-n", "12", "--steps", "60", "--method", "dsg"],
}


def command(network: Path, calibration: Path, output: Path, name: str) -> list[str]:
    places = {"network": network, "data": calibration, "output": output.with_suffix("")}
    return [sys.executable, "-m", "onnxq", *(word.format(**places) for word in COMMANDS[name]), "-q"]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_runs_end_with_the_same_bytes(network: Path, calibration: Path, tmp_path: Path, name: str) -> None:
    written = "out.npz" if name == "synthesize" else "out.onnx"
    undisturbed, killed = tmp_path / "undisturbed" / written, tmp_path / "killed" / written
    for path in (undisturbed, killed):
        path.parent.mkdir()
    before = time.monotonic()
    subprocess.run(command(network, calibration, undisturbed, name), check=True)
    seconds = time.monotonic() - before
    chance = random.Random(name)
    kills = 0
    while kills < KILLS:
        process = subprocess.Popen(command(network, calibration, killed, name))
        try:
            process.wait(chance.uniform(0.3, 0.8) * seconds)
            assert process.returncode == 0
            seconds *= 0.7  # the machine has become faster
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            assert not killed.exists() or killed.read_bytes() == undisturbed.read_bytes(), "a half-written file"
        killed.unlink(missing_ok=True)
    print(f"{name}: {kills} kills survived")
    subprocess.run(command(network, calibration, killed, name), check=True)
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert [path.name for path in killed.parent.iterdir()] == [written]


def test_a_synthesis_goes_on_with_its_next_batch(network: Path, calibration: Path, tmp_path: Path) -> None:
    """Killed when its second batch is there, a run that goes on does not make the first one again."""
    output = tmp_path / "out.npz"
    started = subprocess.Popen(command(network, calibration, output, "synthesize"))
    kept = checkpoint_folder(output)
    while started.poll() is None and len(list(kept.glob("*.npz"))) < 2:
        time.sleep(0.01)
    started.kill()
    started.wait()
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*.npz")}
    assert len(before) >= 2 and not output.exists()
    damaged = min(before)
    damaged.write_bytes(damaged.read_bytes()[:100])  # as after a loss of power: this one is made again
    subprocess.run(command(network, calibration, output, "synthesize"), check=True)
    undisturbed = tmp_path / "undisturbed.npz"
    subprocess.run(command(network, calibration, undisturbed, "synthesize"), check=True)
    assert output.read_bytes() == undisturbed.read_bytes()
    assert not kept.exists()
