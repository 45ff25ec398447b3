"""Progress: a live line on a terminal, one plain line per stage elsewhere, nothing when quiet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

Advance = Callable[[int], None]
SHORT_SECONDS = 2.0  # a stage that takes less is not worth a line in a log


class Progress:
    """Says what is being done and how far it is.

    Args:
        enabled: ``False`` says nothing (libraries, ``--quiet``).
        verbose: Every stage gets a line with its time, not only those of two seconds and more.
        stream: Where lines go; standard error, so that standard output stays the result.
    """

    def __init__(self, *, enabled: bool = False, verbose: bool = False, stream: TextIO | None = None) -> None:
        self.enabled, self.verbose = enabled, verbose
        self.stream = stream or sys.stderr
        self.live = enabled and self.stream.isatty()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, key: str, text: str, total: int | None = None, unit: str = "samples") -> Iterator[Advance]:
        """Time one stage under ``key``; the yielded function takes how many of ``total`` units are done."""
        start = time.perf_counter()
        try:
            if self.live:
                yield from self._live(text, total)
            else:
                yield lambda done: None
        finally:
            seconds = time.perf_counter() - start
            self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        if self.enabled and (self.verbose or (not self.live and seconds >= SHORT_SECONDS)):
            self.stream.write(f"{text}: {seconds:.1f} s{f' for {total} {unit}' if total else ''}\n")
            self.stream.flush()

    def _live(self, text: str, total: int | None) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}")]
        if total:
            columns += [BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn()]
        with Bars(*columns, console=Console(file=self.stream), transient=True) as bars:
            task = bars.add_task(text, total=total)
            yield lambda done: bars.update(task, completed=done)

    def note(self, text: str) -> None:
        """One line for the user."""
        if self.enabled:
            self.stream.write(text + "\n")
            self.stream.flush()
