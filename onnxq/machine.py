"""What this process may use of the machine: cores and memory, within its affinity and its control group's limits."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

UNKNOWN_MEMORY_BYTES = 16 << 30  # where the system does not say
ROOT = Path("/")


def cores() -> int:
    """How many cores this process may use: no more than its affinity and its container's share of time allow."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups():
        quota, period = (*_words(folder / "cpu.max"), "", "")[:2]
        if not quota:  # version 1
            quota, period = _word(folder / "cpu/cpu.cfs_quota_us"), _word(folder / "cpu/cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def memory_bytes() -> int:
    """The memory of the machine, or of the container if that is less."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        memory = UNKNOWN_MEMORY_BYTES
    for folder in _control_groups():
        for file in (folder / "memory.max", folder / "memory/memory.limit_in_bytes"):
            limit = _word(file)
            if limit.isdigit():
                memory = min(memory, int(limit))
    return memory


def _control_groups() -> Iterator[Path]:
    """The folders whose limits hold: that of this process's group, and of those around it."""
    mounted = ROOT / "sys/fs/cgroup"
    lines = _text(ROOT / "proc/self/cgroup").splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    group = Path(own)
    yield from (mounted / part for part in (group, *group.parents))


def _words(file: Path) -> list[str]:
    return _text(file).split()


def _word(file: Path) -> str:
    return next(iter(_words(file)), "")


def _text(file: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return file.read_text(encoding="utf-8")
    return ""
