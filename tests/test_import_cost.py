"""Importing the package and asking for help costs nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "torch", "jinja2")


def loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(chr(10).join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_onnxq_loads_nothing_heavy() -> None:
    assert not loaded("import onnxq").intersection(HEAVY)


def test_help_loads_nothing_heavy() -> None:
    code = "from typer.testing import CliRunner; from onnxq.cli import app; CliRunner().invoke(app, ['quantize', '-h'])"
    assert not loaded(code).intersection(HEAVY)


def test_answers_come_at_once() -> None:
    """Processor time: 0.03 s for the import and 0.2 s for the help, where 0.3 and 0.5 are the most there should be."""
    for code, most in (
        ("import onnxq", 0.3),
        ("from onnxq.cli import app; app(['--help'], standalone_mode=False)", 0.5),
    ):
        spent = []
        for _ in range(3):
            before = os.times()
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            after = os.times()
            spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert min(spent) < most, (code, spent)


def test_passes_are_only_reached_through_the_package() -> None:
    modules = loaded("import onnxq.passes.insert_qdq")
    assert "onnxq.passes.insert_qdq" in modules and "passes" not in modules


@pytest.mark.parametrize(
    ("mine", "found"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "9"}, "None")],
)
def test_threads_that_wait_give_their_core_to_others(mine: dict[str, str], found: str) -> None:
    """Unless the user wants it otherwise, and in time for torch, which reads it once."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | mine
    code = "import onnxq, os, sys; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [found, "False"]
