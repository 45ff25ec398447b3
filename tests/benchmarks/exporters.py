"""What torch's exporters write, at every opset, ends in int8 for either target: products on codes, and the SQNR.

    python tests/benchmarks/exporters.py [--networks vit gpt] [--opsets 13 23]

A cell is `quantized/all products, SQNR in dB` for TensorRT and for the CPU; `export:` is an exporter's own refusal, and
the opset in brackets the one that the file has where the exporter wrote another.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import onnx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch_networks import NETWORKS, export

import onnxq


def cell(name: str, exporter: str, opset: int, folder: Path) -> str:
    """What comes out of one export."""
    path = folder / "network.onnx"
    try:
        export(name, exporter, path, opset=opset)
    except Exception as error:  # noqa: BLE001  (whatever an exporter raises)
        return f"export: {type(error).__name__}"
    feed = {f"input{index}": tensor.numpy() for index, tensor in enumerate(NETWORKS[name][1](16))}
    found = []
    for target in ("tensorrt", "cpu"):
        try:
            numbers = onnxq.quantize(path, [feed], target=target, output=folder / "quantized.onnx").numbers
            counts = f"{numbers['quantized_nodes']}/{numbers['weighted_nodes']}"
            found.append(f"{counts} {numbers['sqnr_db']:.1f}")
        except onnxq.OnnxqError as error:
            found.append(f"refused ({error.message[:100]})")
    written = opset_of(path)
    return " · ".join(found) + (f" [{written}]" if written != opset else "")


def opset_of(path: Path) -> int:
    """The version of the standard operators in a file."""
    opsets = onnx.load(path, load_external_data=False).opset_import
    return next(int(item.version) for item in opsets if item.domain in ("", "ai.onnx"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet", "vit", "unet", "gpt"], choices=list(NETWORKS))
    parser.add_argument("--opsets", nargs="+", type=int, default=list(range(13, 24)))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = [(name, exporter) for name in arguments.networks for exporter in ("torchscript", "dynamo")]
    print("| opset | " + " | ".join(f"{name}, {exporter}" for name, exporter in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for opset in arguments.opsets:
        with tempfile.TemporaryDirectory() as folder:
            cells = [cell(name, exporter, opset, Path(folder)) for name, exporter in columns]
        print(f"| {opset} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
