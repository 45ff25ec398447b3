"""The part of a denoiser that depends on the timestep alone: what it is, and its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

from onnxq import graph as graphs
from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.source import open_sampler
from onnxq.diffusion.temporal_region import find_region
from onnxq.errors import OnnxqError
from onnxq.passes.cache_temporal_features import CacheTemporalFeatures
from onnxq.runtime import Session

# One timestep for the whole batch, repeated by the sample's shape, as diffusers' UNets do it; two embeddings, labels.
NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
denoiser (float[N,1,4,4] x, int64 t, int64[N] y) => (float[N,1,4,4] eps)
<float rate = {0.01}, int64[1] zero = {0}, int64[1] one = {1}, int64[2] places = {2, 3}>
{
    [shape] size = Shape (x)
    [batch] rows = Slice (size, zero, one)
    [cast] number = Cast <to=1> (t)
    [repeat] numbers = Expand (number, rows)
    [rate] angle = Mul (numbers, rate)
    [wave] wave = Sin (angle)
    [column] waves = Unsqueeze (wave, one)
    [lift] lifted = Gemm (waves, w_lift)
    [stem] stem = Gemm (lifted, w_stem)
    [gate] gate = Sigmoid (stem)
    [silu] silu = Mul (stem, gate)
    [embed] e1 = Gemm (silu, w_embed)
    [place] embedding = Unsqueeze (e1, places)
    [label] label = Gather (classes, y)
    [sum] known = Add (silu, label)
    [embed2] e2 = Gemm (known, w_embed2)
    [place2] embedding2 = Unsqueeze (e2, places)
    [first] h1 = Conv <pads=[1,1,1,1]> (x, w1)
    [time] h2 = Add (h1, embedding)
    [relu] a2 = Relu (h2)
    [middle] h3 = Conv <pads=[1,1,1,1]> (a2, w2)
    [time2] h4 = Add (h3, embedding2)
    [relu2] a4 = Relu (h4)
    [last] eps = Conv <pads=[1,1,1,1]> (a4, w3)
}
"""
SHAPES = {
    "w_lift": (1, 64), "w_stem": (64, 64), "w_embed": (64, 32), "classes": (3, 64), "w_embed2": (64, 32),
    "w1": (32, 1, 3, 3), "w2": (32, 32, 3, 3), "w3": (1, 32, 3, 3),
}  # fmt: skip
TIMESTEPS = [900, 600, 300, 0]


@pytest.fixture
def model() -> ir.Model:
    return add_weights(NETWORK, SHAPES)


def feed(count: int, timestep: int, labels: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((count, 1, 4, 4)).astype(np.float32)
    return {"x": x, "t": np.asarray(timestep), "y": np.full(count, labels)}


def names(nodes: tuple[ir.Node, ...]) -> set[str]:
    return {node.name or "" for node in nodes}


def test_the_region_is_what_the_timestep_reaches_and_the_sample_does_not(model: ir.Model) -> None:
    alone = find_region(model.graph, ["t"])
    assert names(alone.nodes) == {
        "cast", "repeat", "rate", "wave", "column", "lift", "stem", "gate", "silu", "embed", "place",
    }  # fmt: skip
    assert [value.name for value in alone.frontier] == ["silu", "embedding"] and alone.layers == [
        "lift",
        "stem",
        "embed",
    ]
    labelled = find_region(model.graph, ["t", "y"])
    assert names(labelled.nodes) - names(alone.nodes) == {"label", "sum", "embed2", "place2"}
    assert [value.name for value in labelled.frontier] == ["embedding", "embedding2"]


def test_random_numbers_are_not_temporal(model: ir.Model) -> None:
    noisy = add_weights(NETWORK.replace("Sigmoid (stem)", "RandomNormalLike (stem)"), SHAPES)
    assert [value.name for value in find_region(noisy.graph, ["t"]).frontier] == ["stem"]


@pytest.mark.parametrize("labels", [False, True])
def test_the_function_is_kept_at_scheduled_timesteps(model: ir.Model, labels: bool) -> None:
    exact = Session(model)
    cache = CacheTemporalFeatures(denoisers.find(model), TIMESTEPS, labels=labels)
    assert cache(model).modified
    assert cache.cached == (["embedding", "embedding2"] if labels else ["silu", "embedding"])
    left = {value.name for value in model.graph.initializers.values()}
    assert "w_stem" not in left and ("classes" in left) is not labels
    cached = Session(model)
    for timestep in TIMESTEPS:
        for count, label in ((1, 0), (3, 2)):
            given = feed(count, timestep, label)
            np.testing.assert_allclose(cached.run(given)[0], exact.run(given)[0], rtol=1e-5, atol=1e-6)
    assert not CacheTemporalFeatures(denoisers.find(model), TIMESTEPS, labels=labels)(model).modified


def test_a_label_that_there_is_not_is_an_error(model: ir.Model) -> None:
    """A row of the next step would be silently wrong."""
    CacheTemporalFeatures(denoisers.find(model), TIMESTEPS, labels=True)(model)
    with pytest.raises(OnnxqError):
        Session(model).run(feed(2, 900, labels=3))


def test_other_timesteps_get_the_nearest_row(model: ir.Model) -> None:
    CacheTemporalFeatures(denoisers.find(model), TIMESTEPS)(model)
    cached = Session(model)
    for other, scheduled in ((999, 900), (760, 900), (740, 600), (120, 0)):
        np.testing.assert_array_equal(cached.run(feed(2, other))[0], cached.run(feed(2, scheduled))[0])
    assert models.get_metadata(model)["temporal_timesteps"] == "[900, 600, 300, 0]"


def test_half_precision_tables(model: ir.Model) -> None:
    exact, small = Session(model), model.clone()
    CacheTemporalFeatures(denoisers.find(model), TIMESTEPS, dtype=ir.DataType.FLOAT16)(small)
    halved = Session(small, taps=["embedding_cached"])
    wanted, found = (session.run(feed(2, 300))[0] for session in (exact, halved))
    assert 0 < np.abs(wanted - found).max() <= 1e-3 * np.abs(wanted).max()


def test_tables_that_are_larger_than_the_weights_are_not_made(model: ir.Model) -> None:
    """Sixty-four steps of a feature against 64 weights for each channel, which int8 makes a quarter as large."""
    denoiser, steps = denoisers.find(model), [*range(0, 960, 15)]
    before = models.initializer_bytes(model)
    quarter = CacheTemporalFeatures(denoiser, steps, bytes_per_weight=1)
    assert not quarter(model.clone()).modified and not quarter.cached
    smaller = model.clone()
    some = CacheTemporalFeatures(denoiser, [*range(0, 960, 20)], labels=True)  # 48 steps, but 144 with labels
    assert some(smaller).modified and some.cached == ["silu", "embedding"]
    assert models.initializer_bytes(smaller) < before
    larger = model.clone()
    assert CacheTemporalFeatures(denoiser, steps, everything=True, bytes_per_weight=1)(larger).modified
    assert models.initializer_bytes(larger) > before


@pytest.mark.parametrize("name", ["mnist_unet_attention", "mnist_unet_layernorm"])
def test_real_denoisers(shared_data: Path, name: str) -> None:
    """Sines or a table: an embedding for each residual block, its weights gone, the prediction the same."""
    path = shared_data / "denoisers" / f"{name}.onnx"
    model = models.load(path)
    sampler, _ = open_sampler(model, path, make_settings({"steps": 20}))
    region = find_region(model.graph, ["t"])
    sample = next(value for value in model.graph.inputs if value.name == "x")
    reached = {sample}
    for node in model.graph:
        if reached.intersection(value for value in node.inputs if value is not None):
            assert node not in region.nodes
            reached.update(node.outputs)
    assert all(graphs.is_op(reader, "Add") for value in region.frontier for reader, _ in graphs.consumers(value))
    exact = Session(model)
    layers, before = set(region.layers), models.initializer_bytes(model)
    cache = CacheTemporalFeatures(sampler.denoiser, sampler.schedule.timesteps)
    assert cache(model).modified and len(cache.cached) == len(region.frontier) >= 7
    assert models.initializer_bytes(model) < 0.95 * before and not layers & {node.name for node in model.graph}
    cached = Session(model)
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    for timestep in sampler.schedule.timesteps:
        given = {"x": x, "t": np.full(2, timestep, np.int64)}
        wanted, found = exact.run(given)[0], cached.run(given)[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
