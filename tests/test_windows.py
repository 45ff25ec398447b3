"""Windows of maps: what a block makes of one is what it makes of the whole map, and blocks learn on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import MODELS, add_weights

import onnxq
from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import TorchGraph
from onnxq.learning.cache import ActivationCache
from onnxq.learning.walk import inside
from onnxq.learning.windows import windows_of

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
SHAPES = {"w1": (8, 4, 1, 1), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (4, 8, 1, 1), "slope": (8, 1, 1)}
BLOCKS = {
    "residual": """c = Conv (x, w1, b1) a = PRelu (c, slope) d = Conv <pads=[1,1,1,1], group=8> (a, w2, b2)
        r = Relu (d) e = Conv (r, w3) y = Add (e, x)""",
    "strided": """c = Conv <pads=[0,0,0,0]> (x, w1, b1) d = Conv <pads=[1,1,1,1], strides=[2,2], group=8> (c, w2, b2)
        r = Relu (d) m = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (r) y = Conv (m, w3)""",
    "padded at the end": """c = Conv (x, w1, b1) d = Conv <pads=[0,0,1,1], strides=[2,2], group=8> (c, w2, b2)
        y = Conv <kernel_shape=[1,1]> (d, w3)""",
    "dilated": """c = Conv (x, w1, b1) d = Conv <pads=[2,2,2,2], dilations=[2,2], group=8> (c, w2, b2)
        y = Conv (d, w3)""",
}  # fmt: skip
WHOLE = {
    "a gate": "p = GlobalAveragePool (x) y = Mul (x, p)",
    "no padding": "c = Conv (x, w1, b1) d = Conv <group=8> (c, w2, b2) y = Conv (d, w3)",
    "padding by name": 'c = Conv (x, w1, b1) y = Conv <auto_pad="SAME_UPPER", group=8> (c, w2, b2)',
    "a constant that differs from place to place": "y = Add (x, everywhere)",
}


def parts(body: str) -> tuple[ir.Model, Block, set[str]]:
    shapes = {name: shape for name, shape in (SHAPES | {"everywhere": (1, 1, 32, 32)}).items() if name in body}
    model = add_weights(f"{HEAD}\nblock (float[N,4,32,32] x) => (float[N,C,H,W] y) {{ {body} }}", shapes)
    block = Block("last", ("x",), "y", ())
    return model, block, inside(TorchGraph(model), block)


@pytest.mark.parametrize("body", BLOCKS.values(), ids=BLOCKS)
def test_windows_give_what_the_whole_map_gives(body: str) -> None:
    model, block, names = parts(body)
    graph = TorchGraph(model)
    windows = windows_of(model.graph, block, names, {"x": (2, 4, 32, 32)}, 12)
    assert windows is not None
    x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = graph.run({"x": x}, ["y"])["y"]
    choice, starts = np.random.default_rng(0), set()
    for _ in range(60):
        window = windows.draw(choice)
        starts.add(window.starts)
        found = window.exact(graph.run({"x": x[..., window.read[0], window.read[1]]}, ["y"])["y"])
        expected = whole[..., window.expected[0], window.expected[1]]
        assert found.shape == expected.shape and min(found.shape[2:]) >= 3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(starts) > 20


@pytest.mark.parametrize("body", WHOLE.values(), ids=WHOLE)
def test_blocks_that_need_whole_maps_get_no_windows(body: str) -> None:
    model, block, names = parts(body)
    assert windows_of(model.graph, block, names, {"x": (2, 4, 32, 32)}, 12) is None


def test_maps_hardly_larger_than_a_window_stay_whole() -> None:
    model, block, names = parts(BLOCKS["residual"])
    assert windows_of(model.graph, block, names, {"x": (2, 4, 32, 32)}, 24) is None


@pytest.mark.parametrize("memory_bytes", [1 << 20, 0])
def test_a_cache_gives_areas_from_memory_and_from_files(memory_bytes: int, tmp_path: Path) -> None:
    values = torch.arange(3 * 2 * 5 * 6, dtype=torch.float32).reshape(3, 2, 5, 6)
    with ActivationCache(memory_bytes, str(tmp_path)) as cache:
        cache.allocate("a", (3, 2, 5, 6), torch.float32)
        cache.write("a", slice(0, 3), values)
        found = cache.rows("a", np.array([0, 2]), (slice(1, 4), slice(2, 6)))
    torch.testing.assert_close(found, values[[0, 2]][..., 1:4, 2:6], rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["adaround", "qdrop"])
def test_blocks_learn_on_windows(recipe: str) -> None:
    """Better than nearest rounding, and other bytes than on whole maps."""
    data = MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz"
    options = {"weights": "int4", "activations": "int8", "samples": 32}
    nearest = onnxq.quantize(*data, knobs={"weight_ranges": "mse", "observer": "mse"}, **options)
    knobs = {"iterations": 40, "batch": 8, "samples": 32, "start": "nearest"}
    found = {side: onnxq.quantize(*data, recipe=recipe, knobs=knobs | {"window": side}, **options) for side in (0, 14)}
    assert found[14].numbers["sqnr_db"] > nearest.numbers["sqnr_db"] + 1
    assert found[14].numbers["sqnr_db"] != found[0].numbers["sqnr_db"]
