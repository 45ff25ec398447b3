"""What narrow convolutions cost in onnxruntime on codes, beside float, for `cpu`, which keeps the narrowest in float.

    python tests/benchmarks/narrow_convolutions.py

First, six convolutions in a row that take turns in having so many and so many channels, all of them on codes: how long
they take, over float; of volumes too. Then first layers of an image with what may follow them: all on codes, and as
`--target cpu` places them. Then blocks around depthwise convolutions, with the channels that they have, and padded as
`--target cpu` does. Then blocks as ConvNeXt's, whose depthwise convolution lies between float layers: on codes, and as
placed. Last, what cuts latents into patches for layers of a transformer.
Random weights, one thread, batch 1; the fastest of several runs, the models in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import onnx
from onnx import numpy_helper, parser
from session import fastest_milliseconds, open_session

import onnxq
from onnxq.passes import pad_channels
from onnxq.targets import cpu_float_layers

KERNELS = (1, 3, 5)
CHANNELS = (2, 4, 8, 12, 16, 32)
SIDE = 56
ROUNDS = 15
PADDED = "pads=[1,1,1,1]"
POOL = "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]"
FIRST = (
    (1, 32, 3, 1, 112),
    (3, 16, 3, 1, 112),
    (3, 32, 3, 2, 224),
    (3, 64, 7, 2, 224),
)  # in, out, kernel, stride, side
SECOND = f"d = Conv <{PADDED}> (b, w1) e = Relu (d)"
BEHIND = {
    "a convolution": f"b = Relu (a) {SECOND} f = Conv <{PADDED}> (e, w2) y = Relu (f)",
    "a HardSwish": f"b = HardSwish (a) {SECOND} f = Conv <{PADDED}> (e, w2) y = Relu (f)",
    "a MaxPool": f"c = Relu (a) b = MaxPool <{POOL}> (c) {SECOND} s = Add (b, e) "
    f"f = Conv <{PADDED}> (s, w2) y = Relu (f)",
    "a shortcut": f"b = Relu (a) {SECOND} s = Add (b, e) f = Conv <{PADDED}> (s, w2) y = Relu (f)",
}

DEPTHWISE = ((3, 56), (3, 28), (5, 14))  # kernel, side
DEPTHWISE_CHANNELS = (24, 40, 64, 72, 88, 120, 184, 200)
VOLUME_SIDES = (12, 24)
VOLUME_CHANNELS = (8, 16, 32, 64)
ALL_ON_CODES = (
    (cpu_float_layers, "NARROW_PAIRS", 0), (cpu_float_layers, "NARROW_PAIRS_OF_VOLUMES", 0),
    (cpu_float_layers, "STEM_CHANNELS", 0),
)  # fmt: skip
UNPADDED = ((pad_channels, "LANES", 1),)
LONE = ((24, 56), (48, 56), (88, 28), (192, 28), (384, 14))  # channels, side
LONE_KERNELS = (3, 5, 7)
PATCHES = ((4, 384, 2, 32), (4, 1152, 2, 64), (16, 1536, 2, 64), (3, 96, 4, 224))  # in, out, patch, side
LONE_ON_CODES = ((cpu_float_layers, "_alone", lambda *_: []),)


def network(
    body: str, channels: int, side: int, weights: Mapping[str, Sequence[int]], axes: int = 2
) -> onnx.ModelProto:
    """A model of these lines with random weights, for pictures or volumes."""
    sides, free = ",".join([str(side)] * axes), ",".join("dhw"[-axes:])
    signature = f"net (float[1,{channels},{sides}] x) => (float[1,c,{free}] y)"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {signature} {{ {body} }}')
    draw = np.random.default_rng(0)
    for name, shape in weights.items():
        array = draw.normal(size=shape) / np.prod(shape[1:]) ** 0.5
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return model


def in_turns(one: int, other: int, kernel: int, side: int = SIDE, axes: int = 2) -> onnx.ModelProto:
    """Six convolutions, from so many channels to so many and back."""
    pads = ",".join(str(kernel // 2) for _ in range(2 * axes))
    lines = [f"c{i} = Conv <pads=[{pads}]> (r{i}, w{i}) r{i + 1} = Relu (c{i})" for i in range(6)]
    body = " ".join(["r0 = Identity (x)", *lines, "y = Identity (r6)"])
    shapes = {f"w{i}": ((other, one) if i % 2 == 0 else (one, other)) + (kernel,) * axes for i in range(6)}
    return network(body, one, side, shapes, axes)


def around_depthwise(channels: int, kernel: int, side: int) -> onnx.ModelProto:
    """Two blocks that widen a quarter of the channels to all of them and back, with a depthwise layer between."""
    pads, narrow = ",".join(str(kernel // 2) for _ in range(4)), channels // 8 * 4
    lines = []
    for i in range(0, 6, 3):
        depthwise = f"d{i} = Conv <group={channels}, pads=[{pads}]> (a{i}, w{i + 1})"
        lines.append(f"c{i} = Conv (r{i}, w{i}) a{i} = Relu (c{i}) {depthwise} b{i} = Relu (d{i})")
        lines.append(f"e{i} = Conv (b{i}, w{i + 2}) r{i + 3} = Relu (e{i})")
    shapes = [(channels, narrow, 1, 1), (channels, 1, kernel, kernel), (narrow, channels, 1, 1)] * 2
    body = " ".join(["r0 = Identity (x)", *lines, "y = Identity (r6)"])
    return network(body, narrow, side, {f"w{i}": shape for i, shape in enumerate(shapes)})


def between_floats(channels: int, kernel: int, side: int) -> onnx.ModelProto:
    """Three blocks of a depthwise convolution, a norm and a product of channels, beside a shortcut."""
    pads = ",".join(str(kernel // 2) for _ in range(4))
    lines = [
        f"c{i} = Conv <group={channels}, pads=[{pads}]> (r{i}, w{i}) t{i} = Transpose <perm=[0,2,3,1]> (c{i}) "
        f"n{i} = LayerNormalization (t{i}, g) u{i} = MatMul (n{i}, m{i}) "
        f"v{i} = Transpose <perm=[0,3,1,2]> (u{i}) r{i + 1} = Add (v{i}, r{i})"
        for i in range(3)
    ]
    kernels = {f"w{i}": (channels, 1, kernel, kernel) for i in range(3)}
    matrices = {f"m{i}": (channels, channels) for i in range(3)}
    body = " ".join(["r0 = Identity (x)", *lines, "y = Identity (r3)"])
    return network(body, channels, side, {**kernels, **matrices, "g": (channels,)})


def of_patches(channels: int, width: int, patch_side: int, side: int) -> onnx.ModelProto:
    """Three products of tokens beside a shortcut, behind what makes tokens of patches."""
    lines = [
        f"n{i} = LayerNormalization (r{i}, g) u{i} = MatMul (n{i}, m{i}) r{i + 1} = Add (u{i}, r{i})" for i in range(3)
    ]
    cut = f"c = Conv <strides=[{patch_side},{patch_side}]> (x, w) r0 = Transpose <perm=[0,2,3,1]> (c)"
    weights: dict[str, Sequence[int]] = {f"m{i}": (width, width) for i in range(3)}
    weights |= {"w": (width, channels, patch_side, patch_side), "g": (width,)}
    return network(" ".join([cut, *lines, "y = Identity (r3)"]), channels, side, weights)


def times_over_float(
    model: onnx.ModelProto, without: Sequence[tuple[ModuleType, str, object]], *, as_placed: bool
) -> list[float]:
    """Without some of the target's rules, and as placed if asked for: time over the float model's."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.onnx" for name in ("float", "codes", "placed")][: 3 if as_placed else 2]
        onnx.save(model, files[0])
        shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        with ExitStack() as rules:
            for change in without:
                rules.enter_context(patch.object(*change))
            onnxq.quantize(files[0], [{"x": x}], target="cpu", output=files[1])
        if as_placed:
            onnxq.quantize(files[0], [{"x": x}], target="cpu", output=files[2])
        before, *others = fastest_milliseconds([open_session(path, threads=1) for path in files], {"x": x}, ROUNDS)
    return [milliseconds / before for milliseconds in others]


def main() -> None:
    """Print both tables as they grow."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for kernel in KERNELS:
        print(f"{kernel} × {kernel} on codes, over float" + "".join(f"{channels:6}" for channels in CHANNELS))
        for one in CHANNELS:
            ratios = [
                times_over_float(in_turns(one, other, kernel), ALL_ON_CODES, as_placed=False)[0] for other in CHANNELS
            ]
            print(f"{one:4} channels, and          " + "".join(f"{ratio:6.2f}" for ratio in ratios), flush=True)
    for side in VOLUME_SIDES:
        print(f"3 × 3 × 3 of {side}³ on codes, over float" + "".join(f"{channels:6}" for channels in VOLUME_CHANNELS))
        for one in VOLUME_CHANNELS:
            ratios = [
                times_over_float(in_turns(one, other, 3, side, 3), ALL_ON_CODES, as_placed=False)[0]
                for other in VOLUME_CHANNELS
            ]
            print(f"{one:4} channels, and          " + "".join(f"{ratio:6.2f}" for ratio in ratios), flush=True)
    for inputs, outputs, kernel, stride, side in FIRST:
        pads = ",".join(str(kernel // 2) for _ in range(4))
        stem = f"a = Conv <pads=[{pads}], strides=[{stride},{stride}]> (x, w0) "
        weights = {"w0": (outputs, inputs, kernel, kernel)} | {f"w{i}": (outputs, outputs, 3, 3) for i in (1, 2)}
        for name, rest in BEHIND.items():
            codes, placed = times_over_float(network(stem + rest, inputs, side, weights), ALL_ON_CODES, as_placed=True)
            print(
                f"{inputs} to {outputs:2} channels, {kernel} × {kernel}, then {name:13}: "
                f"codes {codes:.2f}, as placed {placed:.2f}",
                flush=True,
            )
    for kernel, side in DEPTHWISE:
        for channels in DEPTHWISE_CHANNELS:
            plain, padded = times_over_float(around_depthwise(channels, kernel, side), UNPADDED, as_placed=True)
            shape = f"{channels:3} channels of {side}², {kernel} × {kernel}"
            print(f"around a depthwise layer of {shape}: {plain:.2f} of float's time, padded {padded:.2f}", flush=True)
    for channels, side in LONE:
        for kernel in LONE_KERNELS:
            codes, placed = times_over_float(between_floats(channels, kernel, side), LONE_ON_CODES, as_placed=True)
            shape = f"{channels:3} channels of {side}², {kernel} × {kernel}"
            print(f"a lone depthwise layer of {shape}: on codes {codes:.2f} of float's time, as placed {placed:.2f}")
    for channels, width, patch_side, side in PATCHES:
        codes, placed = times_over_float(of_patches(channels, width, patch_side, side), LONE_ON_CODES, as_placed=True)
        shape = f"{patch_side} × {patch_side} of {side}², {channels} channels, to tokens of {width:4}"
        print(f"patches of {shape}: on codes {codes:.2f} of float's time, as placed {placed:.2f}")


if __name__ == "__main__":
    main()
