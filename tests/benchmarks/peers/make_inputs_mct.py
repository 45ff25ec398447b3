"""Model Compression Toolkit: inputs made for a classifier with BatchNormalization, by its documented defaults.

    FOLDER/mct/bin/python tests/benchmarks/peers/make_inputs_mct.py MODEL.onnx OUT.npz \
        [--samples 64] [--iterations 500] [--normalization torchvision] [--seed 0]

``data_free.py --methods given --given FOLDER`` calibrates on them. MCT takes a torch module, so the graph of a plain
convolutional classifier is rebuilt as one; how far that is from onnxruntime's result is printed. Three lines declare
operators that torchvision 0.28 from PyPI misses beside the CPU build of torch 2.13.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import fx, nn
from torch.nn import functional

_library = torch.library.Library("torchvision", "DEF")
for _operator in ("nms", "qnms"):
    _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import model_compression_toolkit as mct  # noqa: E402

NORMALIZATIONS = {kind.value: kind for kind in mct.data_generation.ImageNormalizationType}


class Rebuilder:
    """A traced torch module with the nodes of a plain convolutional classifier."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.modules, self.graph = nn.Module(), fx.Graph()
        self.constants = {
            item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in model.graph.initializer
        }
        (name,) = [value.name for value in model.graph.input if value.name not in self.constants]
        self.values: dict[str, Any] = {name: self.graph.placeholder("x")}
        for node in model.graph.node:
            self.values[node.output[0]] = self.built(node, {item.name: value_of(item) for item in node.attribute})
        self.graph.output(self.values[model.graph.output[0].name])
        self.input = name

    def module(self) -> fx.GraphModule:
        return fx.GraphModule(self.modules, self.graph).eval()

    def built(self, node: onnx.NodeProto, given: dict[str, Any]) -> Any:
        if node.op_type == "Constant":
            self.constants[node.output[0]] = tensor(given["value"])
            return None
        inputs = [self.values.get(name) for name in node.input]
        constants = [self.constants.get(name) for name in node.input]
        call = self.graph.call_function
        match node.op_type:
            case "Conv":
                return self.layer(convolution(constants, given), inputs[0])
            case "BatchNormalization":
                return self.layer(normalization(constants, given), inputs[0])
            case "Gemm":
                return self.layer(linear(constants, given), inputs[0])
            case "Relu":
                return self.layer(nn.ReLU(), inputs[0])
            case "Clip":
                low, high = (float(value) for value in constants[1:3])
                return self.layer(nn.Hardtanh(low, high), inputs[0])
            case "GlobalAveragePool":
                return self.layer(nn.AdaptiveAvgPool2d(1), inputs[0])
            case "Flatten":
                return self.layer(nn.Flatten(), inputs[0])
            case "Add":
                return call(torch.add, tuple(inputs))
            case "Pad":  # begins, then ends, from the first axis on; torch counts from the last
                counts = constants[1].reshape(2, -1).flip(1).T.reshape(-1).tolist()
                return call(functional.pad, (inputs[0], counts))
            case "Slice":
                value = inputs[0]
                for start, end, axis, step in zip(*(item.tolist() for item in constants[1:5]), strict=True):
                    index = [slice(None)] * axis + [slice(start, min(end, 2**31), step)]
                    value = call(operator.getitem, (value, tuple(index)))
                return value
        raise SystemExit(f"no torch module is written here for {node.op_type}")

    def layer(self, module: nn.Module, value: fx.Node) -> fx.Node:
        name = f"layer{len(list(self.modules.children()))}"
        self.modules.add_module(name, module)
        return self.graph.call_module(name, (value,))


def tensor(proto: onnx.TensorProto) -> torch.Tensor:
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def value_of(item: onnx.AttributeProto) -> Any:
    if item.HasField("t"):
        return item.t
    return list(item.ints) or (item.i if item.HasField("i") else item.f)


def convolution(constants: list[Any], given: dict[str, Any]) -> nn.Module:
    weight, bias = constants[1], constants[2] if len(constants) > 2 else None
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    even = (top, left) == (bottom, right)
    groups = given.get("group", 1)
    module = nn.Conv2d(
        weight.shape[1] * groups,
        len(weight),
        tuple(weight.shape[2:]),
        tuple(given.get("strides", (1, 1))),
        (top, left) if even else 0,
        groups=groups,
        bias=bias is not None,
    )
    module.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return module if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), module)


def normalization(constants: list[Any], given: dict[str, Any]) -> nn.Module:
    module = nn.BatchNorm2d(len(constants[1]), eps=given.get("epsilon", 1e-5))
    names = ("weight", "bias", "running_mean", "running_var")
    module.load_state_dict(dict(zip(names, constants[1:], strict=True)), strict=False)
    return module


def linear(constants: list[Any], given: dict[str, Any]) -> nn.Module:
    weight = constants[1] if given.get("transB") else constants[1].T
    module = nn.Linear(weight.shape[1], weight.shape[0])
    module.load_state_dict({"weight": weight, "bias": constants[2]})
    return module


def main() -> None:
    """Write the inputs, and one line of JSON with the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=500, help="for all images; 500 is MCT's default")
    parser.add_argument("--normalization", choices=NORMALIZATIONS, default="torchvision")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)  # MCT draws from there too
    rebuilder = Rebuilder(onnx.load(options.model))
    module = rebuilder.module()
    session = onnxruntime.InferenceSession(str(options.model), providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    x = np.random.default_rng(0).standard_normal((1, *shape[1:])).astype(np.float32)
    with torch.no_grad():
        error = np.abs(module(torch.from_numpy(x)).numpy() - session.run(None, {rebuilder.input: x})[0]).max()
    start = time.perf_counter()
    made = mct.data_generation.pytorch_data_generation_experimental(
        model=module,
        n_images=options.samples,
        output_image_size=tuple(shape[2:]),
        data_generation_config=mct.data_generation.get_pytorch_data_generation_config(
            n_iter=options.iterations, image_normalization_type=NORMALIZATIONS[options.normalization]
        ),
    )
    seconds = time.perf_counter() - start
    images = torch.cat([image.detach().reshape(-1, *shape[1:]) for image in made]).numpy()
    np.savez(options.out, **{rebuilder.input: images[: options.samples].astype(np.float32)})
    print(json.dumps({"seconds": round(seconds, 1), "rebuilt_error": float(error), "shape": list(images.shape)}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
