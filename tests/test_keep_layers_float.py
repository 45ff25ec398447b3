"""What stays in float between codes runs in float in onnxruntime, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import add_weights
from onnx_ir.passes import PassResult

import onnxq
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.passes.keep_layers_float import KeepLayersFloat
from onnxq.runtime import Session
from onnxq.targets import get

NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,16,8,8] x) => (float[N,16,8,8] y)
{
    [first] a = Conv <pads=[1,1,1,1]> (x, w1)
    ra = Relu (a)
    [middle] b = LAYER
    rb = Relu (b)
    [last] y = Conv <pads=[1,1,1,1]> (rb, w3)
}
"""
CONV = {"w1": (16, 16, 3, 3), "w3": (16, 16, 3, 3)}
CASES = {
    "depthwise": (
        NETWORK.replace("LAYER", "Conv <group=16, pads=[1,1,1,1]> (ra, w2, bias)"),
        {"w2": (16, 1, 3, 3), "bias": (16,)},
    ),
    "convolution": (NETWORK.replace("LAYER", "Conv (ra, w2)"), {"w2": (16, 16, 1, 1)}),
    "transposed": (NETWORK.replace("LAYER", "ConvTranspose (ra, w2, bias)"), {"w2": (16, 16, 1, 1), "bias": (16,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_kept_in_float_is_not_rounded_by_onnxruntime(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, shapes = CASES[case]
    model = add_weights(text, CONV | shapes)
    path, output = models.save(model, tmp_path / "network.onnx"), tmp_path / "quantized.onnx"
    inputs = [{"x": np.random.default_rng(0).standard_normal((8, 16, 8, 8), np.float32)}]
    numbers = onnxq.quantize(path, inputs, target="cpu", exclude=["middle"], output=output).numbers
    assert numbers["quantized_nodes"] == 2 and numbers["weighted_nodes"] == 3 and "middle" in numbers["left_float"]
    assert _deployed(output, tmp_path) == (2, 0)
    # Once onnxruntime leaves such layers alone, the pass can go.
    monkeypatch.setattr(KeepLayersFloat, "call", lambda self, model: PassResult(model, False))
    onnxq.quantize(path, inputs, target="cpu", exclude=["middle"], output=output)
    assert _deployed(output, tmp_path) != (2, 0)
    assert [(item.rule, item.node) for item in get("cpu").lint(models.load(output))] == [("C12", "middle")]


def _deployed(path: Path, folder: Path) -> tuple[int, int]:
    """Layers on integer kernels in the session that is deployed, and weights that are rounded before they are read."""
    optimized = folder / "optimized.onnx"
    Session(path, optimized_path=str(optimized))
    graph = models.read(optimized).graph
    layers = sum(node.op_type in ("QLinearConv", "QGemm") for node in graph)
    return layers, sum(graphs.is_dequantize(node) and graphs.is_constant(node.inputs[0]) for node in graph)


def test_it_reads_a_scale_for_each_channel(tmp_path: Path) -> None:
    text, shapes = CASES["depthwise"]
    path = models.save(add_weights(text, CONV | shapes), tmp_path / "network.onnx")
    inputs = [{"x": np.random.default_rng(0).standard_normal((8, 16, 8, 8), np.float32)}]
    result = onnxq.quantize(path, inputs, target="cpu", exclude=["middle"])
    middle = next(node for node in result.model.graph if node.name == "middle")
    pair = middle.inputs[0].producer()  # type: ignore[union-attr]
    assert graphs.is_dequantize(pair) and pair is not None
    assert [value.const_value.shape for value in pair.inputs[1:]] == [(16,), (16,)]  # type: ignore[union-attr]
    assert not get("cpu").lint(result.model)


@pytest.mark.parametrize(
    ("groups", "width", "reason"),
    [(8, 2, "groups of 2"), (4, 4, "groups of 4"), (2, 8, ""), (1, 16, ""), (16, 1, ""), (8, 1, "only 8 channels")],
)
def test_narrow_groups_stay_float_where_codes_are_slower(groups: int, width: int, reason: str) -> None:
    channels = groups * width
    text = NETWORK.replace("LAYER", f"Conv <group={groups}, pads=[1,1,1,1]> (ra, w2)")
    text = text.replace("[N,16", f"[N,{channels}")
    shapes = {"w1": (channels, channels, 3, 3), "w2": (channels, width, 3, 3), "w3": (channels, channels, 3, 3)}
    target = get("cpu")
    placement = target.place(add_weights(text, shapes).graph, target.scheme("int8", "uint8"))
    assert reason in placement.left_float.get("middle", "") and bool(reason) == ("middle" in placement.left_float)
