"""How the cost of quantizing grows with samples, parameters, timesteps and workers, as a table and a plot.

    python tests/benchmarks/cost_growth.py --out growth.svg [--only samples parameters timesteps workers]

Every point is `onnxq quantize` in a process of its own. The slope is that of log(seconds) over log(size) between the
last two points, where start-up matters least: 1 is linear. Memory is the peak of the resident set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent.parent / "models"
SAMPLES, CHANNELS, STEPS, WORKERS = (16, 64, 256, 1024, 4096), (64, 128, 256, 512), (5, 10, 20, 40), (1, 2)
SIDE, LAYERS, SHARED_SAMPLES = 32, 8, 2048


@dataclass
class Point:
    """One run.

    Attributes:
        size: How much of what grows.
        seconds: From the start of the command to its end.
        calibration: Of these, what making inputs and recording them took.
        mib: Peak of the resident set; of the workers too where there are some, it is the first process alone.
    """

    size: float
    seconds: float
    calibration: float
    mib: float


def quantize(model: Path, *options: str) -> dict[str, float]:
    """Seconds and memory of one command."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "numbers.json"
        command = [sys.executable, "-m", "onnxq", "quantize", str(model), "-o", f"{folder}/out.onnx", "-q", "--json"]
        subprocess.run([*command, str(numbers), *options], check=True, timeout=1800)
        found = json.loads(numbers.read_text())
    seconds = found["seconds"]
    made = sum(seconds.get(stage, 0.0) for stage in ("trajectories", "synthesise", "calibrate"))
    return {"seconds": seconds["total"], "calibration": made, "mib": found["peak_rss_mib"]}


def network(path: Path, channels: int) -> int:
    """Write a plain convolutional network; how many parameters it has."""
    generator = np.random.default_rng(0)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["N", 3, SIDE, SIDE])
    value, width, nodes, weights = x, 3, [], []
    for index in range(LAYERS):
        array = generator.standard_normal((channels, width, 3, 3)).astype(np.float32) * (2 / (9 * width)) ** 0.5
        name = f"w{index}"
        weight = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.FLOAT))
        weights.append(weight)
        strides = [2, 2] if index in (1, 3) else [1, 1]
        conv = ir.node("Conv", [value, weight], {"pads": [1, 1, 1, 1], "strides": strides}, name=f"conv{index}")
        relu = ir.node("Relu", conv.outputs, name=f"relu{index}")
        nodes += [conv, relu]
        value, width = relu.outputs[0], channels
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", channels, SIDE // 4, SIDE // 4])
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="plain")
    ir.save(ir.Model(graph, ir_version=8), path)
    return sum(int(np.prod(weight.const_value.shape)) for weight in weights if weight.const_value is not None)


def images(path: Path, count: int) -> Path:
    """Write normal samples, none of them kept in memory twice."""
    np.savez(path, x=np.random.default_rng(1).standard_normal((count, 3, SIDE, SIDE), np.float32))
    return path


def samples(folder: Path) -> Iterator[Point]:
    """The same network on more and more samples."""
    network(folder / "plain.onnx", 32)
    for count in SAMPLES:
        data = images(folder / "data.npz", count)
        yield Point(count, **quantize(folder / "plain.onnx", "--data", str(data)))


def parameters(folder: Path) -> Iterator[Point]:
    """Wider and wider networks on the same samples, few enough for weights to matter."""
    data = images(folder / "data.npz", 16)
    for channels in CHANNELS:
        count = network(folder / "plain.onnx", channels)
        yield Point(count / 1e6, **quantize(folder / "plain.onnx", "--data", str(data)))


def timesteps(folder: Path) -> Iterator[Point]:
    """A denoiser that samples its own inputs in more and more steps."""
    for steps in STEPS:
        yield Point(steps, **quantize(MODELS / "fashion_unet_guided.onnx", "--steps", str(steps), "-n", "64"))


def workers(folder: Path) -> Iterator[Point]:
    """The same work among more and more processes."""
    network(folder / "plain.onnx", 64)
    data = images(folder / "data.npz", SHARED_SAMPLES)
    for count in WORKERS:
        yield Point(count, **quantize(folder / "plain.onnx", "--data", str(data), "--workers", str(count)))


STUDIES: dict[str, tuple[str, Callable[[Path], Iterator[Point]]]] = {
    "samples": ("samples", samples),
    "parameters": ("million parameters", parameters),
    "timesteps": ("timesteps", timesteps),
    "workers": ("workers", workers),
}


def slope(points: list[Point], of: str) -> float:
    """Exponent of the growth between the last two points."""
    first, last = points[-2:]
    return float(np.log(getattr(last, of) / getattr(first, of)) / np.log(last.size / first.size))


def plot(found: dict[str, list[Point]]) -> str:
    """Seconds, and memory in grey, over each size, as SVG with logarithmic axes."""
    width, height, margin = 320, 220, 46
    parts = []
    for number, (name, points) in enumerate(found.items()):
        left = number * width
        sizes = np.log([point.size for point in points])
        across = left + margin + (sizes - sizes[0]) / max(np.ptp(sizes), 1e-9) * (width - 2 * margin)
        for values, colour, unit in (
            ([point.seconds for point in points], "#0b6", "s"),
            ([point.mib for point in points], "#888", "MiB"),
        ):
            top = np.log(max(values) / (min(values) / 4))  # both ends have room, and a flat line is flat
            down = height - margin - np.log(np.asarray(values) / (min(values) / 2)) / top * (height - 2 * margin)
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for a, b, value in zip(across, down, values, strict=True):
                parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>')
                parts.append(f'<text x="{a:.1f}" y="{b - 7:.1f}" fill="{colour}">{value:.3g} {unit}</text>')
        for a, point in zip(across, points, strict=True):
            parts.append(f'<text x="{a:.1f}" y="{height - margin + 16}">{point.size:.3g}</text>')
        parts.append(f'<text x="{left + width / 2}" y="{height - 8}">{STUDIES[name][0]}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(found)}" height="{height}" '
        f'font-family="sans-serif" font-size="10" text-anchor="middle">\n{body}\n</svg>\n'
    )


def main() -> None:
    """Run the studies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="an .svg of the curves")
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    arguments = parser.parse_args()
    found: dict[str, list[Point]] = {}
    for name in arguments.only:
        title, study = STUDIES[name]
        print(f"\n| {title} | seconds | of these for inputs | peak MiB |\n|---|---|---|---|", flush=True)
        found[name] = []
        with tempfile.TemporaryDirectory() as folder:
            for point in study(Path(folder)):
                found[name].append(point)
                numbers = f"{point.seconds:.1f} | {point.calibration:.1f} | {point.mib:.0f}"
                print(f"| {point.size:.4g} | {numbers} |", flush=True)
        first, last = found[name][0], found[name][-1]
        whole, inputs = slope(found[name], "seconds"), slope(found[name], "calibration")
        ends = f"slope at the end {whole:.2f}, of inputs alone {inputs:.2f}"
        print(f"\n{ends}; memory {last.mib / first.mib - 1:+.0%} over the whole range")
        if arguments.out is not None:
            arguments.out.write_text(plot(found), encoding="utf-8")


if __name__ == "__main__":
    main()
