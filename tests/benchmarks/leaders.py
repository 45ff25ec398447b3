"""leaders.py FILE.json [OURS]: per model the best figure of any peer, who has it, and ours beside it.

OURS is a pattern for the rows that are ours (default `onnxq:*`); they do not count as peers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from results import Results


@dataclass(frozen=True)
class Figure:
    """One thing to be best at: where it stands in a tool's results, which way is better, and among whom."""

    title: str
    family: str
    key: str
    best: Callable
    digits: int = 1
    scale: float = 1
    engines_only: bool = False

    def of(self, entry: dict) -> float | None:
        """The figure of one tool, or nothing where it has none or may not compete."""
        failed = any("error" in entry.get(family, {}) for family in ("quantize", "accuracy", "latency"))
        engine = entry.get("engine", {})
        if failed or (self.engines_only and (not engine.get("accepted") or engine.get("misread"))):
            return None
        value = entry.get(self.family, {}).get(self.key)
        return None if value is None else value * self.scale


FIGURES = [
    Figure("SQNR dB, TensorRT takes it", "accuracy", "sqnr_db", max, engines_only=True),
    Figure("SQNR dB, any", "accuracy", "sqnr_db", max),
    Figure("top-1 %, TensorRT takes it", "accuracy", "top1", max, digits=2, scale=100, engines_only=True),
    Figure("agreement %, TensorRT takes it", "accuracy", "agreement", max, digits=2, scale=100, engines_only=True),
    Figure("latency ratio", "latency", "ratio", min, digits=2),
    Figure("quantize s", "quantize", "wall_seconds", min),
    Figure("quantize s, TensorRT takes it", "quantize", "wall_seconds", min, engines_only=True),
    Figure("peak MiB", "quantize", "peak_mib", min, digits=0),
    Figure("peak MiB, TensorRT takes it", "quantize", "peak_mib", min, digits=0, engines_only=True),
]


def leader(figure: Figure, tools: dict[str, dict]) -> str:
    """The best value and its holder."""
    values = {name: value for name, entry in tools.items() if (value := figure.of(entry)) is not None}
    if not values:
        return "–"
    name = figure.best(values, key=values.__getitem__)
    return f"{values[name]:.{figure.digits}f} {name}"


def table(results: Results, ours: str) -> str:
    """One line per model and figure: the best peer, then the best of ours."""
    lines = ["| model | figure | best peer | ours |", "| --- | --- | --- | --- |"]
    for model, content in results.content["models"].items():
        mine = {name: entry for name, entry in content["tools"].items() if fnmatch(name, ours)}
        peers = {name: entry for name, entry in content["tools"].items() if name not in mine}
        label = f"{model} (float {100 * content['float'].get('top1', float('nan')):.2f} %)"
        for figure in FIGURES:
            lines.append(f"| {label} | {figure.title} | {leader(figure, peers)} | {leader(figure, mine)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Results(Path(sys.argv[1])), sys.argv[2] if len(sys.argv) > 2 else "onnxq:*"))
