"""Accuracy against seconds of the recipes that learn, beside nearest rounding, on real classifiers.

    python tests/benchmarks/learned_quantization.py --data ../shared/data --models resnet20_cifar10 \
        --formats int4/int8,int4/int4 --recipes nearest,adaround,brecq,qdrop --iterations 200,1000 --out learned.json

`lsq` and `lsq-network` (distillation end to end) take the same number as their steps; `gptq` and `gptq-paper` (which
does not look at the float network) have none. The last table is accuracy
against seconds, quickest first; a row that costs more than one before it and gives no more is marked with a dash.

Every recipe learns from the same calibration images and is judged on images that none has seen. `nearest` is the
recipe int8 with the same ranges (least error for weights and activations) and without bias correction.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

import onnxq

NEAREST = {"weight_ranges": "mse", "observer": "mse", "bias_correction": False}


# Names that stand for a recipe with knobs of its own, and the knob that the number of iterations goes to.
RECIPES = {
    "nearest": ("int8", NEAREST),
    "gptq": ("gptq", {"samples": 256}),
    "gptq-paper": ("gptq", {"samples": 256, "asymmetry": 0.0}),
    "lsq": ("lsq", {}),
    "lsq-network": ("lsq", {"distil": "network"}),
}
WITHOUT_ITERATIONS = ("nearest", "gptq", "gptq-paper")


def knobs_of(recipe: str, iterations: int) -> tuple[str, dict[str, Any]]:
    """The recipe of that name, and its knobs."""
    name, knobs = RECIPES.get(recipe, (recipe, {}))
    if recipe in WITHOUT_ITERATIONS:
        return name, knobs
    return name, knobs | {"steps" if name == "lsq" else "iterations": iterations}


def against_seconds(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of accuracy against seconds for each model and formats."""
    lines = []
    for model, formats in dict.fromkeys((row["model"], row["formats"]) for row in rows):
        lines.append(f"\n{model} {formats}: seconds, top-1 %, SQNR dB")
        best = -1.0
        chosen = [row for row in rows if (row["model"], row["formats"]) == (model, formats)]
        for row in sorted(chosen, key=lambda row: float(row["seconds"])):
            mark = " " if row["top1"] > best else "-"
            best = max(best, row["top1"])
            name = f"{row['recipe']} {row['iterations']}"
            lines.append(f"{mark} {name:20}{row['seconds']:7.0f}{100 * row['top1']:8.2f}{row['sqnr_db']:7.1f}")
    return lines


def prepared(data: Path, name: str, part: str, count: int, folder: Path) -> Path:
    """The inputs of a model, written by the script that lies beside the data."""
    path = folder / f"{name}.{part}.npz"
    if not path.is_file():
        command = [sys.executable, str(data / "prepare.py"), name, part, "-n", str(count), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return path


def measure(
    model: Path,
    inputs: Path,
    test: Path,
    recipe: str,
    formats: str,
    iterations: int,
    more_knobs: dict[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    name, knobs = knobs_of(recipe, iterations)
    if recipe != "nearest":
        knobs = knobs | more_knobs
    weights, activations = formats.split("/")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized.onnx"
        result = onnxq.quantize(
            model,
            inputs,
            output=output,
            recipe=name,
            knobs=knobs,
            weights=weights,
            activations=activations,
            **settings,
        )
        compared = onnxq.compare(model, output, test, layers=False, latency=False).to_json()
    return {
        "model": model.stem,
        "recipe": recipe,
        "formats": formats,
        "iterations": iterations,
        "top1_float": compared["top1_float"],
        "top1": compared["top1_quantized"],
        "agreement": compared["agreement"],
        "sqnr_db": compared["sqnr_db"],
        "seconds": result.numbers["seconds"]["total"],
        "peak_rss_mib": result.numbers["peak_rss_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, images/ and prepare.py")
    parser.add_argument("--models", default="resnet20_cifar10,resnet56_cifar10")
    parser.add_argument("--formats", default="int4/int8,int4/int4")
    parser.add_argument("--recipes", default="nearest,adaround,brecq,qdrop")
    parser.add_argument("--iterations", default="200,1000")
    parser.add_argument("--first-last", help="the format of first and last layers, for example int8")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--test-samples", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help="further knobs of recipes")
    parser.add_argument("--prepared", type=Path, help="where prepared inputs are kept between runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.prepared or Path(temporary)
        for name in options.models.split(","):
            model = options.data / "models" / f"{name}.onnx"
            inputs = prepared(options.data, name, "calib", options.samples, folder)
            test = prepared(options.data, name, "test", options.test_samples, folder)
            for formats in options.formats.split(","):
                for recipe in options.recipes.split(","):
                    for iterations in ["0"] if recipe in WITHOUT_ITERATIONS else options.iterations.split(","):
                        row = measure(
                            model,
                            inputs,
                            test,
                            recipe,
                            formats,
                            int(iterations),
                            {key: yaml.safe_load(value) for key, value in (text.split("=", 1) for text in options.set)},
                            first_last=options.first_last,
                            device=options.device,
                            seed=options.seed,
                        )
                        rows.append(row)
                        print(
                            f"{name} {formats} {recipe} {iterations}: {100 * row['top1']:.2f} % of "
                            f"{100 * row['top1_float']:.2f} %, same answer {100 * row['agreement']:.1f} %, "
                            f"{row['sqnr_db']:.1f} dB, {row['seconds']:.0f} s, {row['peak_rss_mib']:.0f} MiB",
                            flush=True,
                        )
                        if options.out:
                            options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("\n".join(against_seconds(rows)))


if __name__ == "__main__":
    main()
