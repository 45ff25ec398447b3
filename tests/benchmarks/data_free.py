"""What quantization without data loses, on real classifiers: inputs of every method beside real images.

    python tests/benchmarks/data_free.py --models ../shared/data/models --data FOLDER \
        [--only resnet20_cifar10 …] [--methods noise zeroq …] [--seeds 0 1 2] [--rows 1000] [--budget default] \
        [--widths int4/int4] [--rule minmax] [--targets tensorrt cpu] [--learned]

FOLDER holds NAME.calib.npz and NAME.test.npz with labels, as ``prepare.py`` of the shared data writes them. Made inputs
never see either; top-1, SQNR and the share of inputs with the float network's answer are those of the test rows. A seed
draws other made inputs, and takes other real ones. Without ``--learned``: static ranges, by the rule that ``quantize``
takes for such inputs or by ``--rule``; ``--rule minmax --widths int4/int4`` is the papers' minimum. With it: W4A8 and
W4A4 by the recipe ``genie`` with 8-bit ends, on its own images and on as many real ones. ``--methods given`` takes
what another tool has made (see ``peers/make_inputs_mct.py``).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import onnxq
from onnxq import model as models
from onnxq.calibration import observers
from onnxq.calibration.data import RANGE_RULE_KEY, input_specs
from onnxq.calibration.noise import Noise
from onnxq.inputs import default_count
from onnxq.recipes.genie import Genie
from onnxq.synthesis.synthesize import synthesise

CLASSIFIERS = (
    "resnet20_cifar10", "resnet56_cifar10", "mlperf_tiny_resnet8_c10", "mlperf_tiny_kws_dscnn",
    "mobilenet_v1_025_224", "efficientnet_lite0", "r20vit_hybrid_cifar10",
)  # fmt: skip
METHODS = ("real", "noise", "zeroq", "dsg", "genie", "pixels")
HEADER = (
    f"{'model':26} {'widths':13} {'target':8} {'inputs':10} {'seed':>4} {'float':>7} {'top-1':>7} {'agree':>7} "
    f"{'SQNR dB':>8} {'made s':>7} {'all s':>7}"
)


def main() -> None:
    """Print one line for each model, width and source of inputs as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=CLASSIFIERS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--given", type=Path, help="of the method `given`: a folder with NAME.npz")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0,))
    parser.add_argument("--rows", type=int, default=1000, help="test rows")
    parser.add_argument("--samples", type=int, default=0, help="inputs to calibrate on; 0: the default of quantize")
    parser.add_argument("--budget", default="default")
    parser.add_argument("--widths", nargs="*", help="WEIGHTS/ACTIVATIONS; `target`: the target's own")
    parser.add_argument("--rule", help="how a range follows from what was seen; the default suits the inputs")
    parser.add_argument("--iterations", type=int, default=0, help="of --learned, for each block")
    parser.add_argument("--targets", nargs="*", default=("tensorrt",))
    parser.add_argument("--learned", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(HEADER, flush=True)
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(name, arguments, Path(folder)):
                print(line, flush=True)


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The lines of one model."""
    model, output = arguments.models / f"{name}.onnx", folder / "quantized.onnx"
    with np.load(arguments.data / f"{name}.test.npz") as archive:
        np.savez(folder / "test.npz", **{key: archive[key][: arguments.rows] for key in archive.files})
    count = arguments.samples or (Genie.images if arguments.learned else default_count(input_specs(models.load(model))))
    widths = arguments.widths or (("int4/int8", "int4/int4") if arguments.learned else ("target/target",))
    for method, seed in itertools.product(arguments.methods, arguments.seeds):
        started = time.perf_counter()
        data, rule = inputs(method, seed, count, model, arguments, folder)
        made = time.perf_counter() - started
        for width, target in itertools.product(widths, arguments.targets):
            weights, activations = (None if part == "target" else part for part in width.split("/"))
            options: dict[str, Any] = {"knobs": {"observer": arguments.rule or rule}}
            if arguments.learned:
                knobs = {"observer": arguments.rule or "mse", "iterations": arguments.iterations}
                options = {"recipe": "genie", "first_last": "int8", "knobs": knobs}
            options |= {"weights": weights, "activations": activations, "target": target, "seed": seed}
            options |= {"device": arguments.device}
            onnxq.quantize(model, data, output=output, budget=arguments.budget, **options)
            found = onnxq.compare(model, output, folder / "test.npz", latency=False, layers=False)
            yield (
                f"{name:26} {width:13} {target:8} {method:10} {seed:4} "
                f"{100 * found.top1_float:7.2f} {100 * found.top1_quantized:7.2f} {100 * found.agreement:7.2f} "
                f"{found.sqnr_db:8.2f} {made:7.0f} {time.perf_counter() - started:7.0f}"
            )


def inputs(
    method: str, seed: int, count: int, model: Path, arguments: argparse.Namespace, folder: Path
) -> tuple[Path, str]:
    """A file of inputs to calibrate on, and the range rule that suits them."""
    path, rule, loaded = folder / f"{method}.npz", observers.DEFAULT, models.load(model)
    specs = input_specs(loaded)
    if method == "real":
        with np.load(arguments.data / f"{model.stem}.calib.npz") as archive:
            rows = archive[specs[0].name]
        made = {specs[0].name: np.roll(rows, -seed * count, axis=0)[:count]}
    elif method == "given":
        with np.load(arguments.given / f"{model.stem}.npz") as archive:
            made = {name: archive[name][:count] for name in archive.files}
    elif method == "noise":
        noise = list(Noise(specs, count=count, seed=seed))
        made = {specs[0].name: np.stack([sample[specs[0].name] for sample in noise]), RANGE_RULE_KEY: np.array(rule)}
    else:
        found = synthesise(loaded, method, count=count, budget=arguments.budget, seed=seed, device=arguments.device)
        made, rule = {found.name: found.inputs, RANGE_RULE_KEY: np.array(found.observer)}, found.observer
    np.savez(path, **made)  # type: ignore[arg-type]
    return path, rule


if __name__ == "__main__":
    main()
