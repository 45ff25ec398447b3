"""Damaged models, data, schedules and settings: no crash, no hang, no traceback, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import mutations


def test_damaged_inputs_are_refused_in_two_lines(tmp_path: Path) -> None:
    mutations.corpus(tmp_path)
    assert mutations.run(tmp_path, seed=1, start=0, count=150, report=print) == []
