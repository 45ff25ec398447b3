"""Which grid for weights of 3 and 4 bits? Residuals, power grids and clips on real classifiers.

    python tests/benchmarks/weight_grids.py --data ../shared/data --prepared inputs \
        --models resnet20_cifar10,squeezenet_v1_1 --formats int4,int3

`--prepared` holds NAME.calib.npz and NAME.test.npz, keyed by input name, with labels. Only `adaround` sees the
calibration inputs: the others need the weights alone, but for the means that biases are corrected with, which come
from inputs made from the model itself; NAME.made.npz, as `onnxq synthesize` writes it, saves making them for each row.
Activations stay float, so that nothing else is compared, unless `--activations` and `--target` say otherwise.
Bits are those of the codes for each weight; scales and tables come on top.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxq

PLAIN = {"bias_correction": False}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform, extremes": ("int8", PLAIN),
    "uniform, least error": ("int8", {**PLAIN, "weight_ranges": "mse"}),
    "powerquant, as published": ("powerquant", {"nearest": False}),
    "powerquant, nearest": ("powerquant", {}),
    "powerquant, per tensor": ("powerquant", {"scope": "tensor"}),
    "pnmq, L4": ("pnmq", {"equalize": False}),
    "pnmq, L2": ("pnmq", {"equalize": False, "norm": 2.0}),
    "powerquant, biases left alone": ("powerquant", PLAIN),
    "pnmq, biases left alone": ("pnmq", {"equalize": False, **PLAIN}),
    "rex, half a second order": ("rex", {"density": 0.5, "depthwise_orders": 0}),
    "rex, two orders": ("rex", {"depthwise_orders": 0}),
    "rex, two, depthwise three": ("rex", {}),
    "rex, orders from the extremes": ("rex", {"clip": False}),
    "rex, biases left alone": ("rex", PLAIN),
    "rex, by the outputs": ("rex", {"allocation": "outputs"}),
    "int8": ("int8", {}),
    "rex, three orders": ("rex", {"orders": 3, "depthwise_orders": 0}),
    "adaround": ("adaround", {}),
}


def measure(
    model: Path, prepared: Path, name: str, weights: str, activations: str, target: str, samples: int
) -> dict[str, Any]:
    recipe, knobs = ROWS[name]
    made = prepared / f"{model.stem}.made.npz"
    inputs = prepared / f"{model.stem}.calib.npz" if recipe == "adaround" else made if made.exists() else None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized.onnx"
        result = onnxq.quantize(
            model,
            inputs,
            output=output,
            recipe=recipe,
            target=target,
            weights="int8" if name == "int8" else weights,
            activations=activations,
            budget="quick",
            knobs=knobs,
        )
        test = prepared / f"{model.stem}.test.npz"
        found = onnxq.compare(model, output, test, layers=False, latency=False, layer_samples=0, samples=samples)
    return {
        "model": model.stem,
        "grid": name,
        "weights": weights,
        "activations": activations,
        "target": target,
        "agreement": found.agreement,
        "top1_float": found.top1_float,
        "top1": found.top1_quantized,
        "sqnr_db": found.sqnr_db,
        "bytes": result.numbers["quantized_bytes"],
        "seconds": result.numbers["seconds"]["total"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/")
    parser.add_argument("--prepared", type=Path, required=True, help="folder with NAME.calib.npz and NAME.test.npz")
    parser.add_argument("--models", default="resnet20_cifar10,resnet56_cifar10,squeezenet_v1_1,mobilenet_v1_025_224")
    parser.add_argument("--formats", default="int4,int3")
    parser.add_argument("--grids", default=";".join(ROWS), help="rows of the table, separated by semicolons")
    parser.add_argument("--activations", default="float", help="format of activations: float, int8, uint8, …")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--samples", type=int, default=2500)
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    rows = []
    for name in options.models.split(","):
        for weights in options.formats.split(","):
            for grid in options.grids.split(";"):
                row = measure(
                    options.data / "models" / f"{name}.onnx",
                    options.prepared,
                    grid,
                    weights,
                    options.activations,
                    options.target,
                    options.samples,
                )
                rows.append(row)
                sys.stdout.write(
                    f"{name:24} {weights:5} {grid:30} top-1 {100 * row['top1']:6.2f} of {100 * row['top1_float']:.2f}  "
                    f"same {100 * row['agreement']:5.1f} %  SQNR {row['sqnr_db']:6.1f} dB  "
                    f"{row['bytes'] / 1e6:6.2f} MB  {row['seconds']:6.1f} s\n"
                )
                sys.stdout.flush()
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
