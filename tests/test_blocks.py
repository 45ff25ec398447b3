"""Blocks: every layer once, inputs that earlier blocks end in, and the network's output at the end of the walk."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from conftest import NETWORK, SHAPES, add_weights

from onnxq import layer_nodes
from onnxq import model as models
from onnxq.autograd.blocks import cut
from onnxq.autograd.interpreter import TorchGraph

REAL = ("resnet20_cifar10", "r20vit_hybrid_cifar10", "squeezenet_v1_1", "mobilenetv2_bnfolded", "ppocrv6_rec_tiny")


def layers_of(model: ir.Model) -> list[str]:
    return [item.node.name for item in layer_nodes.weighted_nodes(model.graph) if item.weight_index is not None]


def test_a_residual_unit_is_one_block() -> None:
    model = add_weights(NETWORK, SHAPES)
    models.normalise(model)
    names = [block.layers for block in cut(model.graph)]
    assert names == [("conv1",), ("conv2",), ("fc",)]
    assert [block.output for block in cut(model.graph)] == ["r1", "r2", "logits"]  # nonlinearities included


def test_layers_leave_the_sum_to_a_block_of_its_own() -> None:
    model = add_weights(NETWORK, SHAPES)
    models.normalise(model)
    found = cut(model.graph, "layer")
    assert [block.layers for block in found] == [("conv1",), ("conv2",), (), ("fc",)]
    assert found[1].output == "n2" and set(found[2].inputs) == {"n2", "r1"}


def test_modules_of_the_exporter_join_layers() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    network (float[N,4,8,8] x) => (float[N,4,8,8] y) {
        [first] a = Conv (x, w1)
        [second] b = Conv (a, w2)
        [third] y = Conv (b, w3)
    }
    """
    model = add_weights(text, {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1), "w3": (4, 4, 1, 1)})
    for node, module in zip(model.graph, ("body.0", "body.0", "head"), strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', '{module}', '{node.name}']"
        node.metadata_props["pkg.torch.onnx.class_hierarchy"] = "['Net', 'InvertedResidual', 'Conv2d']"
    assert [block.layers for block in cut(model.graph)] == [("first", "second"), ("third",)]


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("name", REAL)
def test_real_models_are_computed_block_by_block(shared_data: Path, name: str, granularity: str) -> None:
    model = models.load(shared_data / "models" / f"{name}.onnx")
    blocks = cut(model.graph, granularity)
    layers = [layer for block in blocks for layer in block.layers]
    assert sorted(layers) == sorted(layers_of(model)) and len(set(layers)) == len(layers)
    graph = TorchGraph(model)
    shape = [size if isinstance(size, int) else 2 for size in model.graph.inputs[0].shape]
    shape = [*shape[:3], 64] if name.startswith("pp") else shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    with torch.inference_mode():
        known = {model.graph.inputs[0].name: x}
        for block in blocks:
            assert set(block.inputs) <= set(known)
            known |= graph.run({name: known[name] for name in block.inputs}, [block.output])
        expected = graph(x)[0]
        found = graph.run({block.output: known[block.output] for block in blocks}, graph.output_names[:1])
    torch.testing.assert_close(found[graph.output_names[0]], expected)


@pytest.mark.parametrize("name", ["fashion_unet_guided", "mnist_dit_guided", "mnist_unet_attention"])
def test_blocks_of_denoisers_are_whole_residual_units(shared_data: Path, name: str) -> None:
    model = models.load(shared_data / "denoisers" / f"{name}.onnx")
    blocks = cut(model.graph)
    layers = [layer for block in blocks for layer in block.layers]
    assert sorted(layers) == sorted(layers_of(model))
    assert sum(len(block.layers) > 1 for block in blocks) >= 8
    assert max(len(block.layers) for block in blocks) <= 6
