"""What activation functions cost between convolutions in onnxruntime, in float and quantized for `cpu`.

    python tests/benchmarks/slow_activations.py

Blocks of three convolutions (to twice the channels, depthwise, back) with random weights, one thread, batch 1: the
fastest of several runs, both models in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser

import onnxq

ACTIVATIONS = {
    "Relu": "{y} = Relu ({x})",
    "LeakyRelu": "{y} = LeakyRelu <alpha=0.2> ({x})",
    "HardSwish": "{y} = HardSwish ({x})",
    "SiLU": "{y}_gate = Sigmoid ({x}) {y} = Mul ({x}, {y}_gate)",
    "Gelu": "{y} = Gelu ({x})",
    "PRelu": "{y} = PRelu ({x}, slopes)",
    "PRelu, steep": "{y} = PRelu ({x}, steep)",
    "PRelu, one slope": "{y} = PRelu ({x}, one)",
    "Mish": "{y} = Mish ({x})",
}
SIZES = ((64, 56), (128, 28), (256, 14))  # channels, side
ROUNDS, RUNS = 15, 5


def block(activation: str, channels: int, side: int) -> onnx.ModelProto:
    """The block, in float."""
    wide, shape = 2 * channels, f"float[1,{channels},{side},{side}]"
    first, second = (ACTIVATIONS[activation].format(x=x, y=y) for x, y in (("a", "b"), ("c", "d")))
    model = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    block ({shape} x) => ({shape} y) {{
        a = Conv (x, w1)
        {first}
        c = Conv <pads=[1,1,1,1], group={wide}> (b, w2)
        {second}
        y = Conv (d, w3)
    }}""")
    draw = np.random.default_rng(0)
    constants = {
        "w1": draw.normal(size=(wide, channels, 1, 1)) / channels**0.5,
        "w2": draw.normal(size=(wide, 1, 3, 3)) / 3,
        "w3": draw.normal(size=(channels, wide, 1, 1)) / wide**0.5,
        "slopes": draw.uniform(0, 0.5, (wide, 1, 1)),
        "steep": draw.uniform(0, 1.5, (wide, 1, 1)),
        "one": np.full(1, 0.25),
    }
    read = {name for node in model.graph.node for name in node.input}
    for name in read & set(constants):
        model.graph.initializer.append(numpy_helper.from_array(constants[name].astype(np.float32), name))
    return model


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'':20}" + "".join(f"{f'{channels} x {side}²':>26}" for channels, side in SIZES))
    for activation in ACTIVATIONS:
        cells = []
        for channels, side in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                files = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
                onnx.save(block(activation, channels, side), files[0])
                x = np.random.default_rng(1).normal(size=(1, channels, side, side)).astype(np.float32)
                onnxq.quantize(files[0], [{"x": x}], target="cpu", output=files[1])
                sessions = [session(path) for path in files]
                fastest = [float("inf")] * 2
                for _ in range(ROUNDS):
                    for index, running in enumerate(sessions):
                        for _ in range(RUNS):
                            start = time.perf_counter()
                            running.run(None, {"x": x})
                            fastest[index] = min(fastest[index], time.perf_counter() - start)
            before, after = (1000 * seconds for seconds in fastest)
            cells.append(f"{before:.2f} -> {after:.2f} ms ({after / before:.2f})")
        print(f"{activation:20}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
