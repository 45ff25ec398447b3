"""How far extremes are from the best ranges at few bits, and what that does to the order of data-free methods.

    python tests/benchmarks/extremes.py [--bits 3 4 8] [--seeds 0 1] [--count 32]

On the shipped Fashion-MNIST classifier with ZeroQ's quantizer (weights by channel, outputs of activation functions from
0 to the largest value): top-1 with the extremes of real images times a factor, then with those of made inputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_made_ranges import Classifier, MODELS  # noqa: I001

from onnxq import model as models
from onnxq.synthesis.synthesize import synthesise

FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0)
STEPS = {"zeroq": 150, "dsg": 150, "pixels": 150, "genie": 300}


def main() -> None:
    """Print a line for each factor, then for each method and seed; a column for each width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=(3, 4, 8))
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1))
    parser.add_argument("--count", type=int, default=32, help="inputs that ranges are taken from")
    arguments = parser.parse_args()
    classifier = Classifier(images=1000)
    with np.load(MODELS / "fashion_calibration.npz") as archive:
        real = archive["x"]

    def show(name: str, inputs: np.ndarray, factor: float = 1.0) -> None:
        found = [classifier.top1(inputs, bits, bits, factor) for bits in arguments.bits]
        print(f"{name:16}", *(f"W{bits}A{bits} {top1:5.1f}" for bits, top1 in zip(arguments.bits, found, strict=True)),
              flush=True)  # fmt: skip

    for factor in FACTORS:
        show(f"real x {factor}", real[: arguments.count], factor)
    for seed in arguments.seeds:
        show(f"real {seed}", np.roll(real, -arguments.count * seed, axis=0)[: arguments.count])
        noise = np.random.default_rng(seed).standard_normal((arguments.count, 1, 28, 28))
        show(f"noise {seed}", noise.astype(np.float32))
        for method, steps in STEPS.items():
            loaded = models.load(MODELS / "fashion_resnet.onnx")
            show(f"{method} {seed}", synthesise(loaded, method, count=arguments.count, steps=steps, seed=seed).inputs)


if __name__ == "__main__":
    main()
