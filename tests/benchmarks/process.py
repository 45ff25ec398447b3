"""Run a whole process and say what it cost: wall time, processor time, and the peak memory of its process tree."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent


def tree_mib(process: psutil.Process) -> float:
    """Memory of a process and its descendants, now: resident, or with children each one's share of the shared pages."""
    total = 0
    with contextlib.suppress(psutil.Error):
        children = process.children(recursive=True)
        for member in [process, *children]:
            total += member.memory_full_info().pss if children else member.memory_info().rss
    return total / 2**20


def measure(command: list[str], log: Path, limit_seconds: float, limit_mib: float = 12_000) -> dict:
    """Run a command to its end or to a limit of time or memory, its output in a log file.

    The peak is the larger of two readings: the kernel's high-water mark of the process itself (exact) and the sum over
    the process tree, sampled. This module must stay small: a child inherits its parent's high-water mark.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    process, peak, done, stopped = psutil.Process(child.pid), 0.0, threading.Event(), ""

    def watch() -> None:
        nonlocal peak, stopped
        while not done.wait(0.1):
            peak = max(peak, tree_mib(process))
            if not stopped and peak > limit_mib:
                stopped = f"stopped above {limit_mib:.0f} MiB"
            elif not stopped and time.perf_counter() - start > limit_seconds:
                stopped = f"stopped after {limit_seconds:.0f} s"
            else:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    watcher.join()
    result: dict = {
        "wall_seconds": round(wall, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_mib": round(max(peak, usage.ru_maxrss / 1024), 1),
    }
    if child.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        result["error"] = stopped or f"exit code {child.returncode}: {(lines or ['no output'])[-1][:300]}"
    return result


def last_json(log: Path) -> dict:
    """The last line of a log that is a JSON object, or nothing."""
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return {}


def child(script: str, log: Path, limit_seconds: float, *arguments: object) -> dict:
    """Run a script of this folder in our own environment; its last JSON line is the answer."""
    command = [sys.executable, str(HERE / script), *(str(argument) for argument in arguments)]
    cost = measure(command, log, limit_seconds)
    return {"error": cost["error"]} if "error" in cost else last_json(log)
