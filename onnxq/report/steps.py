"""Plots over the steps of a denoiser's sampler, and pictures of what it makes."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxq.report import table

WIDTH, HEIGHT = 1000.0, 200.0  # of the viewBox; the page stretches it
CEILING_DB = 80.0  # above it two predictions are as good as identical
SERIES = (
    ("trajectory_sqnr_db", "prediction on the float model's trajectory"),
    ("step_sqnr_db", "prediction on recorded inputs"),
    ("same_seed_sqnr_db", "sample that both arrive at from the same noise"),
)


def step_plot(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Geometry of one line for each series of SQNR by step that the result has.

    Args:
        result: ``step_sqnr_db`` of quantize and compare (by step), ``trajectory_sqnr_db`` and ``same_seed_sqnr_db`` of
            sample (lists in the order of sampling); any may be missing. Where all are, ``timestep_sqnr_db`` of compare
            takes their place: timesteps stand in falling order.

    Returns:
        Lines (``points`` of an SVG polyline, name, lowest value), the grid behind them, what is drawn from left to
        right (``axis``); ``None`` where there is nothing to draw.
    """
    series = [(name, points) for key, name in SERIES if (points := _points(result.get(key)))]
    unit, labels = "step", None
    if not series:
        by_time = result.get("timestep_sqnr_db") or {}
        times = sorted(by_time, key=float, reverse=True)
        points = _points([by_time[time] for time in times])
        if not points:
            return None
        unit, labels, series = "timestep", [f"{float(time):g}" for time in times], [("prediction", points)]
    ratios = [ratio for _, points in series for _, ratio in points]
    steps = [step for _, points in series for step, _ in points]
    bottom = min(0.0, 10.0 * math.floor(min(ratios) / 10.0))
    top = max(30.0, 10.0 * math.ceil(max(ratios) / 10.0))
    last = max(1, max(steps))
    lines = []
    for number, (name, points) in enumerate(series):
        worst = min(points, key=lambda point: (point[1], point[0]))
        drawn = [
            (round(WIDTH * step / last, 1), round(HEIGHT * (top - ratio) / (top - bottom), 1)) for step, ratio in points
        ]
        lines.append(
            {
                "name": name,
                "number": number,
                "points": " ".join(f"{x:g},{y:g}" for x, y in drawn),
                "dots": [
                    {"x": x, "y": y, "title": f"{unit} {labels[step] if labels else step}: {_shown(ratio)}"}
                    for (x, y), (step, ratio) in zip(drawn, points, strict=True)
                ],
                "worst": f"{_shown(worst[1])} at worst ({unit} {labels[worst[0]] if labels else worst[0]})",
            }
        )
    grid = [
        {"db": db, "percent": round(100.0 * (top - db) / (top - bottom), 2)}
        for db in range(int(bottom), int(top) + 1, 10)
    ]
    axis = f"timesteps {labels[0]} to {labels[-1]}" if labels else f"steps 0 to {last}"
    return {"lines": lines, "grid": grid, "width": WIDTH, "height": HEIGHT, "axis": f"{axis}, left to right"}


def _shown(ratio: float) -> str:
    return table.decibels(ratio) if ratio < CEILING_DB else f"{CEILING_DB:.0f} dB or more"


def _points(found: Any) -> list[tuple[int, float]]:
    """Steps and finite ratios, in order; what was identical lies at the ceiling."""
    if isinstance(found, Mapping):
        pairs: Sequence[tuple[Any, Any]] = sorted((int(step), ratio) for step, ratio in found.items())
    elif isinstance(found, Sequence) and not isinstance(found, str):
        pairs = list(enumerate(found))
    else:
        return []
    points = []
    for step, ratio in pairs:
        value = table.number(ratio)
        if value is not None and not math.isnan(value):
            points.append((int(step), max(-CEILING_DB, min(value, CEILING_DB))))
    return points


def embedded(pictures: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Pictures (``png``: bytes, ``caption``) as data that stands in the page itself."""
    return [
        {
            "source": f"data:image/png;base64,{base64.b64encode(item['png']).decode('ascii')}",
            "caption": table.printable(item.get("caption", "")),
        }
        for item in pictures
    ]
