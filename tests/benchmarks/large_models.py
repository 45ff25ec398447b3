"""Memory and time of quantizing, comparing and linting models of gigabytes, against their size.

    python tests/benchmarks/large_models.py [--gib 0.5 1 2 3] [--recipe int4-weights] [--folder FOLDER]

Each model is a stack of feed-forward blocks whose weights lie in one external file, written block by block. Every
command runs as a process of its own. ``anonymous`` is the memory that the process needs, at its peak; ``resident``
counts pages of mapped files too, which the system takes back when memory is short.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

WIDTH, INNER, SEQUENCE = 1024, 4096, 8
BLOCK_BYTES = 2 * WIDTH * INNER * 4


def main() -> None:
    """Print one line for each size and command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, nargs="*", default=(0.5, 1, 2, 3))
    parser.add_argument("--recipe", default="int4-weights")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    print(f"{'weights MiB':>11} {'command':9} {'seconds':>8} {'anonymous MiB':>13} {'resident MiB':>12} {'exit':>4}")
    for size in arguments.gib:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            model, result = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
            blocks = max(1, round(size * 2**30 / BLOCK_BYTES))
            write_model(model, blocks)
            data = Path(folder) / "data.npz"
            np.savez(data, x=np.random.default_rng(0).standard_normal((4, SEQUENCE, WIDTH)).astype(np.float32))
            recipe = ["--recipe", arguments.recipe, "--target", arguments.target]
            for command in (
                ["quantize", str(model), *recipe, "--data", str(data), "-o", str(result)],
                ["compare", str(model), str(result), "--data", str(data)],
                ["lint", str(result), "--target", arguments.target],
            ):
                seconds, anonymous, resident, code = measured([sys.executable, "-m", "onnxq", *command])
                print(
                    f"{blocks * BLOCK_BYTES / 2**20:11.0f} {command[0]:9} {seconds:8.1f} {anonymous:13.0f} "
                    f"{resident:12.0f} {code:4}",
                    flush=True,
                )


def write_model(path: Path, blocks: int) -> None:
    """A stack of x + W2 relu(W1 x), its weights written to ``path`` + ``.data`` one by one."""
    x = ir.Value(name="x", shape=ir.Shape(["N", SEQUENCE, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, initializers, value, offset = [], [], x, 0
    location = f"{path.name}.data"
    with (path.parent / location).open("wb") as file:
        for block in range(blocks):
            source = np.random.default_rng(block)
            weights = []
            for part, shape in enumerate(((WIDTH, INNER), (INNER, WIDTH))):
                array = source.standard_normal(shape, np.float32)
                array *= 0.3 / np.sqrt(shape[0])
                file.write(array.data)
                name = f"block{block}.w{part + 1}"
                tensor = ir.ExternalTensor(
                    location, offset, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name,
                    base_dir=str(path.parent),
                )  # fmt: skip
                offset += array.nbytes
                weights.append(
                    ir.Value(
                        name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor
                    )
                )
            first = ir.node("MatMul", [value, weights[0]], name=f"block{block}.up")
            relu = ir.node("Relu", first.outputs, name=f"block{block}.relu")
            second = ir.node("MatMul", [relu.outputs[0], weights[1]], name=f"block{block}.down")
            add = ir.node("Add", [value, second.outputs[0]], name=f"block{block}.add")
            nodes += [first, relu, second, add]
            initializers += weights
            value = add.outputs[0]
    value.name = "y"
    value.shape, value.type = x.shape, x.type
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="large")
    ir.save(ir.Model(graph, ir_version=10), path)


def measured(command: list[str]) -> tuple[float, float, float, int]:
    """Seconds, peak of anonymous and of resident memory in MiB, and the exit status."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    anonymous = resident = 0.0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            anonymous = max(anonymous, float(fields["RssAnon"].split()[0]) / 1024)
            resident = max(resident, float(fields["VmRSS"].split()[0]) / 1024)
        except (OSError, KeyError):
            pass  # between its end and its burial
        time.sleep(0.01)
    if process.returncode and process.stderr is not None:
        sys.stderr.write(process.stderr.read().decode()[-500:])
    return time.perf_counter() - started, anonymous, resident, process.returncode


if __name__ == "__main__":
    main()
