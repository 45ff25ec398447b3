"""What quantization without data loses, on real classifiers: inputs of every method beside real images.

    python tests/benchmarks/data_free.py --models ../shared/data/models --data FOLDER \
        [--only resnet20_cifar10 …] [--methods noise zeroq …] [--rows 1000] [--budget default] \
        [--target cpu] [--learned]

FOLDER holds NAME.calib.npz and NAME.test.npz with labels, as ``prepare.py`` of the shared data writes them. Made inputs
never see either; top-1 and SQNR are those of the test rows. Without ``--learned``: static W8A8 ranges. With it: W4A8
and W4A4 by the recipe ``genie`` with 8-bit ends, on its own images and on real ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import onnxq
from onnxq import model as models
from onnxq.calibration import observers
from onnxq.calibration.data import input_specs
from onnxq.inputs import default_count
from onnxq.synthesis.synthesize import synthesise

CLASSIFIERS = (
    "resnet20_cifar10", "resnet56_cifar10", "mlperf_tiny_resnet8_c10", "mlperf_tiny_kws_dscnn",
    "mobilenet_v1_025_224", "efficientnet_lite0", "r20vit_hybrid_cifar10",
)  # fmt: skip
METHODS = ("real", "noise", "zeroq", "dsg", "genie", "pixels")
LEARNED_WIDTHS = (("int4", "int8"), ("int4", "int4"))
HEADER = f"{'model':26} {'widths':10} {'inputs':10} {'float':>7} {'top-1':>7} {'SQNR dB':>8} {'made s':>7}"


def main() -> None:
    """Print one line for each model, width and source of inputs as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=CLASSIFIERS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--rows", type=int, default=1000, help="test rows")
    parser.add_argument("--samples", type=int, default=0, help="inputs to calibrate on; 0: the default of quantize")
    parser.add_argument("--budget", default="default")
    parser.add_argument("--iterations", type=int, default=0, help="of --learned, for each block")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--learned", action="store_true")
    arguments = parser.parse_args()
    print(HEADER, flush=True)
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(name, arguments, Path(folder)):
                print(line, flush=True)


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The lines of one model."""
    model = arguments.models / f"{name}.onnx"
    with np.load(arguments.data / f"{name}.test.npz") as archive:
        np.savez(folder / "test.npz", **{key: archive[key][: arguments.rows] for key in archive.files})
    loaded = models.load(model)
    count = arguments.samples or default_count(input_specs(loaded))
    for method in arguments.methods:
        started, options, rule = time.perf_counter(), dict[str, Any](), observers.DEFAULT
        data: Path | None = folder / f"{method}.npz"
        if method == "real":
            data, options = arguments.data / f"{name}.calib.npz", {"samples": count}
        elif method == "noise":
            data, options = None, {"synthesis": "noise", "samples": count}
        else:
            made = synthesise(loaded, method, count=count, budget=arguments.budget)
            np.savez(folder / f"{method}.npz", **{made.name: made.inputs})
            rule = made.observer  # what quantize takes for such inputs
        seconds = time.perf_counter() - started
        for weights, activations in LEARNED_WIDTHS if arguments.learned else (("int8", "int8"),):
            if arguments.learned:
                knobs = {"observer": "mse", "iterations": arguments.iterations}
                options |= {"recipe": "genie", "first_last": "int8", "knobs": knobs}
            else:
                options["knobs"] = {"observer": rule}
            output = folder / "quantized.onnx"
            options |= {"weights": weights, "activations": activations, "target": arguments.target}
            onnxq.quantize(model, data, output=output, **options)
            found = onnxq.compare(model, output, folder / "test.npz", latency=False, layers=False)
            yield (
                f"{name:26} {weights[3:] + '/' + activations[3:]:10} {method:10} {100 * found.top1_float:7.2f} "
                f"{100 * found.top1_quantized:7.2f} {found.sqnr_db:8.2f} {seconds:7.0f}"
            )


if __name__ == "__main__":
    main()
