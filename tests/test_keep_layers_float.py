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


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (2, 32), (64, 1), (8, 9), (16, 16)])
def test_few_pairs_of_channels_stay_float_where_codes_are_slower(inputs: int, outputs: int) -> None:
    text = NETWORK.replace("LAYER", "Conv <pads=[1,1,1,1]> (ra, w2)").replace("(x, w1)", "(x, w1, bias)")
    shapes = {"w1": (inputs, 16, 3, 3), "bias": (inputs,), "w2": (outputs, inputs, 3, 3), "w3": (16, outputs, 3, 3)}
    target = get("cpu")
    graph = add_weights(text, shapes).graph
    left = target.place(graph, target.scheme("int8", "uint8")).left_float
    narrow = f"{inputs} by {outputs} channels, which are faster in float"
    assert left.get("middle", "") == (narrow if inputs * outputs <= 64 else "")
    assert "middle" not in target.place(graph, target.scheme("int8", "float")).left_float, "no codes, no cost"


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 16), (16, 8), (9, 16), (8, 17)])
def test_more_pairs_of_channels_stay_float_in_volumes(inputs: int, outputs: int) -> None:
    text = NETWORK.replace("LAYER", "Conv <pads=[1,1,1,1,1,1]> (ra, w2)")
    text = text.replace("pads=[1,1,1,1]>", "pads=[1,1,1,1,1,1]>").replace("8,8]", "8,8,8]")
    shapes = {"w1": (inputs, 16, 3, 3, 3), "w2": (outputs, inputs, 3, 3, 3), "w3": (16, outputs, 3, 3, 3)}
    target = get("cpu")
    left = target.place(add_weights(text, shapes).graph, target.scheme("int8", "uint8")).left_float
    narrow = f"{inputs} by {outputs} channels, which are faster in float"
    assert left.get("middle", "") == (narrow if inputs * outputs <= 128 else "")


def test_a_narrow_layer_at_the_head_of_a_stream_keeps_its_codes() -> None:
    """One block that adds to its result is no stream; a second one carries the layout of float on."""
    block = "[in{i}] c{i} = Conv (r{i}, w{i}) [sum{i}] s{i} = Add (r{i}, c{i}) r{j} = Relu (s{i})"
    target = get("cpu")
    for blocks, on_codes in ((1, False), (2, True)):
        lines = [block.format(i=i, j=i + 1) for i in range(blocks)]
        text = f"""<ir_version: 10, opset_import: ["" : 21]>
        network (float[N,8,8,8] x) => (float[N,16,8,8] y) {{
            [wide] a = Conv (x, v) [narrow] b = Conv (a, u) r0 = Relu (b)
            {" ".join(lines)} [last] y = Conv (r{blocks}, t)
        }}"""
        shapes = {"v": (2, 8, 1, 1), "u": (32, 2, 1, 1), "t": (16, 32, 1, 1)}
        shapes |= {f"w{i}": (32, 32, 1, 1) for i in range(blocks)}
        left = target.place(add_weights(text, shapes).graph, target.scheme("int8", "uint8")).left_float
        assert ("narrow" not in left) == on_codes and "wide" in left
