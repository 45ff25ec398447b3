"""Our composition for denoisers: no worse than the papers' recipes alone, every part can be turned off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_denoiser_recipes import NETWORK, SHAPES, held_out_error

import onnxq
from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq import model as models
from onnxq.diffusion import subgraphs
from onnxq.diffusion.router import Router
from onnxq.errors import OnnxqError
from onnxq.recipes import diffusion
from onnxq.runtime import Session
from onnxq.value_sizes import elements_of

OPTIONS = {"steps": 8, "weights": "int4", "activations": "int8", "exclude": ["first", "last"]}
KNOBS = {"trajectories": 8, "kept_steps": 8, "iterations": 300}
ALL_LAYERS = {"step_floor_db": 0.0, "image_gain_db": 0.0}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.onnx"
    ir.save(add_weights(NETWORK, SHAPES), path)
    return path


def test_better_than_one_paper_at_the_same_cost(denoiser: Path) -> None:
    """The same layers, formats, inputs and steps of Adam."""
    whole = onnxq.quantize(denoiser, recipe="diffusion", knobs=KNOBS | ALL_LAYERS, **OPTIONS)
    single = onnxq.quantize(denoiser, recipe="q-diffusion", knobs=KNOBS, **OPTIONS)
    assert whole.numbers["quantized_nodes"] >= single.numbers["quantized_nodes"] - 1  # time's layer is a table
    assert held_out_error(denoiser, whole) < held_out_error(denoiser, single)


def test_each_part_can_be_turned_off(denoiser: Path) -> None:
    plain = {"cache": False, "split": "none", "shift": False, "correct": False, "iterations": 10} | ALL_LAYERS
    result = onnxq.quantize(denoiser, recipe="diffusion", knobs=KNOBS | plain, **OPTIONS)
    names = [node.name for node in result.model.graph]
    assert "embed" in names and not any("_to_symmetric" in (name or "") or "_part1" in (name or "") for name in names)
    assert "noise_correction" not in models.get_metadata(result.model)
    parts = {"split_gain_db": -100.0, "correct": True, "iterations": 10} | ALL_LAYERS
    result = onnxq.quantize(denoiser, recipe="diffusion", knobs=KNOBS | parts, **OPTIONS)
    names = [node.name for node in result.model.graph]
    assert any("_to_symmetric" in (name or "") for name in names) and "join_part1" in names
    assert any(graphs.is_op(node, "Gather") for node in result.model.graph)
    assert "noise_correction" in models.get_metadata(result.model)


@pytest.mark.parametrize(("weights", "gain_db"), [("int4", 0.1), ("int4", 0.0), ("int8", 0.1)])
def test_layers_that_make_most_of_the_error_keep_eight_bits(denoiser: Path, weights: str, gain_db: float) -> None:
    knobs = KNOBS | ALL_LAYERS | {"wide_gain_db": gain_db, "iterations": 2, "split": "none"}
    result = onnxq.quantize(denoiser, recipe="diffusion", knobs=knobs, **OPTIONS | {"weights": weights})
    wide = result.numbers.get("wide_layers", [])
    assert bool(wide) == (weights == "int4" and gain_db > 0)
    assert any("of the weights) keep 8 bits" in warning for warning in result.numbers["warnings"]) == bool(wide)
    layers = [item for item in layer_nodes.weighted_nodes(result.model.graph) if graphs.is_dequantized(item.weight)]
    codes = {item.node.name: item.weight.producer().inputs[0].const_value.numpy() for item in layers}
    of_eight = {name for name, array in codes.items() if np.abs(array.astype(int)).max() > 8}
    assert of_eight == (codes.keys() if weights == "int8" else set(wide))
    if wide:
        total = sum(elements_of(item.weight) for item in layer_nodes.weighted_nodes(result.model.graph))
        assert result.numbers["wide_share"] == pytest.approx(sum(codes[name].size for name in wide) / total)


def test_scales_by_step_join_the_rest(denoiser: Path) -> None:
    """What is shifted keeps one scale; the others move, and nothing else of the recipe changes."""
    parts = {"groups": 4, "least_gain_db": 0.0, "iterations": 50} | ALL_LAYERS
    errors = []
    for groups in (1, 4):
        result = onnxq.quantize(denoiser, recipe="diffusion", knobs=KNOBS | parts | {"groups": groups}, **OPTIONS)
        errors.append(held_out_error(denoiser, result))
        assert ("time_scales" in result.numbers) == (groups > 1)
    moving = result.numbers["time_scales"]
    assert 0 < moving["moving"] <= moving["values"] < result.numbers["quantized_nodes"]
    assert errors[1] < 1.1 * errors[0]


def test_the_first_steps_can_run_the_float_network(denoiser: Path, tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    knobs = KNOBS | {"float_steps": 2, "iterations": 10}
    onnxq.quantize(denoiser, output=output, recipe="diffusion", knobs=knobs, **OPTIONS)
    router = Router(tmp_path / "quantized.groups.json")
    assert [int((router.groups == number).sum()) for number in (0, 1)] == [2, 6]
    exact, quantized = Session(denoiser), Session(output)
    x = np.random.default_rng(0).standard_normal((2, *[size or 1 for size in router.denoiser.sample.shape[1:]]))
    for step, time in enumerate(router.timesteps):
        conditions = {item.spec.name: np.zeros(2, item.spec.dtype) for item in router.denoiser.conditions}
        found = router.predict(x.astype(np.float32), time, **conditions)
        feed = {
            router.denoiser.sample.name: x.astype(np.float32),
            router.denoiser.timestep.name: router.denoiser.timesteps(time, 2),
            **conditions,
        }
        np.testing.assert_allclose(found, (exact if step < 2 else quantized).run(feed)[0], rtol=1e-5, atol=1e-6)
    assert np.abs(exact.run(feed)[0] - quantized.run(feed)[0]).max() > 1e-3
    for wrong in (-1, 8):
        with pytest.raises(OnnxqError, match="float_steps between 0 and 7"):
            onnxq.quantize(denoiser, recipe="diffusion", knobs=KNOBS | {"float_steps": wrong}, **OPTIONS)


@pytest.mark.parametrize("outside", [True, False])
def test_a_large_float_network_has_its_weights_in_a_file(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: bool
) -> None:
    """Where it would be long to read, or where its weights lay in a file before."""
    source = tmp_path / "source" / "denoiser.onnx"
    source.parent.mkdir()
    models.save(models.load(denoiser), source, external_data=outside)
    if not outside:
        monkeypatch.setattr(subgraphs, "INLINE_BYTES", 1000)
    output = tmp_path / "quantized.onnx"
    knobs = KNOBS | {"float_steps": 2, "iterations": 1, "start": "nearest"}
    onnxq.quantize(source, output=output, recipe="diffusion", knobs=knobs, **OPTIONS)
    assert (tmp_path / "quantized.group0.onnx.data").stat().st_size > 30000
    for file in source.parent.iterdir():
        file.unlink()
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    feed = {"x": x, "t": np.full(2, 999)}
    found = Session(tmp_path / "quantized.group0.onnx").run(feed)[0]
    np.testing.assert_allclose(found, Session(denoiser).run(feed)[0], rtol=1e-5, atol=1e-6)


def test_the_float_network_is_kept_open_only_where_it_is_asked(denoiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(diffusion, "Session", lambda *given, **options: opened.append(1) or Session(*given, **options))
    for correct in (False, True):
        knobs = KNOBS | ALL_LAYERS | {"correct": correct, "iterations": 1, "start": "nearest"}
        onnxq.quantize(denoiser, recipe="diffusion", knobs=knobs, **OPTIONS)
        assert len(opened) == correct
    opened.clear()
    knobs |= {"correct": False, "selection": "uniform"}  # nothing has measured what errors do to images
    for weights, opens in (("int8", 0), ("int4", 1)):
        onnxq.quantize(denoiser, recipe="diffusion", knobs=knobs, **OPTIONS | {"weights": weights})
        assert len(opened) == opens


def test_the_same_seed_gives_the_same_bytes(denoiser: Path) -> None:
    knobs = KNOBS | {"iterations": 5, "correct": True}
    first, second = (onnxq.quantize(denoiser, recipe="diffusion", knobs=knobs, **OPTIONS).model for _ in range(2))
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()


def test_fewer_bits_keep_no_more_layers_in_float(denoiser: Path) -> None:
    """Which layers a step needs in float is found with 8 bits: what fewer lose is learned."""
    kept = {}
    for weights in ("int8", "int2"):
        options = OPTIONS | {"weights": weights}
        result = onnxq.quantize(denoiser, recipe="diffusion", knobs=KNOBS | {"iterations": 2}, **options)
        kept[weights] = result.numbers["quantized_nodes"]
    assert kept["int8"] == kept["int2"]


def test_what_is_no_denoiser(network: Path, calibration: Path) -> None:
    with pytest.raises(OnnxqError) as caught:
        onnxq.quantize(network, calibration, recipe="diffusion")
    assert caught.value.hint and len(str(caught.value).splitlines()) == 1


def test_the_float_function_is_kept_before_anything_is_rounded(denoiser: Path) -> None:
    """Tables, splits and shifts with formats of 16 bits: next to nothing is lost."""
    options = OPTIONS | {"weights": "int8", "activations": "int16", "target": "cpu"}
    result = onnxq.quantize(denoiser, recipe="diffusion", knobs=KNOBS | {"split_gain_db": -100.0}, **options)
    assert result.numbers["sqnr_db"] > 30 and np.isfinite(result.numbers["sqnr_db"])
