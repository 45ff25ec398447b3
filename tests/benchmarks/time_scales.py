"""What scales by sampler step gain: SQNR of each step with 1, 2, 4, 8 and T groups, at several widths.

    python tests/benchmarks/time_scales.py DENOISER.onnx [--steps 20] [--widths int8/int8 int6/int6 int4/int8]

Judged on trajectories of another seed than the one that calibrated. Every layer that the target has kernels for is
quantized (no floor), so that scales are all that differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

import onnxq
from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion.comparison import sample
from onnxq.diffusion.source import open_sampler
from onnxq.runtime import Session

JUDGED_SEED = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=320, help="calibration inputs")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--widths", nargs="+", default=["int8/int8", "int6/int6", "int4/int8"])
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 2, 4, 8, 0], help="0: one for each step")
    parser.add_argument("--lowering", default="rescale")
    parser.add_argument("--observer", default="mse")
    arguments = parser.parse_args()
    loaded = models.load(arguments.model)
    sampler, _ = open_sampler(loaded, arguments.model, make_settings({"steps": arguments.steps}))
    sampler = dataclasses.replace(sampler, seed=JUDGED_SEED)
    exact = Session(arguments.model)
    print("| widths | groups | error of activations | mean of steps dB | worst step dB | image dB |")
    print("|---|---|---|---|---|---|")
    for widths in arguments.widths:
        weights, activations = widths.split("/")
        for groups in arguments.groups:
            result = onnxq.quantize(
                arguments.model,
                recipe="apq-dm",
                weights=weights,
                activations=activations,
                steps=arguments.steps,
                samples=arguments.samples,
                knobs={
                    "groups": groups or arguments.steps,
                    "lowering": arguments.lowering,
                    "observer": arguments.observer,
                    "step_floor_db": 0.0,
                },
            )
            with tempfile.TemporaryDirectory() as folder:
                path = result.save(Path(folder) / "model.onnx")
                session = Session(path, optimize=False)
            numbers = sample({"float": (sampler, exact), "quantized": (sampler, session)}, arguments.images, 0).numbers
            steps = [value for value in numbers["trajectory_sqnr_db"] if value is not None]
            print(
                f"| {widths} | {groups or 'T'} | {result.numbers['time_scales']['error']:.4f} | {np.mean(steps):.2f} "
                f"| {min(steps):.2f} | {numbers['same_seed_image_sqnr_db']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
