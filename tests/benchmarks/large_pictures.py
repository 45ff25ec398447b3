"""Memory and time of quantizing a network of large pictures: the decoder of latents of Stable Diffusion, narrower.

    python tests/benchmarks/large_pictures.py [--sides 32 64] [--width 64] [--samples 2]

Sides are those of the latents; the picture's is eight times that. Each tool calibrates on the same samples, in a
process of its own; bare inference of these samples is what a tool can do no cheaper. onnxruntime's tool keeps the
extremes of its values alone (MinMax), or all values of all samples (Percentile).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from process import HERE, measure

LIMIT_SECONDS, LIMIT_MIB = 1800.0, 16_000.0


def write_decoder(path: Path, side: int, width: int) -> None:
    """Stable Diffusion's decoder with random weights, its first level ``width`` channels wide instead of 128."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[width, 2 * width, 4 * width, 4 * width],
        layers_per_block=2,
    ).eval()

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            return self.network.decode(latent, return_dict=False)[0]

    warnings.filterwarnings("ignore")
    latent = torch.randn(1, 4, side, side)
    options = {"dynamo": True, "opset_version": 21, "external_data": False, "verbose": False}
    torch.onnx.export(Decoder(), (latent,), path, input_names=["latent"], **options)


def main() -> None:
    """Print a line for each size and tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="*", default=(32, 64))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write_decoder(given.write, given.sides[0], given.width)
        return
    for side in given.sides:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model, data, result = folder / "decoder.onnx", folder / "latents.npz", folder / "result.onnx"
            command = [sys.executable, __file__, "--write", model, "--sides", side, "--width", given.width]
            subprocess.run([str(part) for part in command], check=True, capture_output=True)
            latents = np.random.default_rng(0).standard_normal((given.samples, 4, side, side)).astype(np.float32)
            np.savez(data, latent=latents)
            theirs = [HERE / "peers" / "quantize_onnxruntime.py", model, data, result, "--samples", given.samples]
            ours = ["-m", "onnxq", "quantize", model, "--data", data, "-o", result, "--target"]
            commands = {
                "bare inference": [HERE / "float_inference.py", model, data, result],
                "onnxq, tensorrt": [*ours, "tensorrt"],
                "onnxq, cpu": [*ours, "cpu"],
                "onnxq compare": ["-m", "onnxq", "compare", model, result, "--data", data],
                "onnxruntime, MinMax": [*theirs, "--method", "uint8"],
                "onnxruntime, Percentile": [*theirs, "--method", "uint8_percentile"],
            }
            for label, command in commands.items():
                if "compare" not in label:
                    result.unlink(missing_ok=True)
                parts = [sys.executable, *(str(part) for part in command)]
                found = measure(parts, folder / "log", LIMIT_SECONDS, LIMIT_MIB)
                print(
                    f"{8 * side:5d}² {label:24s} {found['wall_seconds']:7.1f} s {found['peak_mib']:7.0f} MiB "
                    f"{found.get('error', '')}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
