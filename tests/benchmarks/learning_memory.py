"""Peak memory of block reconstruction against the number of samples: flat once the cache is full.

    python tests/benchmarks/learning_memory.py --model ../shared/data/models/resnet20_cifar10.onnx \
        --data calibration.npz --samples 64,256,1024 --cache-mib 16

Each count runs in a process of its own; fewer rows than asked for are repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RUN = """
import json, sys, torch, onnxq
torch.set_num_threads(1)
model, data, recipe, cache = sys.argv[1:]
knobs = {"iterations": 5, "samples": 1 << 30, "cache_mib": int(cache)}
numbers = onnxq.quantize(model, data, recipe=recipe, weights="int4", knobs=knobs).numbers
print(json.dumps({"peak_rss_mib": numbers["peak_rss_mib"], "seconds": numbers["seconds"]["total"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", default="brecq")
    parser.add_argument("--samples", default="64,256,1024")
    parser.add_argument("--cache-mib", default="16")
    options = parser.parse_args()
    with np.load(options.data) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "labels"}
    print(f"{'samples':>8}{'peak MiB':>10}{'seconds':>9}")
    for count in map(int, options.samples.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.npz"
            np.savez(path, **{name: np.resize(array, (count, *array.shape[1:])) for name, array in arrays.items()})
            command = [sys.executable, "-c", RUN, str(options.model), str(path), options.recipe, options.cache_mib]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(f"{count:8d}{found['peak_rss_mib']:10.0f}{found['seconds']:9.0f}", flush=True)


if __name__ == "__main__":
    main()
