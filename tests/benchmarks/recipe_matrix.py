"""Every recipe on every model: what comes out, or the error that a user would see.

    python tests/benchmarks/recipe_matrix.py --data ../shared/data --out matrix.json

Learning is cut to a few steps, so this is no measure of quality: a cell is the SQNR in dB, `-` with a reason where a
recipe refuses the model in two lines, and CRASH or HANG where something is wrong. Each cell takes one core, `--workers`
of them at once. Started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import model as models
from onnxq import recipes, targets
from onnxq.calibration.data import input_specs

# The fewest steps with which a recipe that learns still does all it does.
FEW_STEPS = {
    "iterations": 2, "steps": 2, "rounds": 1, "samples": 16, "images": 8, "class_images": 8, "hard_images": 8,
    "batch": 4, "groups": 2,
}  # fmt: skip

FREE_SIZE = 320  # of an axis that the export left free, as the width of a line of text


def knobs_of(recipe: str) -> list[str]:
    """Options that make a recipe quick, of those it has."""
    known = recipes.get(recipe).load().__dataclass_fields__  # type: ignore[attr-defined]
    chosen = {name: value for name, value in FEW_STEPS.items() if name in known}
    return [text for name, value in chosen.items() for text in ("--set", f"{name}={value}")]


def run(model: Path, recipe: str, target: str, seconds: float) -> dict[str, Any]:
    """Quantize as a user would, and say what happened."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "numbers.json"
        command = [
            sys.executable, "-m", "onnxq.cli", "quantize", str(model), "-o", f"{folder}/out.onnx", "--target", target,
            "--recipe", recipe, "-n", "8", "--steps", "4", "--budget", "quick", "-q", "--json", str(numbers),
            *knobs_of(recipe),
        ]  # fmt: skip
        if "unet" not in model.stem and "dit" not in model.stem:
            command += ["--synthesis", "noise"]
        specs = input_specs(models.read(model))
        if len(specs) == 1 and specs[0].dtype.kind == "f" and None in specs[0].row_shape:
            sizes = [size or FREE_SIZE for size in specs[0].row_shape]
            rows = np.random.default_rng(0).normal(size=(8, *sizes)).astype(specs[0].dtype)
            np.savez(f"{folder}/rows.npz", **{specs[0].name: rows})
            command += ["--data", f"{folder}/rows.npz"]
        before = time.monotonic()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        except subprocess.TimeoutExpired:
            return {"state": "HANG", "seconds": seconds}
        result: dict[str, Any] = {"seconds": round(time.monotonic() - before, 1)}
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode == 0:
            result |= {"state": "done", "sqnr_db": json.loads(numbers.read_text())["sqnr_db"]}
        elif "Traceback" in done.stderr or not errors:
            result |= {"state": "CRASH", "reason": done.stderr[-2000:]}
        else:
            result |= {"state": "refused", "reason": errors[0]}
        return result


def cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if entry["state"] == "done":
        return "lossless" if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.1f}"
    return "-" if entry["state"] == "refused" else str(entry["state"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("matrix.json"))
    parser.add_argument("--recipes", nargs="*", default=list(recipes.RECIPES))
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--limit", type=float, default=240, help="seconds for each")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cells at once")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    paths = [
        path
        for folder in ("models", "denoisers", "language")
        for path in sorted((arguments.data / folder).glob("*.onnx"))
    ]
    paths = [path for path in paths if "without_weights" not in path.name and "features" not in path.name]
    wanted = {
        f"{model.stem} {recipe} {target}": (model, recipe, target)
        for model in paths
        if not arguments.models or model.stem in arguments.models
        for recipe in arguments.recipes
        for target in targets.names()
    }
    with ThreadPoolExecutor(arguments.workers) as pool:
        missing = {
            pool.submit(run, *choice, arguments.limit): key for key, choice in wanted.items() if key not in results
        }
        for done in as_completed(missing):
            key = missing[done]
            results[key] = done.result()
            arguments.out.write_text(json.dumps(results, indent=1))
            if results[key]["state"] in ("CRASH", "HANG"):
                print(f"{key}: {results[key]['state']} {results[key].get('reason', '')[-300:]}", flush=True)
    width = max(len(path.stem) for path in paths) + 1
    for target in targets.names():
        print(f"\n{target:{width}}" + "".join(f"{name[:9]:>10}" for name in arguments.recipes))
        for model in paths:
            cells = (cell(results.get(f"{model.stem} {name} {target}")) for name in arguments.recipes)
            print(f"{model.stem:{width}}" + "".join(f"{text:>10}" for text in cells))
    reasons = {entry["reason"]: key for key, entry in results.items() if entry["state"] == "refused"}
    print("\nrefused, one example of each reason:")
    for reason, key in reasons.items():
        print(f"  {key}: {reason}")


if __name__ == "__main__":
    main()
