"""The layers that cost most when they alone are quantized, found without judging every one."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from onnxq.sensitivity import ErrorPower, Probe
from onnxq.switchboard import Layer

Cost = Callable[[ErrorPower], float]

PARTS = 2  # into which a group is cut


def in_worst_step(power: ErrorPower) -> float:
    """The error of the worst step beside its signal, in dB."""
    return -power.worst_db


class Ranking:
    """Layers in the order of the error that each makes alone, found as far as they are asked for.

    Groups of neighbouring layers are judged together. Errors of layers add up, so that none of a group makes more than
    the whole; the group that makes most is cut in halves until it is one layer. The first few of n layers take about
    2 log2(n) runs each, where judging all takes n.

    Args:
        probe: What to measure with.
        layers: The layers, in the order of the graph.
        cost: Of an error, by which layers are ordered; by default that of the worst step, in dB.
    """

    def __init__(self, probe: Probe, layers: Sequence[Layer], cost: Cost = in_worst_step) -> None:
        self._probe, self._board, self._cost = probe, probe.board(layers), cost
        self._found: list[str] = []
        names = [layer.name for layer in layers]
        self._groups: list[tuple[float, int, list[str]]] = [(float("-inf"), 0, names)] if names else []
        self.judged = 0  # sets of layers

    def first(self, count: int) -> list[str]:
        """The names of so many layers, the most sensitive first."""
        while len(self._found) < count and self._groups:
            _, start, names = heapq.heappop(self._groups)
            if len(names) == 1:
                self._found += names
                continue
            size = -(-len(names) // PARTS)
            halves = [(at, names[at : at + size]) for at in range(0, len(names), size)]
            powers = self._probe.errors(self._board, [half for _, half in halves])
            self.judged += len(halves)
            for (at, half), power in zip(halves, powers, strict=True):
                heapq.heappush(self._groups, (-self._cost(power), start + at, half))
        return self._found[:count]
