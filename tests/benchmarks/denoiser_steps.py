"""What a denoiser loses in each sampler step, and which part of the quantization loses it.

    python tests/benchmarks/denoiser_steps.py FOLDER [NAME …] [--target tensorrt cpu] [--samples 16] [--steps 20]
    python tests/benchmarks/denoiser_steps.py FOLDER --steps 50 --variants "no floor for steps" default

FOLDER holds NAME.onnx with NAME.scheduler.json (or a schedule in the metadata); without a NAME all of its denoisers are
judged. Every variant is calibrated on the model's own trajectories and judged on others: SQNR of the prediction in each
step of the float trajectory, from the same inputs. The table shows the first, the median, the worst and the last step,
how many layers are on codes, and the seconds that quantizing took, those for the floor of the steps apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import onnxq
from onnxq import kinds
from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion import comparison
from onnxq.diffusion.source import open_sampler
from onnxq.runtime import Session

FLOORLESS: dict[str, Any] = {"step_floor_db": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "diffusion": {"recipe": "diffusion", "budget": "quick"},
    "no floor for steps": {"knobs": FLOORLESS},
    "weights alone": {"activations": "float", "knobs": FLOORLESS},
    "activations alone": {"weights": "float", "activations": "8 bits", "knobs": FLOORLESS},
    "first, last in float": {"first_last": "float", "knobs": FLOORLESS},
    "widest ranges": {"knobs": FLOORLESS | {"observer": "minmax"}},
    "noise as data": {"knobs": FLOORLESS, "noise": True},
}


def main() -> None:
    """Print one table for each model and target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--target", nargs="+", default=["tensorrt", "cpu"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    arguments = parser.parse_args()
    names = arguments.names or [path.stem for path in sorted(arguments.folder.glob("*.onnx")) if is_denoiser(path)]
    for name in names:
        for target in arguments.target:
            print(f"\n{name}, {target}: SQNR in dB")
            columns = f"{'variant':22} {'first':>6} {'median':>6} {'worst':>6} {'at':>4} {'last':>6}"
            print(f"{columns}  {'layers':10} {'seconds':>7} {'floor':>6}")
            for variant in arguments.variants:
                judge(arguments, name, target, variant)


def is_denoiser(path: Path) -> bool:
    """Whether a file is a denoiser that can be run."""
    opened = models.read(path)
    known = all(value.const_value is not None for value in opened.graph.initializers.values())
    return known and kinds.kind_of(opened) == kinds.Kind.DENOISER


def judge(arguments: argparse.Namespace, name: str, target: str, variant: str) -> None:
    """Quantize and print one line."""
    path = arguments.folder / f"{name}.onnx"
    scheduler = arguments.folder / f"{name}.scheduler.json"
    common: dict[str, Any] = {"steps": arguments.steps, "guidance": arguments.guidance}
    if scheduler.is_file():
        common["scheduler"] = str(scheduler)
    options = {key: value for key, value in VARIANTS[variant].items() if key != "noise"}
    if options.get("activations") == "8 bits":
        options["activations"] = {"tensorrt": "int8", "cpu": "uint8"}[target]
    sampler, _ = open_sampler(models.load(path), path, make_settings(common | {"seed": 1000}))
    data = None
    if VARIANTS[variant].get("noise"):
        first = next(iter(sampler.run(Session(path), range(arguments.samples))))
        data = [first.feed]  # the noisiest step alone
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized.onnx"
        numbers = onnxq.quantize(
            path, data, output=output, target=target, samples=arguments.calibration, **common, **options
        ).numbers
        samplers = {
            "float": (sampler, Session(path)),
            "quantized": (sampler, Session(output, optimize=target == "cpu")),
        }
        found = comparison.sample(samplers, arguments.samples, 0).numbers["trajectory_sqnr_db"]
    worst = min(range(len(found)), key=lambda step: float(found[step]))
    layers = f"{numbers['quantized_nodes']} of {numbers['weighted_nodes']}"
    print(
        f"{variant:22} {found[0]:6.1f} {statistics.median(found):6.1f} {found[worst]:6.1f} {worst:4d} "
        f"{found[-1]:6.1f}  {layers:10} {numbers['seconds']['total']:7.1f} {numbers['seconds'].get('steps', 0.0):6.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
