"""Accuracy against seconds of the recipes that learn, beside nearest rounding, on real classifiers.

    python tests/benchmarks/learned_quantization.py --data ../shared/data --models resnet20_cifar10 \
        --formats int4/int8,int4/int4 --recipes nearest,adaround,brecq,qdrop --iterations 200,1000 --out learned.json

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

import onnxq

NEAREST = {"weight_ranges": "mse", "observer": "mse", "bias_correction": False}


def prepared(data: Path, name: str, part: str, count: int, folder: Path) -> Path:
    """The inputs of a model, written by the script that lies beside the data."""
    path = folder / f"{name}.{part}.npz"
    if not path.is_file():
        command = [sys.executable, str(data / "prepare.py"), name, part, "-n", str(count), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return path


def measure(model: Path, inputs: Path, test: Path, recipe: str, formats: str, knobs: dict[str, Any]) -> dict[str, Any]:
    weights, activations = formats.split("/")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized.onnx"
        result = onnxq.quantize(
            model,
            inputs,
            output=output,
            recipe="int8" if recipe == "nearest" else recipe,
            knobs=knobs,
            weights=weights,
            activations=activations,
        )
        compared = onnxq.compare(model, output, test, layers=False, latency=False).to_json()
    return {
        "model": model.stem,
        "recipe": recipe,
        "formats": formats,
        "iterations": knobs.get("iterations", 0),
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
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--test-samples", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
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
                    for iterations in ["0"] if recipe == "nearest" else options.iterations.split(","):
                        knobs = NEAREST if recipe == "nearest" else {"iterations": int(iterations)}
                        row = measure(model, inputs, test, recipe, formats, knobs)
                        rows.append(row)
                        print(
                            f"{name} {formats} {recipe} {iterations}: {100 * row['top1']:.2f} % of "
                            f"{100 * row['top1_float']:.2f} %, same answer {100 * row['agreement']:.1f} %, "
                            f"{row['sqnr_db']:.1f} dB, {row['seconds']:.0f} s, {row['peak_rss_mib']:.0f} MiB",
                            flush=True,
                        )
                        if options.out:
                            options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
