"""What each part of a denoiser's quantization brings, one row each on the same model.

    python tests/benchmarks/diffusion_ablation.py FOLDER [NAME …] [--weights int8 int4] [--rows ROW …] [--beside FILE …]

FOLDER holds NAME.onnx with NAME.scheduler.json (or a schedule in the metadata). Every row is calibrated on the model's
own trajectories of one seed and judged on those of another: SQNR of the prediction in each step of the float trajectory
(worst and mean over the steps, dB), and the error of the images that the same noise ends in (squared, over float's
power, the mean over `--seeds`; and as a ratio to the first row's). Seconds are relative to the first row's. With
several `--quantizing-seeds` a row is the mean over them, and says how far apart they are. `--beside` judges what other
tools have made of the same denoiser, in rows of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import onnxq
from onnxq import model as models
from onnxq import recipes
from onnxq.config import make_settings
from onnxq.diffusion import comparison
from onnxq.diffusion.source import open_sampler
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

PLAIN: dict[str, Any] = {"step_floor_db": 0.0}
LEARNED: dict[str, Any] = {"split": "none"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest rounding": ("int8", PLAIN),
    "float where a step needs it": ("int8", {}),
    "one-sided shifted": ("int8", PLAIN | {"shift": True}),
    "noise correction": ("ptqd", {"base": "int8"}),
    "learned blocks": ("q-diffusion", LEARNED),
    "from GPTQ's codes": ("q-diffusion", LEARNED | {"start": "gptq"}),
    "and biases learned": ("q-diffusion", LEARNED | {"start": "gptq", "bias_rate": 1e-3}),
    "+ all shortcuts split": ("q-diffusion", {"split_gain_db": -100.0}),
    "+ shortcuts that gain": ("q-diffusion", {}),
    "+ all equalized": ("q-diffusion", {"split": "equalize", "split_gain_db": -100.0}),
    "+ noise correction": ("ptqd", {}),
    "time learned apart": ("tfmq-dm", {}),
    "time in tables": ("tfmq-dm", {"maintenance": "cache"}),
    **{f"scales of {groups} groups": ("apq-dm", {"groups": groups}) for groups in (1, 2, 4, 8)},
    "steps drawn skewed": ("ptq4dm", {}),
    "the network trained": ("q-dm", {}),
    "all that pays": ("diffusion", {}),
    "- inputs by influence": ("diffusion", {"selection": "uniform"}),
    "- float where images need it": ("diffusion", {"image_gain_db": 0.0}),
    "- both": ("diffusion", {"selection": "uniform", "image_gain_db": 0.0}),
    "- wide weights": ("diffusion", {"wide_gain_db": 0.0}),
    "- GPTQ's codes": ("diffusion", {"start": "nearest"}),
    "all, biases learned": ("diffusion", {"start": "gptq", "bias_rate": 1e-3}),
    "- weight steps": ("diffusion", {"weight_step_rate": 0.0}),
    "- shift": ("diffusion", {"shift": False}),
    "- tables of time": ("diffusion", {"cache": False}),
    "- noise correction": ("diffusion", {"correct": False}),
}


def main() -> None:
    """Print one table for each model and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"])
    parser.add_argument("--activations", default="int8")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000], help="of the noise that images start from")
    parser.add_argument("--quantizing-seeds", type=int, nargs="+", default=[0], help="of calibration and learning")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="quantized models of other tools")
    parser.add_argument("--inputs", type=int, default=256, help="that every recipe calibrates on and learns from")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    names = arguments.names or sorted(file.name.split(".")[0] for file in arguments.folder.glob("*.scheduler.json"))
    for name in names:
        for weights in arguments.weights:
            print(f"\n{name}, {arguments.target}, weights {weights}, activations {arguments.activations}")
            print(f"{'row':28} {'worst':>6} {'mean':>6} {'image error':>12} {'ratio':>6} {'time':>6}  layers")
            first: dict[str, float] = {}
            for row in arguments.rows:
                judge(arguments, name, weights, row, first)
            for file in arguments.beside:
                literal = models.get_metadata(models.read(file)).get("target", "tensorrt") != "cpu"
                line(file.stem, [images(arguments, name, opened(arguments, file, not literal))], first)


def judge(arguments: argparse.Namespace, name: str, weights: str, row: str, first: dict[str, float]) -> None:
    """Quantize and print one line."""
    recipe, knobs = ROWS[row]
    if recipe not in recipes.RECIPES:
        print(f"{row:28} there is no recipe {recipe}")
        return
    if arguments.iterations and recipe in ("q-diffusion", "tfmq-dm", "diffusion"):
        knobs = knobs | {"iterations": arguments.iterations}
    options: dict[str, Any] = {"weights": weights, "activations": arguments.activations, "target": arguments.target}
    options |= {"samples": arguments.inputs, "device": arguments.device}
    found: list[Judged] = []
    layers, seconds = set(), []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized.onnx"
        for seed in arguments.quantizing_seeds:
            try:
                made = onnxq.quantize(
                    arguments.folder / f"{name}.onnx", output=output, recipe=recipe, knobs=knobs, seed=seed,
                    budget=arguments.budget, **options, **schedule(arguments, name),
                )  # fmt: skip
            except OnnxqError as error:
                print(f"{row:28} {error}")
                return
            found.append(images(arguments, name, opened(arguments, output, arguments.target == "cpu")))
            layers.add(f"{made.numbers['quantized_nodes']} of {made.numbers['weighted_nodes']}")
            seconds.append(made.numbers["seconds"]["total"])
    first.setdefault("seconds", statistics.mean(seconds))
    line(row, found, first, f"{statistics.mean(seconds) / first['seconds']:6.1f}  {', '.join(sorted(layers))}")


@dataclasses.dataclass(frozen=True)
class Judged:
    """SQNR of each step on the float trajectory, dB, for each noise; error of the images, the mean over noises."""

    steps_db: list[float]
    error: float


def schedule(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Settings of the sampler."""
    scheduler = arguments.folder / f"{name}.scheduler.json"
    settings = {"steps": arguments.steps, "guidance": arguments.guidance}
    return settings | ({"scheduler": str(scheduler)} if scheduler.is_file() else {})


def opened(arguments: argparse.Namespace, path: Path, optimize: bool) -> Session:
    """A quantized model's session; the CPU's kernels are judged on the CPU."""
    return Session(path, optimize=optimize, device="cpu" if optimize else arguments.device)


def images(arguments: argparse.Namespace, name: str, quantized: Session) -> Judged:
    """Judge a quantized denoiser beside the float one."""
    path = arguments.folder / f"{name}.onnx"
    exact, model = Session(path, device=arguments.device), models.load(path)
    steps: list[float] = []
    errors = []
    for seed in arguments.seeds:
        sampler = open_sampler(model, path, make_settings(schedule(arguments, name) | {"seed": seed}))[0]
        pair = {"float": (sampler, exact), "quantized": (sampler, quantized)}
        numbers = comparison.sample(pair, arguments.samples, 0).numbers
        steps += numbers["trajectory_sqnr_db"]
        errors.append(10 ** (-numbers["same_seed_image_sqnr_db"] / 10))
    return Judged(steps, statistics.mean(errors))


def line(row: str, found: list[Judged], first: dict[str, float], rest: str = "") -> None:
    """Print one line."""
    steps = [value for item in found for value in item.steps_db]
    errors = [item.error for item in found]
    error = statistics.mean(errors)
    first.setdefault("error", error)
    spread = f" ({min(errors):.2e} to {max(errors):.2e})" if len(errors) > 1 else ""
    print(
        f"{row:28} {min(steps):6.1f} {statistics.mean(steps):6.1f} {error:12.2e} {error / first['error']:6.2f} "
        f"{rest}{spread}",
        flush=True,
    )


if __name__ == "__main__":
    main()
