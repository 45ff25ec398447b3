"""What scales by sampler step cost in onnxruntime: time of the kernels, with one scale and with groups of steps.

    python tests/benchmarks/rescale_cost.py DENOISER.onnx [--target tensorrt cpu] [--groups 8] [--gains 2 0]

Every node counts with the fastest of its runs, from onnxruntime's own profile with one thread: a sum that other
programs on the machine hardly move, where the time of whole runs is theirs too. `gain` is apq-dm's least_gain_db; with
0 every activation that can follow the steps does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import onnxq

RUNS = 40
BATCH = 4


def main() -> None:
    """Print a line for each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--target", nargs="+", default=["tensorrt", "cpu"])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--gains", nargs="+", type=float, default=[2.0, 0.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    print(f"{'target':10} {'groups':>6} {'gain':>5} {'values':>7} {'moving':>7} {'kernels µs':>11} {'ratio':>6}  by op")
    for target in arguments.target:
        first: Counter[str] = Counter()
        for groups, gain in [(1, 0.0), *((arguments.groups, gain) for gain in arguments.gains)]:
            knobs = {"groups": groups, "least_gain_db": gain, "step_floor_db": 0.0, "trajectories": 8, "kept_steps": 8}
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "quantized.onnx"
                common: dict[str, Any] = {"steps": arguments.steps, "samples": arguments.samples}
                made = onnxq.quantize(
                    arguments.model, recipe="apq-dm", output=output, target=target, knobs=knobs, **common
                )
                spent = kernel_times(output, Path(folder))
            first = first or spent
            changed = {op: spent[op] - first[op] for op in {*spent, *first}}
            largest = sorted(changed, key=lambda op: -abs(changed[op]))[:4]
            scales, ratio = made.numbers["time_scales"], spent.total() / first.total()
            print(
                f"{target:10} {groups:6d} {gain:5g} {scales['values']:7d} {scales['moving']:7d} {spent.total():11.0f} "
                f"{ratio:6.3f}  {', '.join(f'{op} {changed[op]:+.0f}' for op in largest)}",
                flush=True,
            )


def kernel_times(path: Path, folder: Path) -> Counter[str]:
    """Microseconds by op: each node's fastest run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = 1, True, 3
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {item.name: _value(item) for item in session.get_inputs()}
    for _ in range(RUNS):
        session.run(None, feed)
    fastest: dict[str, float] = {}
    op_of: dict[str, str] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"]
            op_of[name] = event["args"]["op_name"]
            fastest[name] = min(fastest.get(name, float("inf")), event["dur"])
    found: Counter[str] = Counter()
    for name, microseconds in fastest.items():
        found[op_of[name]] += microseconds
    return found


def _value(item: Any) -> np.ndarray[Any, Any]:
    shape = [size if isinstance(size, int) else BATCH for size in item.shape]
    dtype = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}[item.type]
    return np.random.default_rng(0).standard_normal(shape).astype(dtype) if len(shape) > 1 else np.ones(shape, dtype)


if __name__ == "__main__":
    main()
