"""Cores and memory within what a container and an affinity leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnxq import machine


def system(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return tmp_path


def test_affinity_bounds_the_cores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.cores() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert machine.cores() == 1


@pytest.mark.parametrize(("text", "cores"), [("250000 100000", 3), ("max 100000", 16), ("50000 100000", 1), ("", 16)])
def test_a_quota_bounds_the_cores(root: Path, text: str, cores: int) -> None:
    system(root, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text})
    assert machine.cores() == cores


def test_groups_around_this_one_bound_it_too(root: Path) -> None:
    system(
        root,
        {
            "proc/self/cgroup": "0::/slice/mine\n",
            "sys/fs/cgroup/slice/mine/cpu.max": "max 100000",
            "sys/fs/cgroup/slice/cpu.max": "200000 100000",
            "sys/fs/cgroup/slice/mine/memory.max": "max",
            "sys/fs/cgroup/slice/memory.max": "1048576",
        },
    )
    assert machine.cores() == 2
    assert machine.memory_bytes() == 1048576


def test_the_older_version_of_control_groups(root: Path) -> None:
    system(
        root,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2097152",
        },
    )
    assert machine.cores() == 4
    assert machine.memory_bytes() == 2097152


def test_memory_is_that_of_the_machine(root: Path) -> None:
    assert machine.memory_bytes() > 1 << 28
