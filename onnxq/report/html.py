"""The HTML report: one file with everything inside, no request to anywhere, readable on a phone."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxq.report import scales, steps, table

if TYPE_CHECKING:
    from jinja2 import Template

LARGEST_BYTES = 2_000_000
MOST_ITEMS = 1600  # layers and tensors shown at first; halved until the page is small enough
LONGEST_NAME = 200
COLUMNS = 120  # of a histogram
PLOT_WIDTH, PLOT_HEIGHT = 1000.0, 200.0  # of the viewBox; the page stretches it
SQNR_CEILING_DB = 60.0  # above it a layer is as good as identical


def render_html(result: Mapping[str, Any]) -> str:
    """The report of ``result`` as one HTML page under 2 MB.

    Args:
        result: The JSON of quantize, merged with a comparison's. Any key may be missing. Beyond what the table
            shows: ``command``, ``versions`` and ``settings`` (dicts), ``layers``, and ``tensors`` (dicts of ``name``,
            ``format``, ``low``, ``high``, ``clip_low``, ``clip_high`` and ``histogram`` with ``edges``, ``counts``),
            SQNR by step (see :func:`onnxq.report.steps.step_plot`),
            ``scales_by_step`` (by the activation's name), ``pictures`` (dicts of ``png`` and ``caption``) and
            ``tables`` (see :mod:`onnxq.report.sections`).

    Returns:
        The page. Every name in it is escaped.
    """
    items = MOST_ITEMS
    while True:
        page = _template().render(_view(result, items))
        if len(page.encode()) < LARGEST_BYTES or items == 0:
            return page
        items //= 2


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    source = resources.files("onnxq.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _view(result: Mapping[str, Any], items: int) -> dict[str, Any]:
    layers = list(result.get("layers") or ())
    tensors = list(result.get("tensors") or ())
    return {
        "title": table.heading(result) or "Quantization report",
        "rows": table.rows(result),
        "details": table.details(result),
        "command": str(result.get("command") or ""),
        "settings": _pairs(result.get("settings")),
        "versions": _pairs(result.get("versions")),
        "warnings": [str(note) for note in result.get("warnings") or ()],
        "other_tools": [(str(name), str(line)) for name, line in result.get("other_tools") or ()],
        "next_steps": [str(note) for note in result.get("next_steps") or ()],
        "steps": steps.step_plot(result),
        "scales": scales.scale_plots(result.get("scales_by_step") or {}, items),
        "pictures": steps.embedded(result.get("pictures") or ()),
        "layers": [_layer(layer) for layer in layers[:items]],
        "bars": sqnr_bars(layers[:items]),
        "layers_left_out": max(0, len(layers) - items),
        "tables": [_table(given, items) for given in result.get("tables") or ()],
        "tensors": [_tensor(tensor) for tensor in tensors[:items]],
        "tensors_left_out": max(0, len(tensors) - items),
    }


def _pairs(mapping: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [(str(key), str(value)) for key, value in (mapping or {}).items()]


def _name(item: Mapping[str, Any], key: str = "name") -> str:
    name = table.printable(item.get(key, ""))
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    ratio = table.number(layer.get("sqnr_db"))
    return {
        "name": _name(layer),
        "op": _name(layer, "op"),
        "value": _name(layer, "value"),
        "sqnr": table.decibels(ratio),
        "order": _finite(ratio, 1e9),
        "low": ratio is not None and ratio < table.LOW_SQNR_DB,
    }


def _table(given: Mapping[str, Any], items: int) -> dict[str, Any]:
    rows = list(given["rows"])
    return {
        "title": given["title"],
        "about": given["about"],
        "columns": given["columns"],
        "rows": [[_cell(value) for value in row] for row in rows[:items]],
        "left_out": max(0, len(rows) - items),
    }


def _cell(value: Any) -> dict[str, Any]:
    """Text as it is; a number as decibels, which sort by their size."""
    ratio = table.number(value) if isinstance(value, int | float) else None
    if ratio is None:
        return {"text": _name({"name": value}), "order": None, "low": False}
    return {"text": table.decibels(ratio), "order": _finite(ratio, 1e9), "low": ratio < table.LOW_SQNR_DB}


def sqnr_bars(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Geometry of the plot of SQNR by layer, in the given order: bars up to 60 dB and the lines behind them."""
    ratios = [_finite(table.number(layer.get("sqnr_db")), SQNR_CEILING_DB) for layer in layers]
    if not ratios:
        return None
    top = min(SQNR_CEILING_DB, max(30.0, 10.0 * math.ceil(max(ratios) / 10.0)))
    step = PLOT_WIDTH / len(ratios)
    bars = []
    for index, (layer, ratio) in enumerate(zip(layers, ratios, strict=True)):
        height = max(1.0, PLOT_HEIGHT * min(max(ratio, 0.0), top) / top)  # a layer worse than 0 dB still shows
        bars.append(
            {
                "x": round(index * step, 2),
                "width": round(step * 0.84, 2),
                "y": round(PLOT_HEIGHT - height, 1),
                "height": round(height, 1),
                "low": ratio < table.LOW_SQNR_DB,
                "title": f"{_name(layer)}: {table.decibels(layer.get('sqnr_db'))}",
            }
        )
    lines = [{"db": db, "percent": round(100.0 - 100.0 * db / top, 2)} for db in range(0, int(top) + 1, 10)]
    return {"bars": bars, "lines": lines, "width": PLOT_WIDTH, "height": PLOT_HEIGHT}


def _tensor(tensor: Mapping[str, Any]) -> dict[str, Any]:
    low, high = (table.number(tensor.get(key)) for key in ("low", "high"))
    clip_low, clip_high = (table.number(tensor.get(key)) for key in ("clip_low", "clip_high"))
    return {
        "name": _name(tensor),
        "format": _name(tensor, "format"),
        "range": _range(low, high),
        "clip": _range(clip_low, clip_high),
        "plot": histogram_plot(tensor.get("histogram") or {}, clip_low, clip_high),
    }


def histogram_plot(
    histogram: Mapping[str, Any], clip_low: float | None, clip_high: float | None
) -> dict[str, Any] | None:
    """Geometry of one histogram: an outline in a 1000 by 200 box, the clip lines, and the share beyond them.

    Counts are drawn on a logarithmic scale: what clipping cuts off are tails that a linear one would hide.
    """
    edges = np.asarray(histogram.get("edges") or (), np.float64)
    counts = np.asarray(histogram.get("counts") or (), np.float64)
    if len(counts) == 0 or len(edges) != len(counts) + 1 or not np.isfinite(edges).all() or counts.sum() <= 0:
        return None
    clips = [clip for clip in (clip_low, clip_high) if clip is not None and math.isfinite(clip)]
    left, right = min([float(edges[0]), *clips]), max([float(edges[-1]), *clips])
    if right <= left:
        return None
    below = np.concatenate([[0.0], np.cumsum(counts)])
    columns = np.diff(np.interp(np.linspace(left, right, COLUMNS + 1), edges, below))
    heights = np.log1p(columns) / np.log1p(columns.max())
    path = ["M0 200"]
    for index, height in enumerate(heights):
        path.append(f"V{PLOT_HEIGHT * (1.0 - height):.0f}H{PLOT_WIDTH * (index + 1) / COLUMNS:.0f}")
    inside = np.interp(
        [edges[0] if clip_low is None else clip_low, edges[-1] if clip_high is None else clip_high], edges, below
    )
    clipped = 1.0 - float(inside[1] - inside[0]) / float(below[-1])
    return {
        "path": "".join([*path, "V200Z"]),
        "clips": [round(PLOT_WIDTH * (clip - left) / (right - left), 1) for clip in clips],
        "left": f"{left:.3g}",
        "right": f"{right:.3g}",
        "clipped": _share(clipped),
    }


def _share(fraction: float) -> str:
    if fraction <= 1e-12:
        return "nothing clipped"
    return f"{100.0 * fraction:.2g} % clipped" if fraction >= 1e-6 else "< 0.0001 % clipped"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4g} … {high:.4g}"


def _finite(value: float | None, ceiling: float) -> float:
    """A number that plots and sorts: nothing and identical lie at the top, -inf and NaN at the bottom."""
    if value is None:
        return ceiling
    return -ceiling if math.isnan(value) else min(max(value, -ceiling), ceiling)
