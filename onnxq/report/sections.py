"""Tables of a report: what each layer costs alone, what an engine runs each node in, how the loss of made inputs fell.

A table is a dict of ``title``, ``about``, ``columns`` and ``rows``; numbers in its rows are decibels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.analysis import Analysis
    from onnxq.engines import EngineBuild


def sensitivity_tables(found: Analysis) -> list[dict[str, Any]]:
    """Layers with the SQNR of the output where each alone is quantized, and the curve of leaving the worst in float."""
    formats = list(dict.fromkeys(name for layer in found.layers for name in layer.narrow_db))
    has_steps = any(layer.worst_step is not None for layer in found.layers)
    names = [f"weight in {name}" for name in formats]
    # What the table is for comes first: a phone shows the first columns without scrolling.
    columns = ["layer", "op", "alone", *names, *(["worst step"] if has_steps else []), "weight", "input range"]
    rows = []
    for layer in found.layers:
        shape = "×".join(map(str, layer.weight_shape))
        step = [str(layer.worst_step)] if has_steps else []
        ratios = [layer.narrow_db.get(name, "") for name in formats]
        rows.append([layer.name, layer.op, layer.sqnr_db, *ratios, *step, shape, f"{layer.low:.3g} … {layer.high:.3g}"])
    tables: list[dict[str, Any]] = [
        {
            "title": "Sensitivity",
            "about": f"SQNR of the output with one layer alone quantized for {found.target}, the most sensitive first.",
            "columns": columns,
            "rows": rows,
        },
        {
            "title": "Leaving the most sensitive in float",
            "about": "SQNR of the output with so many of them in float and all others quantized.",
            "columns": ["in float", "the last of them", "SQNR"],
            "rows": [
                [str(count), found.layers[count - 1].name if count else "", ratio]
                for count, ratio in enumerate(found.cumulative)
            ],
        },
    ]
    for target, reasons in found.left_float.items():
        if reasons:
            tables.append(
                {
                    "title": f"Left in float for {target}",
                    "about": "Layers that get no Q/DQ, and why.",
                    "columns": ["layer", "reason"],
                    "rows": [[name, reason] for name, reason in reasons.items()],
                }
            )
    return tables


def engine_table(built: EngineBuild) -> dict[str, Any]:
    """Which precision the compiled engine runs each product in, by the layers that the runtime lists."""
    kinds = {
        "low precision": built.low_precision_nodes,
        "weights only": built.weight_only_nodes,
        "float": built.float_nodes,
    }
    promised = set(built.promised_but_float)
    rows = [
        [name, f"{kind}, though Q/DQ ask for less" if name in promised else kind]
        for kind, nodes in kinds.items()
        for name in nodes
    ]
    return {
        "title": f"Products in {built.engine_path.name}",
        "about": f"What {built.runtime} {built.runtime_version} runs every Conv, Gemm and MatMul in.",
        "columns": ["node", "runs in"],
        "rows": rows,
    }


def groups_table(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How good each graph of a denoiser is that has one for each group of steps."""
    return {
        "title": "Graphs",
        "about": "Of each group of sampler steps: SQNR of its graph's prediction on the samples that it serves.",
        "columns": ["graph", "SQNR", "samples"],
        "rows": [[group["file"], group["sqnr_db"], str(group["samples"])] for group in groups],
    }


def loss_table(losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How the loss fell while each batch of inputs was made."""
    return {
        "title": "Loss",
        "about": "Of each batch of inputs, at its first step, half-way and at its last.",
        "columns": ["batch", "steps", "first", "half-way", "last"],
        "rows": [
            [str(number), str(len(batch)), *(f"{batch[at]:.4g}" for at in (0, len(batch) // 2, -1))]
            for number, batch in enumerate(losses)
            if batch
        ],
    }
