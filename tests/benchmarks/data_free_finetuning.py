"""Fine-tuning without data, recipe by recipe, beside its start and beside reconstruction on made and real inputs.

    python tests/benchmarks/data_free_finetuning.py --model ../shared/data/models/resnet20_cifar10.onnx \
        --test resnet20_cifar10.test.npz [--real resnet20_cifar10.calib.npz] [--bits 4 3] [--steps 200] [--recipes …]

``--test`` holds inputs and ``labels``; no recipe sees it. ``nearest`` is where all of them start: ranges of least error
from made inputs. ``genie`` and ``qdrop`` learn block by block, on made and on real inputs. ``--papers-start`` starts
from extremes, as the papers do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import onnxq
from onnxq.calibration.data import input_specs
from onnxq.model import load
from onnxq.runtime import Session

RECIPES = ("nearest", "zaq", "gdfq", "adadfq", "hast", "texq", "genie", "qdrop")
LEARN_BLOCKS = ("genie", "qdrop")


def main() -> None:
    """Print one line for each width and recipe as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=(4, 3))
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--budget", default="default")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0,))
    parser.add_argument("--rows", type=int, default=2500)
    parser.add_argument("--papers-start", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=(), help="further knobs of all recipes that fine-tune")
    arguments = parser.parse_args()
    with np.load(arguments.test) as archive:
        test = {name: archive[name][: arguments.rows] for name in archive.files}
    print(f"{arguments.model.stem}: float {top1(arguments.model, test):.2f} %")
    print(f"{'bits':6} {'recipe':8} {'seed':>4} {'top-1':>7} {'seconds':>8}", flush=True)
    for bits in arguments.bits:
        for recipe in arguments.recipes:
            for seed in arguments.seeds:
                started = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "quantized.onnx"
                    quantize(recipe, bits, seed, arguments, path)
                    found = top1(path, test)
                seconds = time.perf_counter() - started
                print(f"W{bits}A{bits}   {recipe:8} {seed:4} {found:7.2f} {seconds:8.0f}", flush=True)


def quantize(recipe: str, bits: int, seed: int, arguments: argparse.Namespace, path: Path) -> None:
    """Quantize weights and activations to so many bits."""
    from onnxq.config import parse_assignments

    knobs: dict[str, Any] = {"observer": "mse", "weight_ranges": "mse"}
    if arguments.papers_start and recipe not in LEARN_BLOCKS:
        knobs = {"observer": "minmax", "weight_ranges": "minmax"}
    if recipe in LEARN_BLOCKS:
        knobs["iterations"] = arguments.steps
    elif recipe != "nearest":
        knobs |= {"steps": arguments.steps, **parse_assignments(list(arguments.set))}
    onnxq.quantize(
        arguments.model,
        arguments.real if recipe == "qdrop" else None,
        output=path,
        recipe="int8" if recipe == "nearest" else recipe,
        weights=f"int{bits}",
        activations=f"int{bits}",
        budget=arguments.budget,
        seed=seed,
        knobs=knobs,
        device=arguments.device,
    )


def top1(path: Path, test: dict[str, np.ndarray]) -> float:
    """Top-1 accuracy in percent."""
    spec = input_specs(load(path))[0]
    session, batch, right = Session(path), spec.batch or 50, 0
    rows = len(test["labels"]) // batch * batch
    output = session.own_output_names[0]
    for start in range(0, rows, batch):
        logits = session.run({spec.name: test[spec.name][start : start + batch]}, [output])[0]
        right += int((logits.argmax(-1) == test["labels"][start : start + batch]).sum())
    return 100 * right / rows


if __name__ == "__main__":
    main()
