"""The closing table of a quantization: what it is now, against what it was, and what that gains.

One list of rows serves both a terminal (a rich table) and a pipe (aligned plain lines).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

LAYERS_SHOWN = 5
LOW_SQNR_DB = 20.0  # below it a value's error is a tenth of the value


@dataclass(frozen=True)
class Row:
    """One line of the table; ``tone`` is ``good``, ``bad`` or nothing."""

    what: str
    original: str = ""
    quantized: str = ""
    gain: str = ""
    tone: str = ""


def rows(result: Mapping[str, Any]) -> list[Row]:
    """The lines of the table: only what ``result`` (the JSON of quantize and compare) has."""
    return list(_rows(result))


def _rows(result: Mapping[str, Any]) -> Iterator[Row]:
    before, after = result.get("float_bytes"), result.get("quantized_bytes")
    if after:
        ratio = before / after if before else None
        yield Row("size", size_text(before), size_text(after), _times(ratio), _better(ratio))
    before, after = result.get("latency_ms_float"), result.get("latency_ms_quantized")
    if after:
        ratio = before / after if before else None
        yield Row("latency", time_text(before, "ms"), time_text(after, "ms"), _times(ratio), _better(ratio))
    for key, what in (("top1", "top-1"), ("top5", "top-5")):
        before, after = result.get(f"{key}_float"), result.get(f"{key}_quantized")
        if after is not None:
            points = None if before is None else 100.0 * (after - before)
            gain = "" if points is None else f"{points:+.2f} points"
            yield Row(what, percent(before), percent(after), gain, _tone(points, bad=-1.0, good=-0.1))
    before, after = number(result.get("perplexity_float")), number(result.get("perplexity_quantized"))
    if after is not None:
        change = None if not before else 100.0 * (after / before - 1.0)
        gain = "" if change is None else f"{change:+.1f} %"
        yield Row("perplexity", plain(before), plain(after), gain, _tone(change and -change, bad=-5.0, good=-1.0))
    if result.get("agreement") is not None:
        agreement = result["agreement"]
        yield Row("same answer", "", percent(agreement), "", _tone(agreement, bad=0.95, good=0.99))
    if result.get("sqnr_db") is not None:
        yield Row(
            "SQNR", "", decibels(result["sqnr_db"]), "", _tone(number(result["sqnr_db"]), bad=LOW_SQNR_DB, good=30)
        )
    if result.get("outputs"):
        found = [(number(ratio), name) for name, ratio in result["outputs"].items()]
        compared = [pair for pair in found if pair[0] is not None]
        if compared:
            ratio, name = min(compared)
            tone = _tone(ratio, bad=LOW_SQNR_DB, good=30)
            yield Row("worst output", "", f"{decibels(ratio)} ({printable(name)}, of {len(found)})", "", tone)
    for what in ("step", "timestep"):
        ratios = [(number(ratio) or 0.0, float(at)) for at, ratio in (result.get(f"{what}_sqnr_db") or {}).items()]
        if ratios:
            ratio, at = min(ratios)
            tone = _tone(ratio, bad=LOW_SQNR_DB, good=30)
            yield Row(f"worst {what}", "", f"{decibels(ratio)} ({what} {at:g})", "", tone)
    if result.get("groups"):
        ratio, file = min((number(group["sqnr_db"]) or 0.0, group["file"]) for group in result["groups"])
        tone = _tone(ratio, bad=LOW_SQNR_DB, good=30)
        yield Row("worst graph", "", f"{decibels(ratio)} ({printable(file)}, of {len(result['groups'])})", "", tone)
    if result.get("quantized_nodes") is not None:
        of = f" of {result['weighted_nodes']}" if result.get("weighted_nodes") is not None else ""
        yield Row("quantized layers", "", f"{result['quantized_nodes']}{of}")
    if result.get("integer_kernels") is not None:
        total = sum((result.get("optimized_nodes") or {}).values())
        yield Row("integer kernels", "", f"{result['integer_kernels']}" + (f" of {total} nodes" if total else ""))


def details(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of what and how that have no float counterpart: recipe, formats, cost."""
    pairs = []
    recipe = ", ".join(str(result[key]) for key in ("recipe", "target") if result.get(key))
    if recipe:
        pairs.append(("recipe", recipe))
    formats = [f"{key} {result[key]}" for key in ("weights", "activations") if result.get(key)]
    if result.get("embeddings"):
        formats.append(f"embeddings {result['embeddings']} per {'row' if result['embeddings'] == 'int8' else 'block'}")
    if result.get("first_last"):
        formats.append(f"first and last layers {result['first_last']}")
    if formats:
        pairs.append(("formats", ", ".join(formats)))
    if result.get("mean_weight_bits"):
        pairs.append(("bits", f"{result['mean_weight_bits']:.2f} a weight on average"))
    if result.get("speedup"):
        pairs.append(("speedup", f"{result['speedup']:.2f}× with one thread, {result['speedup_wanted']:g}× wanted"))
    if result.get("samples"):
        origin = result.get("samples_from")
        pairs.append(("samples", f"{result['samples']}{f', {origin}' if origin else ''}"))
    return pairs + _cost(result)


def _cost(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Wall time, the same in runs of the float model, its parts, and peak memory."""
    pairs = []
    seconds = result.get("seconds") or {}
    total, inference = seconds.get("total"), result.get("float_inference_seconds")
    if total is not None:
        text = time_text(total, "s")
        if inference:
            text += f", {total / inference:.1f}× the float run of the same samples"
        pairs.append(("time", text))
    steps = [f"{key} {time_text(value, 's')}" for key, value in seconds.items() if key != "total" and value]
    if steps:
        pairs.append(("steps", ", ".join(steps)))
    if result.get("peak_rss_mib"):
        pairs.append(("memory", f"{result['peak_rss_mib']:,.0f} MiB at peak"))
    return pairs


def closing_table(result: Mapping[str, Any]) -> RenderableType:
    """The table for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"good": "green", "bad": "red", "": ""}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("")
    for column in ("float", "quantized", "gain"):
        table.add_column(column, justify="right")
    for row in rows(result):
        style = styles[row.tone]
        emphasis = "bold" if row.gain else f"bold {style}"  # without a gain, the value itself says good or bad
        table.add_row(Text(row.what), Text(row.original, "dim"), Text(row.quantized, emphasis), Text(row.gain, style))
    parts: list[RenderableType] = [Text(heading(result), "bold")] if heading(result) else []
    if rows(result):
        parts += [Text(""), table]
    if details(result):
        facts = Table.grid(padding=(0, 2))
        for what, how in details(result):
            facts.add_row(Text(what, "dim"), Text(how))
        parts += [Text(""), facts]
    layers = worst_layers(result)
    if layers:
        worst = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        worst.add_column("worst layers", overflow="fold")
        worst.add_column("op")
        worst.add_column("SQNR", justify="right", no_wrap=True)
        for name, op, ratio, tone in layers:
            worst.add_row(Text(name), Text(op, "dim"), Text(ratio, styles[tone]))
        parts += [Text(""), worst]
    for label, key, style in (("warning", "warnings", "yellow"), ("try next", "next_steps", "cyan")):
        notes = Table.grid(padding=(0, 2))
        for note in result.get(key) or ():
            notes.add_row(Text(label, style), Text(printable(note)))
        if notes.row_count:
            parts += [Text(""), notes]
    return Group(*parts)


def plain_lines(result: Mapping[str, Any]) -> list[str]:
    """The same for a pipe or a log: no colour, no box, one fact a line."""
    lines = [heading(result)] if heading(result) else []
    for row in rows(result):
        before = f"{row.original} -> " if row.original else ""
        lines.append(f"{row.what}: {before}{row.quantized}" + (f" ({row.gain})" if row.gain else ""))
    lines += [f"{what}: {how}" for what, how in details(result)]
    lines += [f"worst layer: {name} ({op}) {ratio}" for name, op, ratio, _ in worst_layers(result)]
    lines += [f"warning: {printable(note)}" for note in result.get("warnings") or ()]
    lines += [f"try next: {printable(note)}" for note in result.get("next_steps") or ()]
    return lines


def worst_layers(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, op, SQNR and tone of the first (worst) few layers."""
    return [
        (
            printable(layer.get("name", "")),
            printable(layer.get("op", "")),
            decibels(layer.get("sqnr_db")),
            _tone(number(layer.get("sqnr_db")), bad=LOW_SQNR_DB, good=1e9),
        )
        for layer in (result.get("layers") or ())[:LAYERS_SHOWN]
    ]


def heading(result: Mapping[str, Any]) -> str:
    """The file names, from the model to its quantized version."""
    return " → ".join(printable(PurePath(str(result[key])).name) for key in ("model", "output") if result.get(key))


def printable(value: object) -> str:
    """Text without control characters: names come from the model, and a terminal would obey them."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def number(value: object) -> float | None:
    """A number of the JSON, where infinity is the string ``inf``; ``None`` stays."""
    return float(value) if isinstance(value, int | float | str) else None


def decibels(value: object) -> str:
    """Decibels with one decimal; an infinite ratio means identical."""
    ratio = number(value)
    if ratio is None:
        return ""
    if ratio in (float("inf"), float("-inf")):
        return "identical" if ratio > 0 else "-∞ dB"
    return f"{ratio:.1f} dB"


def percent(value: float | None) -> str:
    """A fraction as per cent."""
    return "" if value is None else f"{100.0 * value:.2f} %"


def plain(value: float | None) -> str:
    """A number with three or more digits."""
    return "" if value is None else f"{value:,.2f}"


def size_text(size_bytes: float | None) -> str:
    """Decimal units, as file managers show them."""
    if not size_bytes:
        return ""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def time_text(value: float | None, unit: str) -> str:
    """Three significant digits."""
    if value is None:
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def _times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.1f}×" if ratio >= 1.0 else f"{ratio:.2f}×"


def _better(ratio: float | None) -> str:
    return "" if ratio is None else "good" if ratio > 1.05 else "bad" if ratio < 0.95 else ""


def _tone(value: float | None, *, bad: float, good: float) -> str:
    if value is None:
        return ""
    return "good" if value >= good else "bad" if value < bad else ""
