"""How the scales of activations follow the sampler's steps, one small plot for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnxq.report import table

WIDTH, HEIGHT = 1000.0, 200.0  # of the viewBox; the page stretches it


def scale_plots(tables: Mapping[str, Sequence[float]], items: int) -> list[dict[str, str]]:
    """Geometry of one staircase for each activation, those that move most first.

    Scales are drawn on a logarithmic axis from the smallest of the activation's own to the largest: groups of steps
    are apart by factors.

    Args:
        tables: Scales by step, by the activation's name.
        items: How many plots, at most.

    Returns:
        ``name``, ``points`` of an SVG polyline, ``range`` and ``ratio`` as text.
    """
    moving = {name: scales for name, scales in tables.items() if scales and min(scales) > 0}
    order = sorted(moving, key=lambda name: (-max(moving[name]) / min(moving[name]), name))
    return [_plot(name, moving[name]) for name in order[:items]]


def _plot(name: str, scales: Sequence[float]) -> dict[str, str]:
    low, high = min(scales), max(scales)
    span = math.log(high / low) or 1.0
    points = []
    for step, scale in enumerate(scales):
        height = HEIGHT * (1 - math.log(scale / low) / span)
        points += [f"{WIDTH * at / len(scales):g},{height:.1f}" for at in (step, step + 1)]
    return {
        "name": table.printable(name),
        "points": " ".join(points),
        "range": f"{low:.3g} … {high:.3g}",
        "ratio": f"{high / low:.1f}×",
    }
