"""Inputs without a batch axis: they are told from the others, read from data, and quantized like any."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import add_weights

import onnxq
from onnxq import OnnxqError
from onnxq import model as models
from onnxq.autograd.interpreter import TorchGraph
from onnxq.calibration import data
from onnxq.calibration.batch_axis import whole_inputs
from onnxq.runtime import Session

FLUX = {
    "hidden": ["batch", 16, 64],
    "text": ["batch", 7, 32],
    "timestep": ["batch"],
    "ids": [16, 3],
    "text_ids": [7, 3],
}
SAM = {"image": [1, 256, 64, 64], "points": [1, "n", 2], "mask": [1, 1, 256, 256], "has_mask": [1], "size": [2]}


def fixed(shapes: dict, batch: int) -> dict:
    return {name: [batch if size == "batch" else size for size in shape] for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "whole"),
    [
        ({"x": ["batch", 3, 32, 32]}, set()),
        ({"x": [2, 3, 32, 32]}, set()),
        ({"image": [3, 320, 320]}, {"image"}),
        ({"image": [3, "height", "width"]}, {"image"}),
        ({"signal": [3, 8, 4]}, set()),
        ({"x": [None, 3, 32, 32], "t": []}, {"t"}),
        ({"t": [], "x": [1, 3, 32, 32]}, {"t"}),
        (FLUX, {"ids", "text_ids"}),
        (fixed(FLUX, 2), {"ids", "text_ids"}),
        (SAM, {"size"}),
        ({"input_ids": ["b", "s"], "mask": ["b", "past+s"], "cache_position": ["s"]}, {"cache_position"}),
        ({"input_ids": ["texts", 77], "pixels": ["images", 3, 64, 64]}, set()),
        ({"input_ids": ["s0", "s1"], "attention_mask": ["s0", "s1"]}, set()),
        ({"x": ["batch", 3, 8, 8], "class": [1]}, set()),
    ],
)  # fmt: skip
def test_inputs_without_batch_are_told(shapes: dict, whole: set[str]) -> None:
    values = [ir.Value(name=name, shape=ir.Shape(shape)) for name, shape in shapes.items()]
    assert whole_inputs(values) == whole


TOKENS = """
<ir_version: 10, opset_import: ["" : 21]>
tokens (float t, float[BATCH,16,32] x, float[16,3] ids) => (float[BATCH,16,32] y)
{
    [first] a = MatMul (x, w1)
    [place] p = MatMul (ids, w2)
    [join] b = Add (a, p)
    [time] c = Mul (b, t)
    [act] d = Gelu (c)
    [second] y = MatMul (d, w3)
}
"""


@pytest.fixture(params=["N", "2"], ids=["free batch", "batch of two"])
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shapes = {"w1": (32, 64), "w2": (3, 64), "w3": (64, 32)}
    return models.save(add_weights(TOKENS.replace("BATCH", request.param), shapes), tmp_path / "m.onnx")


def samples(count: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 16, 32)).astype(np.float32)
    ids = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(16, 2).astype(np.float32)
    return {"x": x, "t": np.linspace(0.5, 1, count).astype(np.float32), "ids": np.pad(ids, ((0, 0), (1, 0)))}


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_a_file_gives_them_once_or_for_each_sample(tokens: Path, target: str, tmp_path: Path) -> None:
    once, each, result = tmp_path / "once.npz", tmp_path / "each.npz", tmp_path / "q.onnx"
    arrays = samples(6)
    np.savez(once, **arrays)
    np.savez(each, **arrays | {"ids": np.repeat(arrays["ids"][None], 6, axis=0)})
    found = [onnxq.quantize(tokens, path, target=target, output=result) for path in (once, each)]
    assert found[0].numbers["samples"] in (6, 12)  # a batch of two is filled, for every sample has a time of its own
    assert found[0].numbers["sqnr_db"] == found[1].numbers["sqnr_db"] > 25
    assert ir.to_proto(found[0].model).SerializeToString() == ir.to_proto(found[1].model).SerializeToString()
    assert onnxq.compare(tokens, result, once, latency=False).sqnr_db > 25


def test_batches_of_python_hold_them_as_they_are(tokens: Path) -> None:
    arrays = samples(2)
    batches = [arrays | {"t": np.float32(1)}, arrays | {"t": np.float32(0.5)}]
    assert onnxq.quantize(tokens, batches).numbers["samples"] == 4


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
@pytest.mark.parametrize("recipe", ["gptq", "adaround", "brecq"])
def test_recipes_learn_beside_what_is_the_same_for_all_samples(tokens: Path, recipe: str, target: str) -> None:
    arrays = samples(8) | {"t": np.float32(0.5)}
    rows = [arrays | {"x": arrays["x"][index : index + 2]} for index in range(0, 8, 2)]
    settings = {"target": target, "weights": "int4", "activations": "int8", "samples": 7}  # no whole batches of two
    knobs = {} if recipe == "gptq" else {"iterations": 20}
    nearest = onnxq.quantize(tokens, rows, **settings).numbers
    learned = onnxq.quantize(tokens, rows, recipe=recipe, knobs=knobs, **settings).numbers
    assert learned["quantized_nodes"] == nearest["quantized_nodes"] == (3 if target == "cpu" else 2)
    assert learned["sqnr_db"] > nearest["sqnr_db"]


@pytest.mark.parametrize("recipe", ["gptq", "adaround", "brecq", "lsq"])
def test_recipes_learn_beside_what_each_sample_has_of_its_own(tokens: Path, recipe: str, tmp_path: Path) -> None:
    """As well as where it has a batch axis."""
    rows = add_weights(
        TOKENS.replace("float t,", "float[N,1,1] t,").replace("BATCH", "N"),
        {"w1": (32, 64), "w2": (3, 64), "w3": (64, 32)},
    )
    arrays, found = samples(8), []
    knobs = {"gptq": {}, "lsq": {"steps": 20}}.get(recipe, {"iterations": 20})
    settings = {"weights": "int4", "activations": "int8", "recipe": recipe, "knobs": knobs}
    for model, time in ((tokens, arrays["t"]), (models.save(rows, tmp_path / "rows.onnx"), arrays["t"][:, None, None])):
        file, output = tmp_path / "data.npz", tmp_path / "q.onnx"
        np.savez(file, **arrays | {"t": time})
        assert onnxq.quantize(model, file, output=output, **settings).numbers["quantized_nodes"] == 2
        found.append(onnxq.compare(model, output, file, latency=False).sqnr_db)
    assert abs(found[0] - found[1]) < 0.3 and min(found) > 18, found


def test_torch_runs_samples_one_by_one(tokens: Path) -> None:
    arrays = {name: torch.from_numpy(array) for name, array in samples(3).items()}
    graph = TorchGraph(models.load(tokens))
    graph.shared = {"ids", "p"}
    weight = graph.trainable(["w3"])[0]
    found = graph.run(arrays, ["p", "b", "y"])
    gradient = torch.autograd.grad(found["y"].square().sum(), weight)[0]
    session = Session(models.load(tokens))
    rows = data.fixed_batch(data.input_specs(models.load(tokens))) or 1
    for index in range(3):
        feed = {"x": np.repeat(arrays["x"][index : index + 1].numpy(), rows, axis=0), "t": arrays["t"][index].numpy()}
        expected = session.run(feed | {"ids": arrays["ids"].numpy()}, ["y"])[0]
        torch.testing.assert_close(
            found["y"][index * rows : (index + 1) * rows].detach(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5
        )
    later = graph.run({name: found[name].detach() for name in ("b", "p")} | {"t": arrays["t"]}, ["y"])["y"]
    torch.testing.assert_close(later, found["y"])
    torch.testing.assert_close(torch.autograd.grad(later.square().sum(), weight)[0], gradient)


def test_a_whole_of_another_shape_is_refused(tokens: Path, tmp_path: Path) -> None:
    arrays = samples(4)
    np.savez(tmp_path / "d.npz", **arrays | {"ids": arrays["ids"][:, :2]})
    with pytest.raises(
        OnnxqError, match=r"expected shape \[samples, 16, 3\] for input 'ids', found \[samples, 16, 2\]"
    ):
        onnxq.quantize(tokens, tmp_path / "d.npz")


def test_a_fixed_batch_is_filled_where_the_whole_changes() -> None:
    specs = [
        data.InputSpec("t", np.dtype(np.float32), (), is_whole=True),
        data.InputSpec("x", np.dtype(np.float32), (2, 1)),
    ]
    source = data.Iterables(
        [{"t": np.float32(time), "x": np.full((1, 1), time, np.float32)} for time in (0, 0, 0, 1)], specs
    )
    found = [(float(batch["t"]), batch["x"][:, 0].tolist()) for batch in data.batches(source, specs)]
    assert found == [(0, [0, 0]), (0, [0, 0]), (1, [1, 1])]


def test_a_single_picture_is_quantized(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    detector (float[3,32,32] image) => (float[32,32,32] y)
    <int64[1] zero = {0}>
    {
        [batch] x = Unsqueeze (image, zero)
        [c1] a = Conv <pads=[1,1,1,1]> (x, w1)
        [r] b = Relu (a)
        [c2] c = Conv <pads=[1,1,1,1]> (b, w2)
        [out] y = Squeeze (c, zero)
    }
    """
    path = models.save(add_weights(text, {"w1": (32, 3, 3, 3), "w2": (32, 32, 3, 3)}), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", image=np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32))
    for source in (tmp_path / "d.npz", None):
        numbers = onnxq.quantize(path, source, target="cpu").numbers
        assert numbers["sqnr_db"] > 25
        assert numbers["quantized_nodes"] == 2
    assert onnxq.quantize(path, tmp_path / "d.npz").numbers["samples"] == 5
