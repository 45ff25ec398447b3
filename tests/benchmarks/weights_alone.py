"""Weights alone as codes on a CPU: latency and size beside float and onnxruntime's own tool.

    python tests/benchmarks/weights_alone.py [--width 1024 --layers 4] [--rounds 25]

Two networks as torch exports them: feed-forward layers without biases and a Relu between, as T5 has them, and a
perceptron whose Linears become Gemms with a transposed weight. Latencies are of one row and one thread, all files in
turn, the median over rounds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from latency import burst
from session import open_session

import onnxq

OURS: dict[str, dict[str, Any]] = {
    "int4-weights, blocks of 32": {"recipe": "int4-weights", "weights": "int4:32"},
    "the same, --packed-blocks": {"recipe": "int4-weights", "weights": "int4:32", "packed_blocks": True},
    "int8 --activations float": {"recipe": "int8", "activations": "float"},
}


class FeedForward(torch.nn.Module):
    """Pairs of Linears with a Relu between and a sum behind."""

    def __init__(self, width: int, layers: int, bias: bool) -> None:
        super().__init__()
        wide = 4 * width
        self.pairs = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(width, wide, bias), torch.nn.ReLU(), torch.nn.Linear(wide, width, bias))
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run all pairs."""
        for pair in self.pairs:
            x = x + pair(x)
        return x


def main() -> None:
    """Print a line for each network and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    for name, axes, bias in (("feed-forward", (1, 1, given.width), False), ("perceptron", (1, given.width), True)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float.onnx"
            torch.manual_seed(0)
            network = FeedForward(given.width, given.layers, bias).eval()
            torch.onnx.export(
                network, (torch.randn(axes),), path, input_names=["x"], dynamo=True, external_data=False, verbose=False
            )
            rows = np.random.default_rng(1).normal(size=(33, *axes)).astype(np.float32)
            data, feed = [{"x": row} for row in rows[1:]], {"x": rows[0]}
            files = [("float", path), ("onnxruntime, blocks of 32", by_onnxruntime(path))]
            for label, options in OURS.items():
                files.append((label, path.with_name(f"{len(files)}.onnx")))
                onnxq.quantize(path, data, target="cpu", output=files[-1][1], **options)
            sessions = [open_session(file, 1) for _, file in files]
            times = [[burst(session, feed) for session in sessions] for _ in range(given.rounds)]
            expected = sessions[0].run(None, feed)[0]
            for (label, file), session, taken in zip(files, sessions, np.median(times, axis=0), strict=True):
                error = session.run(None, feed)[0] - expected
                decibels = 10 * np.log10((expected**2).sum() / max((error**2).sum(), 1e-30))
                print(f"{name:12s} {label:28s} {taken:6.2f} ms, {decibels:5.1f} dB, {file.stat().st_size / 1e6:.1f} MB")


def by_onnxruntime(path: Path) -> Path:
    """What onnxruntime's tool for weights in blocks makes of it."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
    quantizer.process()
    output = path.with_name("theirs.onnx")
    quantizer.model.save_model_to_file(str(output))
    return output


if __name__ == "__main__":
    main()
