"""tfmq-dm: temporal features are learned apart, on timesteps alone, and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_cli_errors import assert_two_lines, run
from test_temporal_features import NETWORK, SHAPES

import onnxq
from onnxq import model as models
from onnxq.arithmetic import fake_quantize
from onnxq.autograd.blocks import Block
from onnxq.config import make_settings
from onnxq.diffusion.source import open_sampler
from onnxq.diffusion.temporal_error import TemporalError, temporal_error
from onnxq.diffusion.temporal_region import find_region
from onnxq.diffusion.temporal_tables import FeatureTable, tabulate
from onnxq.errors import OnnxqError
from onnxq.formats import FORMATS
from onnxq.recipes import tfmq_dm

OPTIONS = {"steps": 10, "samples": 48, "weights": "int4", "activations": "int8"}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.onnx"
    ir.save(add_weights(NETWORK.replace("int64 t,", "int64[N] t,"), SHAPES), path)
    return path


def quantize(path: Path, **knobs: object) -> onnxq.Result:
    return onnxq.quantize(
        path, recipe="tfmq-dm", knobs={"iterations": 20, "temporal_iterations": 300} | knobs, **OPTIONS
    )


def feature_error(path: Path, result: onnxq.Result) -> TemporalError:
    """Over all steps and labels, whatever the recipe says of itself."""
    model = models.load(path)
    sampler, _ = open_sampler(model, path, make_settings({"steps": OPTIONS["steps"]}))
    region = find_region(model.graph, ["t", "y"])
    timesteps = sampler.schedule.timesteps
    exact, found = (
        tabulate(item, region.features, region.inputs, sampler.denoiser, timesteps) for item in (model, result.model)
    )
    error = temporal_error(exact, found, len(timesteps))
    assert error is not None
    return error


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: model.graph.initializers[name].const_value.numpy().copy() for name in SHAPES if name != "classes"}


def test_blocks_leave_the_temporal_weights_alone(denoiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[set[str]] = []
    for name in ("reconstruct_temporal", "reconstruct"):
        original = getattr(tfmq_dm, name)

        def watched(job, *others, original=original, **options):  # type: ignore[no-untyped-def]
            before = weights(job.model)
            found = original(job, *others, **options)
            after = weights(job.model)
            moved.append({name for name in before if not np.array_equal(before[name], after[name])})
            return found

        monkeypatch.setattr(tfmq_dm, name, watched)
    quantize(denoiser)
    assert moved == [{"w_stem", "w_embed", "w_embed2"}, {"w2"}]


def test_joint_reconstruction_keeps_features(denoiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better over all steps than nearest rounding, and than learning through the block that reads them."""
    joint, nearest = quantize(denoiser), quantize(denoiser, maintenance="frozen")
    whole = [Block("last", ("t", "x", "y"), "eps", ())]
    monkeypatch.setattr("onnxq.learning.reconstruction_knobs.cut", lambda *_, **__: whole)
    knobs = {"iterations": 300, "start": "nearest", "bias_rate": 0.0}  # as tfmq-dm starts
    through = onnxq.quantize(denoiser, recipe="brecq", knobs=knobs, **OPTIONS)
    errors = [feature_error(denoiser, result).sqnr_db for result in (joint, nearest, through)]
    assert errors[0] > errors[1] + 3 and errors[0] > errors[2] + 3
    assert joint.numbers["temporal_features"]["sqnr_db"] == pytest.approx(errors[0])
    assert joint.numbers["temporal_features"]["features"] == 2 * 10 * 3


def test_blocks_can_start_from_the_codes_of_gptq(denoiser: Path) -> None:
    """The region is learned as before; what is left gains."""
    results = {start: quantize(denoiser, start=start) for start in ("nearest", "gptq")}
    features = {start: result.numbers["temporal_features"]["sqnr_db"] for start, result in results.items()}
    assert features["gptq"] == features["nearest"]
    assert results["gptq"].numbers["sqnr_db"] > results["nearest"].numbers["sqnr_db"] + 5


def test_cached_features_are_exact(denoiser: Path) -> None:
    result = quantize(denoiser, maintenance="cache")
    left = result.model.graph.initializers
    assert {"embedding_table", "embedding2_table"} <= set(left) and not {"w_stem", "classes"} & set(left)
    exact = models.load(denoiser)
    sampler, _ = open_sampler(exact, denoiser, make_settings({"steps": OPTIONS["steps"]}))
    region = find_region(exact.graph, ["t", "y"])
    tables = tabulate(exact, region.features, region.inputs, sampler.denoiser, sampler.schedule.timesteps)
    for name, table in tables.items():
        np.testing.assert_array_equal(left[f"{name}_table"].const_value.numpy().reshape(table.rows.shape), table.rows)


@pytest.mark.parametrize(("steps", "tables"), [(10, True), (100, False)])
def test_the_smaller_of_weights_and_tables(denoiser: Path, steps: int, tables: bool) -> None:
    sizes, options = {}, {**OPTIONS, "steps": steps}
    for kind in ("reconstruct", "cache", "smaller"):
        knobs = {"maintenance": kind, "iterations": 1, "temporal_iterations": 1, "labels": False}
        sizes[kind] = models.initializer_bytes(onnxq.quantize(denoiser, recipe="tfmq-dm", knobs=knobs, **options).model)
    assert sizes["smaller"] == sizes["cache" if tables else "reconstruct"] == min(sizes.values())
    assert sizes["cache"] != sizes["reconstruct"]


def test_mismatched_features_are_counted() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    exact = {"e": FeatureTable(rows, True, ir.DataType.FLOAT)}

    def error(found: np.ndarray, steps: int) -> TemporalError:
        result = temporal_error(exact, {"e": FeatureTable(found, True, ir.DataType.FLOAT)}, steps)
        assert result is not None
        return result

    same = error(rows, 6)
    assert same.mismatches == 0 and same.features == 6 and same.sqnr_db == float("inf")
    assert error(rows[[1, 0, 2, 3, 4, 5]], 6).mismatches == 2
    assert error(2 * rows, 6).mismatches == 0  # larger, but no other step's
    assert error(rows[[0, 3, 2, 1, 4, 5]], 3).mismatches == 2  # rows 1 and 3 are two steps of the second label
    assert temporal_error(exact, {}, 6) is None


def test_inputs_at_timesteps_that_the_sampler_does_not_visit(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, recipe = tmp_path / "made.npz", ("--recipe", "tfmq-dm")
    assert run(capsys, "trajectories", denoiser, "-o", made, "--steps", "10", "-n", "8") == (0, "")
    found = run(capsys, "quantize", denoiser, "--data", made, *recipe, "--steps", "7")
    assert_two_lines(*found, "expected inputs at the 7 timesteps of the sampler", "--steps")
    with pytest.raises(OnnxqError, match="expected maintenance"):
        quantize(denoiser, maintenance="keep")


def test_a_real_denoiser(shared_data: Path) -> None:
    path = shared_data / "denoisers" / "mnist_unet_attention.onnx"
    errors = {}
    for kind in ("reconstruct", "frozen"):
        knobs = {"maintenance": kind, "iterations": 2, "temporal_iterations": 300}
        result = onnxq.quantize(path, recipe="tfmq-dm", knobs=knobs, **OPTIONS | {"samples": 20})
        errors[kind] = result.numbers["temporal_features"]
    assert errors["reconstruct"]["sqnr_db"] > errors["frozen"]["sqnr_db"] + 4
    assert errors["reconstruct"]["mismatches"] == 0


def test_finite_sets_of_scales(denoiser: Path) -> None:
    """At 6 bits: one scale for all steps loses 1.3 times as much of the features; codes are those of a scale a step."""
    errors = {}
    for finite_set in (True, False):
        knobs = {"maintenance": "frozen", "iterations": 1, "observer": "minmax", "activation_step_rate": 0.0}
        result = onnxq.quantize(
            denoiser,
            recipe="tfmq-dm",
            knobs={**knobs, "finite_set": finite_set},
            **{**OPTIONS, "weights": "int8", "activations": "int6"},
        )
        errors[finite_set] = feature_error(denoiser, result).sqnr_db
    assert errors[True] > errors[False] + 10 * np.log10(1.3)


def test_a_scale_for_each_step_is_never_worse() -> None:
    """Ranges that drift fourfold, as the paper's do: every step is rounded at least as finely, the first much more."""
    generator = np.random.default_rng(0)
    drift = np.linspace(0.25, 1, 20)
    values = generator.standard_normal((20, 4096)).astype(np.float32) * drift[:, None]
    number_format = FORMATS["int6"]
    own = (np.abs(values).max(axis=1) / number_format.high).astype(np.float32)
    zero = np.zeros(20, np.float32)
    mean_square = [
        np.mean((fake_quantize(values, scale, zero, number_format, axis=0) - values) ** 2, axis=1)
        for scale in (own, np.full_like(own, own.max()))
    ]
    assert (mean_square[0] <= 1.01 * mean_square[1]).all() and mean_square[1].mean() > 1.3 * mean_square[0].mean()
