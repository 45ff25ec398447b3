"""Killed at any moment without warning: the same command goes on, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("ONNXQ_KILLS", "1"))

COMMANDS = {
    "adaround": ["--recipe", "adaround", "--weights", "int4", "--set", "iterations=150"],
    "lsq": ["--recipe", "lsq", "--set", "distil=blocks", "--set", "steps=150"],
    "int8": ["--recipe", "int8"],
    "made inputs": ["--synthesis", "zeroq", "-n", "64"],
}
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other make times what a kill cannot hit


def command(network: Path, calibration: Path, output: Path, name: str) -> list[str]:
    data = [] if name == "made inputs" else ["--data", str(calibration)]
    return [sys.executable, "-m", "onnxq", "quantize", str(network), *data, "-o", str(output), "-q", *COMMANDS[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_runs_end_with_the_same_bytes(network: Path, calibration: Path, tmp_path: Path, name: str) -> None:
    undisturbed, killed = tmp_path / "undisturbed" / "out.onnx", tmp_path / "killed" / "out.onnx"
    for path in (undisturbed, killed):
        path.parent.mkdir()
    before = time.monotonic()
    subprocess.run(command(network, calibration, undisturbed, name), check=True, env=ALONE)
    seconds = time.monotonic() - before
    chance = random.Random(name)
    kills = 0
    while kills < KILLS:
        process = subprocess.Popen(command(network, calibration, killed, name), env=ALONE)
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
    subprocess.run(command(network, calibration, killed, name), check=True, env=ALONE)
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert [path.name for path in killed.parent.iterdir()] == ["out.onnx"]
