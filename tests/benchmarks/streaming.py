"""Memory of weight-only quantization on a model that is larger than it: repeated blocks in external data.

    python tests/benchmarks/streaming.py --folder /scratch --gigabytes 3

Makes the model, quantizes it to int4 blocks in a process of its own, prints the peak, and deletes everything.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

WIDTH = 2048
SPARE = 2.5  # times the model's size that must be free on the disk


def write_model(path: Path, gigabytes: float) -> int:
    """A stack of residual MLP blocks; the weights are written one at a time."""
    blocks = max(1, round(gigabytes * 1e9 / (2 * 4 * WIDTH * WIDTH * 4)))
    generator = np.random.default_rng(0)
    data = path.with_name(f"{path.name}.data")
    x = ir.Value(name="x", shape=ir.Shape(["batch", 4, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    tape = ir.tape.Tape()
    value, initializers, offset = x, [], 0
    with data.open("wb") as stream:

        def weight(name: str, rows: int, columns: int) -> ir.Value:
            nonlocal offset
            array = generator.standard_normal((rows, columns), np.float32) * np.float32(rows**-0.5)
            stream.write(array.tobytes())
            tensor = ir.ExternalTensor(
                data.name, offset, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name,
                base_dir=str(path.parent),
            )  # fmt: skip
            offset += array.nbytes
            found = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
            found.const_value = tensor
            initializers.append(found)
            return found

        for index in range(blocks):
            up = tape.op("MatMul", [value, weight(f"up_{index}", WIDTH, 4 * WIDTH)])
            down = tape.op("MatMul", [tape.op("Relu", [up]), weight(f"down_{index}", 4 * WIDTH, WIDTH)])
            value = tape.op("Add", [value, down])
    value.name, value.type, value.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=initializers, opset_imports={"": 21}, name="stack")
    ir.save(ir.Model(graph, ir_version=10), path)
    return offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where there is room")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--weights", default="int4:128")
    parser.add_argument("--recipe", default="int4-weights")
    options = parser.parse_args()
    needed = options.gigabytes * 1e9 * SPARE
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        sys.exit(f"expected {needed / 1e9:.1f} GB free in {options.folder}, found {free / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = write_model(folder / "stack.onnx", options.gigabytes)
        command = [
            sys.executable, "-m", "onnxq.cli", "quantize", str(folder / "stack.onnx"), "--recipe", options.recipe,
            "--weights", options.weights, "-n", "1", "-o", str(folder / "out.onnx"), "-q",
            "--json", str(folder / "numbers.json"),
        ]  # fmt: skip
        np.savez(folder / "data.npz", x=np.random.default_rng(1).standard_normal((1, 4, WIDTH)).astype(np.float32))
        subprocess.run([*command, "--data", str(folder / "data.npz")], check=True)
        numbers = json.loads((folder / "numbers.json").read_text())
        sys.stdout.write(
            f"{size / 1e9:.2f} GB of weights -> {numbers['quantized_bytes'] / 1e9:.2f} GB, "
            f"peak {numbers['peak_rss_mib']:.0f} MiB, {numbers['seconds']}\n"
        )


if __name__ == "__main__":
    main()
