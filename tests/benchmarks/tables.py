"""Markdown tables of a results file; `tables.py FILE.json` prints them again."""

from __future__ import annotations

import sys
from pathlib import Path

from results import Results

INTEGER = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "DynamicQuantize", "MatMulNBits", "QConv")
FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
COLUMNS = ["tool", "top-1", "agreement", "SQNR dB (literal)", "latency ratio", "ms", "integer / float kernels"]
COLUMNS += ["KB", "TensorRT", "quantize s", "peak MiB"]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def plain(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def kernel_counts(kernels: dict[str, int]) -> str:
    """Integer kernels of any kind, and matrix products and convolutions that are still float."""
    integer = sum(count for name, count in kernels.items() if name.startswith(INTEGER))
    return f"{integer} / {sum(kernels.get(name, 0) for name in FLOAT)}"


def row(name: str, entry: dict) -> str:
    """One tool's line; a failure takes the place of the numbers."""
    cost, quality = entry.get("quantize", {}), entry.get("accuracy", {})
    latency, engine = entry.get("latency", {}), entry.get("engine", {})
    failures = [part["error"] for part in (cost, quality, latency) if "error" in part]
    if failures:
        return f"| {name} | {failures[0][:90].replace('|', '/')} |" + " |" * 9
    accepted = {True: "yes", False: "no", None: "–"}[engine.get("accepted")]
    accepted = "misread" if engine.get("misread") else accepted
    cells = [
        percent(quality.get("top1")),
        percent(quality.get("agreement")),
        f"{plain(quality.get('sqnr_db'), 1)} ({plain(quality.get('sqnr_literal_db'), 1)})",
        plain(latency.get("ratio")),
        plain(latency.get("milliseconds"), 3),
        kernel_counts(latency.get("kernels", {})),
        plain(quality.get("bytes", 0) / 1000, 0),
        accepted,
        plain(cost.get("wall_seconds"), 1),
        plain(cost.get("peak_mib"), 0),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def model_table(model: str, content: dict) -> str:
    """Float first, then every tool in the order of measuring."""
    reference = content["float"]
    title = f"### {model}: float top-1 {percent(reference.get('top1'))} % of {reference.get('images', '–')}"
    latency = reference.get("latency", {})
    size = plain(reference.get("bytes", 0) / 1000, 0)
    float_row = f"| float | {percent(reference.get('top1'))} | | | 1.00 | {plain(latency.get('milliseconds'), 3)} | "
    float_row += f"{kernel_counts(latency.get('kernels', {}))} | {size} | | | |"
    rows = [row(name, entry) for name, entry in content["tools"].items()]
    return "\n".join(
        [title, "", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), float_row, *rows, ""]
    )


def cost_table(model: str, content: dict) -> str:
    """Wall time over that of the bare float inference of the same samples, and peak memory, for each sample count."""
    counts = sorted(content, key=int)
    names = list(dict.fromkeys(name for count in counts for name in content[count]))
    lines = [f"### Cost of quantizing {model}: times bare float inference (seconds, peak MiB)", ""]
    lines += ["| tool | " + " | ".join(counts) + " |", "|" + " --- |" * (len(counts) + 1)]
    for name in names:
        cells = []
        for count in counts:
            entry = content[count].get(name)
            if not entry or "error" in entry:
                cells.append(entry["error"][:60].replace("|", "/") if entry else "–")
                continue
            cells.append(f"{entry['ratio']:.1f}× ({entry['wall_seconds']:.1f}, {entry['peak_mib']:.0f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def report(results: Results) -> str:
    """All tables of a results file."""
    parts = [model_table(model, content) for model, content in results.content["models"].items()]
    parts += [cost_table(model, content) for model, content in results.content["cost"].items()]
    return "\n".join(parts)


if __name__ == "__main__":
    print(report(Results(Path(sys.argv[1]))))
