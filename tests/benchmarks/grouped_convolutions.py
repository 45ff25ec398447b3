"""What convolutions in groups cost in onnxruntime: in float, on codes, and in float between codes, for `cpu`.

    python tests/benchmarks/grouped_convolutions.py

Three times a 1 × 1 convolution, a 3 × 3 one in groups and a 1 × 1 one, random weights, one thread, batch 1: the fastest
of several runs, the models in turn. `--target cpu` keeps those in float that are faster so; the second column is made
without that rule.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser
from session import fastest_milliseconds, open_session

import onnxq
from onnxq.targets import cpu

SIZES = ((64, 56), (128, 28), (256, 14))  # channels, side
WIDTHS = (1, 2, 4, 8, 16, 32)
DEPTHWISE = ((8, 56), (12, 56), (16, 56), (24, 56))
MULTIPLIERS = (2, 4)  # results of each channel
ROUNDS = 40


def network(channels: int, side: int, width: int, multiplier: int = 1) -> onnx.ModelProto:
    """The blocks, in float."""
    groups, lines, constants = channels // width, [], {}
    draw, value, many = np.random.default_rng(0), "x", channels * multiplier
    shapes = ((channels, channels, 1, 1), (many, width, 3, 3), (channels, many, 1, 1))
    for index in range(9):
        shape = shapes[index % 3]
        constants[f"w{index}"] = draw.normal(size=shape) / np.prod(shape[1:]) ** 0.5
        options = f"<group={groups}, pads=[1,1,1,1]>" if index % 3 == 1 else ""
        lines.append(f"[layer{index}] c{index} = Conv {options} ({value}, w{index}) r{index} = Relu (c{index})")
        value = f"r{index}"
    shape = f"float[1,{channels},{side},{side}]"
    body = "\n".join([*lines, f"y = Identity ({value})"])
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> net ({shape} x) => ({shape} y) {{ {body} }}')
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return model


def measure(channels: int, side: int, width: int, multiplier: int) -> list[float]:
    """Milliseconds in float, all on codes, and with groups in float."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.onnx" for name in ("float", "codes", "mixed")]
        onnx.save(network(channels, side, width, multiplier), files[0])
        x = np.random.default_rng(1).normal(size=(1, channels, side, side)).astype(np.float32)
        onnxq.quantize(files[0], [{"x": x}], target="cpu", output=files[1])
        exclude = [f"layer{index}" for index in (1, 4, 7)]
        onnxq.quantize(files[0], [{"x": x}], target="cpu", output=files[2], exclude=exclude)
        return fastest_milliseconds([open_session(path, threads=1) for path in files], {"x": x}, ROUNDS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cpu.NARROW_GROUP = cpu.NARROW_CHANNELS = 0
    cpu.MOST_OF_ONE = max(MULTIPLIERS)
    cases = [(channels, side, width, 1) for channels, side in SIZES for width in WIDTHS]
    cases += [(channels, side, 1, 1) for channels, side in DEPTHWISE]
    cases += [(channels, side, 1, multiplier) for channels, side in SIZES for multiplier in MULTIPLIERS]
    for channels, side, width, multiplier in cases:
        before, codes, mixed = measure(channels, side, width, multiplier)
        print(
            f"{channels:4} channels of {side:2}², {width:2} in a group, {multiplier} made of each: "
            f"float {before:5.2f} ms, codes {codes / before:.2f}, groups in float {mixed / before:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
