"""Which sampler steps make the error of the images: each step alone quantized, and the first so many.

    python tests/benchmarks/step_influence.py FLOAT.onnx QUANTIZED.onnx [--steps 20] [--samples 32] [--guidance 1]

All runs start from the same noise. The error is squared, over the power of the float images. Where the errors of single
steps add up to less than that of all steps, steps err in the same direction.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion.denoiser import Runnable
from onnxq.diffusion.source import open_sampler
from onnxq.runtime import Feed, Session

Array = np.ndarray[Any, Any]


class Switched:
    """The quantized network in some steps, the float one in the others; a sampler asks once for each step."""

    def __init__(self, exact: Runnable, quantized: Runnable, is_quantized: Callable[[int], bool]) -> None:
        self.exact, self.quantized, self.is_quantized, self.step = exact, quantized, is_quantized, 0

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        """Run one batch."""
        chosen = self.quantized if self.is_quantized(self.step) else self.exact
        self.step += 1
        return chosen.run(feed, outputs)


def main() -> None:
    """Print the error of each choice of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--scheduler", default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    settings = {key: getattr(arguments, key) for key in ("steps", "guidance", "scheduler")} | {"seed": 1000}
    model, exact = models.load(arguments.float), Session(arguments.float)
    literal = models.get_metadata(models.read(arguments.quantized)).get("target", "cpu") != "cpu"
    quantized = Session(arguments.quantized, optimize=not literal)

    def images(is_quantized: Callable[[int], bool]) -> Array:
        found = []
        sampler, _ = open_sampler(model, arguments.float, make_settings(settings))
        for start in range(0, arguments.samples, sampler.batch):
            own, _ = open_sampler(model, arguments.float, make_settings(settings))
            numbers = range(start, min(arguments.samples, start + sampler.batch))
            run = own.run(Switched(exact, quantized, is_quantized), numbers)
            for _ in run:
                pass
            found.append(run.sample)
        return np.concatenate(found)

    reference = images(lambda step: False)

    def error(is_quantized: Callable[[int], bool]) -> float:
        return float(np.sum((images(is_quantized) - reference) ** 2) / np.sum(reference**2))

    alone = [error(lambda step, only=only: step == only) for only in range(arguments.steps)]
    print(f"all steps: {error(lambda step: True):.2e}; sum of single ones: {sum(alone):.2e}")
    print(f"{'step':>4} {'alone':>9} {'up to it':>9}")
    for last, single in enumerate(alone):
        print(f"{last:4d} {single:9.1e} {error(lambda step, last=last: step <= last):9.1e}", flush=True)


if __name__ == "__main__":
    main()
