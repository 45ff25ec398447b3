"""What networks are told of the time: by their graphs, by their class, by a pipeline's folder, as pipelines do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from test_cli_errors import assert_two_lines, run

from onnxq import OnnxqError
from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.diffusers_schedule import Diffusers
from onnxq.diffusion.flow_matching import FlowMatching
from onnxq.diffusion.flow_sigmas import given_sigmas
from onnxq.diffusion.network_time import conventions, wave_rate
from onnxq.diffusion.schedule import open_schedule
from onnxq.diffusion.schedule_entries import empirical_mu
from onnxq.diffusion.source import open_sampler

pytest.importorskip("diffusers")

# Waves of time as transformers of diffusers make them; FACTOR is 1000 in those that are told a part of 1.
WAVES = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[N,SIZE] hidden_states, TYPE[N] timestep) => (float[N,SIZE] v)
<float factor = {FACTOR}, float[2] rates = {1.0, 0.01}, int64[1] last = {1}, int64[2] axes = {1, 2}>
{
    time = Cast <to=1> (timestep)
    scaled = Mul (time, factor)
    column = Unsqueeze (scaled, last)
    angles = Mul (column, rates)
    waves = Sin (angles)
    mean = ReduceMean <keepdims=0> (waves, last)
    spread = Unsqueeze (mean, axes)
    v = Add (hidden_states, spread)
}
"""


def network(kind: str = "float", factor: float = 1000.0, size: str = "64,16") -> ir.Model:
    text = WAVES.replace("SIZE", size).replace("TYPE", kind).replace("FACTOR", str(factor))
    if size.count(",") == 2:
        text = text.replace("int64[2] axes = {1, 2}", "int64[3] axes = {1, 2, 3}")
    return ir.from_onnx_text(text)


def told(model: ir.Model, config: dict[str, Any], steps: int, path: Path | None = None) -> list[float]:
    denoiser = denoisers.find(model)
    return open_schedule(conventions(path, wave_rate(model, denoiser)) | config, denoiser, steps).timesteps


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize(("factor", "rate"), [(1.0, 1.0), (1000.0, 1000.0)])
def test_the_fastest_wave_is_found(factor: float, rate: float) -> None:
    model = network(factor=factor)
    assert wave_rate(model, denoisers.find(model)) == pytest.approx(rate)


# Numbers are what diffusers' pipelines told their networks (tests/benchmarks/pipelines.py), on samples of 64 tokens.
@pytest.mark.parametrize(
    ("kind", "factor", "config", "wanted"),
    [
        ("float", 1000.0, FLOW | {"use_dynamic_shifting": True}, [1, 0.8886, 0.7615, 0.6148, 0.4438, 0.242]),  # dev
        ("float", 1000.0, FLOW | {"shift": 1.0}, [1, 0.8333, 0.6667, 0.5, 0.3333, 0.1667]),  # FLUX schnell
        ("float", 1.0, FLOW | {"shift": 3.0}, [1000, 923.3, 818.9, 668.3, 432.2, 8.929]),  # Stable Diffusion 3
        (
            "int64", 1.0,
            {
                "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
                "use_flow_sigmas": True, "flow_shift": 3.0,
            },
            [999, 937, 857, 750, 600, 376],
        ),  # Wan
        (
            "int64", 1.0,
            {
                "_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
                "use_flow_sigmas": True, "flow_shift": 3.0,
            },
            [999, 937, 856, 749, 599, 374],
        ),  # Sana
    ],
)  # fmt: skip
def test_networks_are_told_what_pipelines_tell_them(
    kind: str, factor: float, config: dict[str, Any], wanted: list[float]
) -> None:
    np.testing.assert_allclose(told(network(kind, factor), config, 6), wanted, rtol=2e-4)


def test_the_class_in_config_json_goes_before_the_graph(tmp_path: Path) -> None:
    """AuraFlow has fast waves, as FLUX, but not its even sigmas; LTX has slow ones, and even sigmas."""
    path = tmp_path / "model.onnx"
    (tmp_path / "config.json").write_text('{"_class_name": "AuraFlowTransformer2DModel"}')
    found = told(network(), FLOW | {"shift": 1.73}, 6, path)
    np.testing.assert_allclose(found, [1, 0.874, 0.7224, 0.5367, 0.3037, 0.002987], rtol=2e-4)
    (tmp_path / "config.json").write_text('{"_class_name": "LTXVideoTransformer3DModel"}')
    config = FLOW | {
        "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
        "max_image_seq_len": 4096, "shift_terminal": 0.1,
    }  # fmt: skip
    found = told(network(factor=1.0, size="32,4"), config, 6, path)
    np.testing.assert_allclose(found, [1000, 878.1, 734.9, 564, 356.7, 100], rtol=5e-3)
    for text in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_text(text)
        assert conventions(path, 1000.0) == {"network_time": "noise", "sigmas": "even"}


# What the pipelines told them (tests/benchmarks/pipelines.py), on samples of 64 tokens.
@pytest.mark.parametrize(
    ("kind", "factor", "config", "wanted"),
    [
        ("HunyuanImageTransformer2DModel", 1.0, {"shift": 5.0}, [1000, 961.5, 909.1, 833.3, 714.3, 500]),
        ("HunyuanVideo15Transformer3DModel", 1.0, {"shift": 7.0}, [1000, 972.2, 933.3, 875, 777.8, 583.3]),
        ("MotifVideoTransformer3DModel", 1.0, {"shift": 15.0}, [1000, 986.8, 967.7, 937.5, 882.4, 750]),
        ("ErnieImageTransformer2DModel", 1.0, {"shift": 4.0}, [1000, 952.4, 888.9, 800, 666.7, 444.4]),
        ("PRXTransformer2DModel", 1000.0, {"shift": 3.0}, [1, 0.9233, 0.8189, 0.6683, 0.4322, 0.008929]),
        ("ZImageTransformer2DModel", 1000.0, {"shift": 3.0}, [0, 0.0625, 0.14286, 0.25, 0.4, 0.625]),
        ("HiDreamImageTransformer2DModel", 1.0, {"shift": 3.0}, [1000, 923.3, 818.9, 668.3, 432.2, 8.929]),
        ("MochiTransformer3DModel", 1.0, {"invert_sigmas": True}, [0, 8.333, 16.667, 25, 138.89, 463.9]),
        (
            "CosmosTransformer3DModel",
            1.0,
            {"use_karras_sigmas": True},
            [0.98766, 0.9606, 0.8538, 0.4912, 0.07842, 0.001996],
        ),
        ("EasyAnimateTransformer3DModel", 1.0, {"use_dynamic_shifting": True}, [1000, 915.9, 803.3, 645, 405.8, 2.714]),
    ],
)
def test_networks_that_graphs_do_not_tell_apart_have_their_pipelines_times(
    tmp_path: Path, kind: str, factor: float, config: dict[str, Any], wanted: list[float]
) -> None:
    (tmp_path / "config.json").write_text(f'{{"_class_name": "{kind}"}}')
    found = told(network(factor=factor), FLOW | config, 6, tmp_path / "model.onnx")
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_mochi_s_parts_of_noise_fall_from_one_and_bend_where_halves_meet(steps: int) -> None:
    """Evenly through 1/40 of the noise, then faster with every step."""
    sigmas = given_sigmas("linear_quadratic", steps, 1000)["sigmas"]
    falls = -np.diff([*sigmas, 0])
    assert sigmas[0] == 1 and len(sigmas) == steps and (falls > 0).all()
    half = steps // 2
    if half:
        np.testing.assert_allclose(falls[:half], 0.025 / half)
        assert (np.diff(falls[half:]) > 0).all()


def test_a_flow_that_starts_with_some_data_starts_from_less_noise(tmp_path: Path) -> None:
    """Cosmos 2: Karras's 80 parts of noise beside one of data. Its first kind has a scheduler of its own."""
    path, model = tmp_path / "model.onnx", network(factor=1.0)
    (tmp_path / "config.json").write_text('{"_class_name": "CosmosTransformer3DModel"}')
    flow = open_schedule(conventions(path, 1.0) | FLOW, denoisers.find(model), 6)
    assert flow.begin([0]) == pytest.approx(80 / 81)
    first = {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}
    found = open_schedule(conventions(path, 1.0) | first, denoisers.find(model), 6)
    assert found.begin([0]) == pytest.approx(80, rel=1e-3) and found.timesteps[0] == pytest.approx(np.log(80) / 4)


def test_cogview_4_is_told_even_timesteps_of_noise_that_is_shifted(tmp_path: Path) -> None:
    """The shift grows with the root of the tokens."""
    model, path = network(factor=1.0, size="4,16,16"), tmp_path / "model.onnx"
    (tmp_path / "config.json").write_text('{"_class_name": "CogView4Transformer2DModel"}')
    config = FLOW | {
        "use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear",
    }  # fmt: skip
    schedule = open_schedule(conventions(path, 1.0) | config, denoisers.find(model), 6)
    assert schedule.timesteps == [1000, 800, 600, 400, 200, 1]
    assert isinstance(schedule, Diffusers)
    mu, parts = 0.25 + 0.75 * (64 / 256) ** 0.5, np.array([1, 0.8, 0.6, 0.4, 0.2, 0.001])
    np.testing.assert_allclose(schedule.scheduler.sigmas[:-1], mu / (mu + 1 / parts - 1), rtol=1e-5)


def test_a_network_that_is_told_how_much_is_data_predicts_the_other_way(tmp_path: Path) -> None:
    """Then diffusers' Euler steps are those of flow matching, where time runs from noise to data."""
    model, path = network(factor=1.0), tmp_path / "model.onnx"
    (tmp_path / "config.json").write_text('{"_class_name": "Lumina2Transformer2DModel"}')
    denoiser = denoisers.find(model)
    own = open_schedule(conventions(path, wave_rate(model, denoiser)) | FLOW | {"shift": 1.0}, denoiser, 5)
    plain = open_schedule({"_class_name": "FlowMatching"}, denoiser, 5)
    assert isinstance(own, Diffusers) and isinstance(plain, FlowMatching) and own.alphas() is None
    np.testing.assert_allclose(own.timesteps, plain.timesteps, atol=1e-6)
    generator = np.random.default_rng(0)
    sample, other = (generator.standard_normal((1, 4, 4), np.float32) for _ in range(2))
    one = two = sample
    own.begin([0])
    for step in range(5):
        one, two = own.advance(other * step, step, one), plain.advance(other * step, step, two)
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_logarithms_of_noise_are_told_as_they_are() -> None:
    """Networks of EDM have random, fast waves of a number that their schedulers do not count."""
    found = told(network(), {"_class_name": "EDMEulerScheduler"}, 4)
    assert found[0] == pytest.approx(np.log(80) / 4, rel=1e-3)


def test_larger_samples_shift_more_and_mu_can_be_said() -> None:
    config = FLOW | {"use_dynamic_shifting": True}
    latent = network(size="4,16,16")  # 64 squares
    assert told(latent, config, 6) == told(network(), config, 6)
    assert told(network(size="1024,16"), config, 6)[1] > told(network(), config, 6)[1]
    assert told(network(), config | {"mu": 1.15}, 6)[1] == pytest.approx(told(network(size="4096,16"), config, 6)[1])


def test_the_shift_of_flux_2_counts_steps_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pipeline = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2")
    for tokens in (16, 4096, 4300, 4301, 8192):
        for steps in (4, 50, 250):
            assert empirical_mu(tokens, steps) == pytest.approx(pipeline.compute_empirical_mu(tokens, steps))
    config, model, path = FLOW | {"use_dynamic_shifting": True}, network(size="4096,16"), tmp_path / "model.onnx"
    (tmp_path / "config.json").write_text('{"_class_name": "Flux2Transformer2DModel"}')
    found = open_schedule(conventions(path, 1000.0) | config, denoisers.find(model), 50).timesteps
    assert found == told(model, config | {"mu": pipeline.compute_empirical_mu(4096, 50)}, 50)


@pytest.mark.parametrize("folder", ["transformer", "."])
def test_the_schedule_of_a_pipeline_is_found(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    ir.save(network(), path)
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(FLOW | {"shift": 1.0}))
    sampler, line = open_sampler(network(), path, make_settings({"steps": 4}))
    assert line == f"schedule from {file}" and sampler.schedule.timesteps == [1.0, 0.75, 0.5, 0.25]
    named, line = open_sampler(network(), None, make_settings({"steps": 4, "scheduler": str(tmp_path)}))
    assert line == f"schedule from {file}" and named.schedule.timesteps == sampler.schedule.timesteps


@pytest.mark.parametrize(
    ("kind", "name", "factor", "words", "first"),
    [
        ("float", "timestep", 1000.0, "shift of 3", 1.0),  # FLUX
        ("float", "timestep", 1.0, "shift of 3", 1000.0),  # Stable Diffusion 3
        ("float", "t", 1.0, "flow matching", 0.0),
        ("int64", "timestep", 1.0, "linear betas", 999.0),
    ],
)
def test_what_is_assumed_without_a_schedule(kind: str, name: str, factor: float, words: str, first: float) -> None:
    model = network(kind, factor)
    next(value for value in model.graph.inputs if value.name == "timestep").name = name
    sampler, line = open_sampler(model, None, make_settings({"steps": 4}))
    assert words in line and "assumed" in line and sampler.schedule.timesteps[0] == pytest.approx(first)


def test_a_unet_that_counts_steps_in_floats_is_not_taken_for_a_flow(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    unet (float[N,2,4,4] sample, float[N] timestep) => (float[N,2,4,4] eps)
    <float[2,2,1,1] w = {1.0, 0.0, 0.0, 1.0}, float[2,4,1,1] u = {1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0},
     int64[3] axes = {1, 2, 3}>
    {
        wave = Sin (timestep)
        spread = Unsqueeze (wave, axes)
        told = Add (sample, spread)
        down = Conv (told, w)
        joined = Concat <axis=1> (down, told)
        eps = Conv (joined, u)
    }
    """
    path = tmp_path / "unet.onnx"
    ir.save(ir.from_onnx_text(text), path)
    sampler, line = open_sampler(models.load(path), path, make_settings({"steps": 4}))
    assert "linear betas" in line and sampler.schedule.timesteps[0] == 999.0


def test_guidance_in_floats_is_no_timestep_beside_a_whole_one() -> None:
    """HunyuanVideo's guidance becomes waves as its timestep does."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[N,4,8] hidden_states, int64[N] timestep, float[N] guidance) => (float[N,4,8] v)
    <int64[2] axes = {1, 2}>
    {
        time = Cast <to=1> (timestep)  wave = Sin (time)  guided = Sin (guidance)
        sum = Add (wave, guided)  spread = Unsqueeze (sum, axes)  v = Add (hidden_states, spread)
    }
    """
    assert denoisers.find(ir.from_onnx_text(text)).timestep.name == "timestep"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"network_time": "sigma"}, ("network_time", "'timestep', 'noise' or 'data'", "'sigma'")),
        ({"negated": "no"}, ("negated", "a valid boolean", "'no'")),
        ({"use_dynamic_shifting": True, "base_shift": "x"}, ("base_shift", "'x'")),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, ("base_image_seq_len", "4096")),
        ({"use_dynamic_shifting": True, "mu": "x"}, ("mu", "a valid number", "'x'")),
    ],
)
def test_bad_entries_are_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entries: dict[str, Any], words: tuple[str, ...]
) -> None:
    model, file = tmp_path / "model.onnx", tmp_path / "scheduler.json"
    ir.save(network(), model)
    file.write_text(json.dumps(FLOW | entries))
    code, stderr = run(capsys, "trajectories", model, "-o", tmp_path / "out.npz", "-q", "--scheduler", file)
    assert_two_lines(code, stderr, *words)
    assert not (tmp_path / "out.npz").exists()


def test_a_scheduler_that_predicts_a_flow_has_to_say_so() -> None:
    config = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    with pytest.raises(OnnxqError, match="prediction_type of epsilon, sample, v_prediction"):
        told(network("int64", 1.0), config, 4)
