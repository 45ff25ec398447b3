"""What torch's two exporters write at old and new opsets ends in int8 for either target."""

from __future__ import annotations

from pathlib import Path

import pytest

import onnxq
from onnxq import model as models
from onnxq.runtime import optimized_nodes

torch = pytest.importorskip("torch", reason="exporting needs torch: pip install 'onnxq[learn]'")

from torch_networks import NETWORKS, export  # noqa: E402

LEAST_DB = 20  # random weights; a layer that is placed or scaled wrongly is far below


@pytest.mark.parametrize(
    ("name", "exporter", "opset"),
    [
        *(
            (name, exporter, opset)
            for name in ("resnet", "vit", "unet", "gpt")
            for exporter, opset in (("torchscript", 14), ("dynamo", 20))
        ),
        ("vit", "dynamo", 23),
    ],
)
def test_exports_of_any_opset_are_quantized(name: str, exporter: str, opset: int, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    export(name, exporter, path, opset=opset)
    assert models.read(path).graph.opset_imports[""] == opset
    feed = {f"input{index}": tensor.numpy() for index, tensor in enumerate(NETWORKS[name][1](16))}
    for target in ("tensorrt", "cpu"):
        numbers = onnxq.quantize(path, [feed], target=target).numbers
        assert numbers["quantized_nodes"] > 0
        assert numbers["sqnr_db"] > LEAST_DB
        assert not {key for key, reason in numbers["left_float"].items() if "unknown" in reason}


@pytest.mark.parametrize("dynamic", [True, False], ids=["free", "fixed"])
@pytest.mark.parametrize("name", ["vit", "gpt", "dit"])
def test_every_layer_of_a_transformer_has_an_integer_kernel(name: str, dynamic: bool, tmp_path: Path) -> None:
    path, batch = tmp_path / "network.onnx", 2
    export(name, "dynamo", path, dynamic=dynamic)
    feed = {f"input{index}": tensor.numpy() for index, tensor in enumerate(NETWORKS[name][1](batch))}
    result = onnxq.quantize(path, [feed], target="cpu")
    nodes = optimized_nodes(result.model)
    integer = sum(count for op, count in nodes.items() if op.startswith(("QLinearConv", "QGemm", "MatMulInteger")))
    assert integer == result.numbers["quantized_nodes"] > 0
