"""The doctor names what is there and what is not, and how to get it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onnxq import doctor
from onnxq.cli import app


def test_versions_are_those_installed(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "doctor.json")])
    assert done.exit_code == 0, done.output
    numbers = json.loads((tmp_path / "doctor.json").read_text())
    for package in ("torch", "netron"):
        assert numbers["packages"][package] == metadata.version(package)
    for need in doctor.NEEDS:
        assert need.module in done.output


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    done = CliRunner().invoke(app, ["doctor"])
    assert "not installed: pip install 'onnxq[learn]'" in done.output


def test_two_builds_of_onnxruntime_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "both builds are installed" in done.output


def test_every_extra_that_it_names_exists() -> None:
    extras = metadata.metadata("onnxq").get_all("Provides-Extra")
    for need in doctor.NEEDS:
        if "[" in need.install:
            assert need.install.split("[")[1].split("]")[0] in extras


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("flags : sse2 avx2 avx512_vnni", "AVX-512 VNNI, AVX2"),
        ("flags : avx2 avx_vnni amx_int8", "AVX VNNI, AMX INT8, AVX2"),
        ("flags : avx avx2 avx512f", "AVX2 without VNNI (8-bit weights may overflow: --target cpu --weights int7)"),
        ("", "unknown"),
    ],
)
def test_what_integers_run_on(flags: str, words: str) -> None:
    assert doctor.integer_instructions(flags) == words
