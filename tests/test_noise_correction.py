"""PTQD: statistics of a denoiser's error, the corrections that follow, and their three forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS
from test_trajectory import CLOCK

import onnxq
from onnxq import OnnxqError, recipes
from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion.noise_correction import (
    Correction,
    OutputError,
    correct_noise,
    fit,
    fit_held_out,
    sampler_tables,
)
from onnxq.diffusion.schedule_file import ASSUMED_DIFFUSION
from onnxq.diffusion.source import open_sampler
from onnxq.diffusion.trajectory import record
from onnxq.passes.correct_prediction import CorrectPrediction
from onnxq.runtime import Session

UNET = MODELS / "fashion_unet_guided.onnx"
MEANS = np.array([0.05, -0.04, 0.06])


def pairs(count: int, slope: float, means: np.ndarray, deviation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    exact = generator.standard_normal((count, 3, 8, 8))
    noise = deviation * generator.standard_normal(exact.shape)
    return exact, (1 + slope) * exact + means.reshape(1, 3, 1, 1) + noise


def measured(exact: np.ndarray, found: np.ndarray) -> OutputError:
    error = OutputError()
    for part in range(0, len(exact), 100):
        other = OutputError()
        other.update(exact[part : part + 100], found[part : part + 100])
        error.merge(other)
    return error


def test_slope_means_and_deviation_are_found_again() -> None:
    correction = fit(measured(*pairs(512, 0.3, MEANS, 0.3, seed=0)))
    assert correction.slope == pytest.approx(0.3, abs=0.005) and correction.deviation == pytest.approx(0.3, abs=0.005)
    np.testing.assert_allclose(correction.mean, MEANS, atol=0.006)
    exact, found = pairs(512, 0.3, MEANS, 0.3, seed=1)
    rest = correction(found) - exact
    assert abs(np.corrcoef(rest.ravel(), exact.ravel())[0, 1]) < 0.01
    standard_error = rest.std() / np.sqrt(rest[:, 0].size)
    assert (np.abs(rest.mean(axis=(0, 2, 3))) < 5 * standard_error).all()  # of the fit and of this sample
    assert np.mean(rest**2) < 0.31 * np.mean((found - exact) ** 2)


def test_what_the_sums_say_is_what_the_samples_say() -> None:
    exact, found = pairs(64, 0.2, MEANS, 0.1, seed=2)
    error, correction = measured(exact, found), Correction(0.15, MEANS * 0.9, 0.1)
    assert error.mean_square() == pytest.approx(np.mean((found - exact) ** 2), rel=1e-10)
    assert error.mean_square(correction) == pytest.approx(np.mean((correction(found) - exact) ** 2), rel=1e-8)


def test_noise_alone_is_left_alone() -> None:
    """A slope that explains less than 5 % of the error, and means within two standard errors, count as 0."""
    worse = []
    for seed in range(20):
        halves = [measured(*pairs(8, 0.02, np.zeros(3), 0.3, seed=2 * seed + half)) for half in (0, 1)]
        correction = fit_held_out(*halves)
        assert correction.slope == 0
        exact, found = pairs(64, 0.02, np.zeros(3), 0.3, seed=1000 + seed)
        worse.append(np.mean((correction(found) - exact) ** 2) / np.mean((found - exact) ** 2))
    assert max(worse) < 1.01


def test_negative_slopes_are_an_option() -> None:
    error = measured(*pairs(256, -0.1, np.zeros(3), 0.01, seed=0))
    assert fit(error).slope == 0
    correction = fit(error, clip_slope=False)
    assert correction.slope == pytest.approx(-0.1, abs=0.01)
    assert error.mean_square(correction) < 0.05 * error.mean_square()


def test_equal_networks_need_no_correction() -> None:
    exact, _ = pairs(16, 0.0, np.zeros(3), 0.0, seed=0)
    correction = fit(measured(exact, exact))
    assert correction.slope == 0 and not correction.mean.any() and correction.deviation == 0
    alphas = [0.1, 0.5, 0.9, 1.0]
    corrected = sampler_tables(alphas, dict.fromkeys(range(3), correction), 3, eta=1.0)
    plain = sampler_tables(alphas, {}, 3, eta=1.0)
    for name in ("sample", "prediction", "constant", "noise"):
        assert np.array_equal(getattr(corrected, name), getattr(plain, name))
    model = ir.from_onnx_text(CLOCK)
    tail = CorrectPrediction("v", "t", np.arange(3.0), np.ones(3), np.zeros((3, 1)))
    assert not tail(model).modified and len(model.graph) == 3


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_tail_tables_and_formula_agree(eta: float) -> None:
    model = ir.from_onnx_text(CLOCK)
    plain = Session(model)
    times, alphas = np.array([0.9, 0.5, 0.1]), np.array([0.05, 0.4, 0.95, 1.0])
    corrections = {step: Correction(0.1 * step, np.array([0.02 - 0.03 * step]), 0.0) for step in range(3)}
    found = [corrections[step] for step in range(3)]
    CorrectPrediction(
        "v", "t", times, np.array([item.factor for item in found]), np.stack([item.offset for item in found])
    )(model)
    assert [value.name for value in model.graph.outputs] == ["v"]
    corrected = Session(model)
    generator = np.random.default_rng(0)
    tables, neutral = sampler_tables(alphas, corrections, 1, eta=eta), sampler_tables(alphas, {}, 1, eta=eta)
    for step, time in enumerate(times):
        x, noise = (generator.standard_normal((2, 1, 4, 4)).astype(np.float32) for _ in range(2))
        feed = {"x": x, "t": np.full(2, time + 0.01, np.float32)}  # the nearest entry is taken
        raw, tail = plain.run(feed)[0], corrected.run(feed)[0]
        np.testing.assert_allclose(tail, corrections[step](raw), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(
            tables.advance(x, raw, step, noise), neutral.advance(x, tail, step, noise), rtol=1e-6, atol=1e-6
        )


def test_the_samplers_noise_shrinks_by_that_of_quantization() -> None:
    """With eps^ = eps + N(0, q²), x' keeps the variance that the sampler means it to have."""
    alphas, deviation, eta = [0.3, 0.6, 1.0], 0.2, 1.0
    corrections = {0: Correction(0.0, np.zeros(1), deviation)}
    tables, plain = sampler_tables(alphas, corrections, 1, eta=eta), sampler_tables(alphas, {}, 1, eta=eta)
    generator = np.random.default_rng(0)
    error, noise = (generator.standard_normal((1, 1, 1000, 1000)) for _ in range(2))
    zero = np.zeros_like(noise)
    moved = tables.advance(zero, deviation * error, 0, noise)
    assert np.var(moved) == pytest.approx(plain.noise[0] ** 2, rel=0.01)
    assert np.var(plain.advance(zero, deviation * error, 0, noise)) > 1.01 * plain.noise[0] ** 2
    huge = sampler_tables(alphas, {0: Correction(0.0, np.zeros(1), 1e3)}, 1, eta=eta)
    assert huge.noise[0] == 0
    still = sampler_tables(alphas, corrections, 1, eta=0.0)
    assert not still.noise.any() and np.array_equal(still.prediction, sampler_tables(alphas, {}, 1).prediction)


@pytest.mark.parametrize(("eta", "guidance", "steps"), [(1.0, 1.0, 4), (0.0, 1.0, 0), (1.0, 3.0, 0)])
def test_a_sampler_with_noise_of_its_own_adds_less(tmp_path: Path, eta: float, guidance: float, steps: int) -> None:
    """From the metadata alone; with guidance the error has another variance, without noise there is none to spare."""
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({**ASSUMED_DIFFUSION, "eta": eta}))
    sampler, _ = open_sampler(
        models.load(UNET), UNET, make_settings({"steps": 4, "scheduler": str(file), "guidance": guidance})
    )
    times = sampler.schedule.timesteps
    table = [
        {"step": step, "timestep": time, "slope": 0.1, "mean": [0.0], "deviation": 0.05, "r_squared": 0.5}
        for step, time in enumerate(times)
    ]
    factors = correct_noise(sampler, json.dumps(table))
    assert len(factors) == max(0, steps - 1)  # the last step ends in the image: no noise
    if not factors:
        return
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[int(time) for time in times]]
    now, later = alphas[:-1], alphas[1:]
    variance = (1 - later) / (1 - now) * (1 - now / later)
    coefficient = np.sqrt(1 - later - variance) - np.sqrt(later * (1 - now) / now)
    left = np.sqrt(np.maximum(variance - (coefficient * 0.05 / 1.1) ** 2, 0) / variance)
    np.testing.assert_allclose(list(factors.values()), left, rtol=1e-5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, ir.Model]:
    """The shipped denoiser with 3-bit weights, as it is and corrected; biases as the paper of the base has them."""
    options = {"steps": 4, "weights": "int3", "activations": "int8", "samples": 48}
    data = tmp_path_factory.mktemp("ptqd") / "data.npz"
    sampler, _ = open_sampler(models.load(UNET), UNET, make_settings({"steps": 4}))
    record(sampler, Session(UNET), np.ones((12, 4), bool), data)
    plain = replace(recipes.get("ptq4dm"), knobs={"selection": "uniform", "trajectories": 12, "bias_correction": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.RECIPES, "plain", plain)
        base = onnxq.quantize(UNET, recipe="plain", **options)
        corrected = onnxq.quantize(UNET, data, recipe="ptqd", knobs={"base": "plain"}, **options)
    return base.model, corrected.model


def test_other_trajectories_profit_too(pair: tuple[ir.Model, ir.Model]) -> None:
    """No step gets worse on trajectories that were not measured."""
    exact = Session(UNET)
    table = json.loads(models.get_metadata(pair[1])["noise_correction"])
    assert [entry["step"] for entry in table] == [0, 1, 2, 3] and table[0]["timestep"] > table[3]["timestep"]
    assert any(entry["slope"] > 0 or any(entry["mean"]) for entry in table)
    other, _ = open_sampler(models.load(UNET), UNET, make_settings({"steps": 4, "seed": 9}))
    plain, corrected = (Session(model, optimize=False) for model in pair)
    ratios = []
    for visit in other.run(exact, range(12)):
        errors = [
            np.mean((other.denoiser.predict(session, visit.feed) - visit.raw) ** 2) for session in (plain, corrected)
        ]
        ratios.append(errors[1] / errors[0])
    assert max(ratios) < 1.01 and min(ratios) < 0.97


def test_by_step_nothing_of_the_error_follows_the_prediction(pair: tuple[ir.Model, ir.Model]) -> None:
    """On other trajectories: where error and prediction were correlated they are not, and what was shifted has no mean.

    A step whose mean was within two standard errors when it was measured is left alone.
    """
    exact, quantized = Session(UNET), Session(pair[0], optimize=False)

    def predictions(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        sampler, _ = open_sampler(models.load(UNET), UNET, make_settings({"steps": 4, "seed": seed}))
        visits = sampler.run(exact, range(16))
        return [(visit.raw, sampler.denoiser.predict(quantized, visit.feed)) for visit in visits]

    followed, shifted, less = [], [], []
    for (exact_fit, found_fit), (wanted, found) in zip(predictions(0), predictions(9), strict=True):
        halves = (OutputError(), OutputError())
        for half in (0, 1):
            halves[half].update(exact_fit[half::2], found_fit[half::2])
        correction = fit_held_out(*halves, least_r_squared=0.0, clip_slope=False)
        corrected = correction(found)
        before, after = (abs(np.corrcoef((e - wanted).ravel(), wanted.ravel())[0, 1]) for e in (found, corrected))
        if before > 0.1:
            followed.append(after)
        means = (corrected - wanted).mean(axis=(1, 2, 3))
        if correction.mean.any():
            shifted.append(abs(means.mean()) / (np.sqrt(2 / len(means)) * means.std()))  # of the fit and these samples
        less.append(np.mean((corrected - wanted) ** 2) <= np.mean((found - wanted) ** 2))
    assert len(followed) >= 3 and max(followed) < 0.05
    assert len(shifted) >= 3 and max(shifted) < 3, shifted
    assert np.mean(less) >= 0.95


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_images_from_the_same_noise_end_nearer(pair: tuple[ir.Model, ir.Model], tmp_path: Path, eta: float) -> None:
    """With and without noise of the sampler's own, which is made smaller by what quantization adds."""
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({**ASSUMED_DIFFUSION, "eta": eta}))
    images, factors = [], {}
    for model in (models.load(UNET), *pair):
        sampler, _ = open_sampler(
            models.load(UNET), UNET, make_settings({"steps": 4, "scheduler": str(file), "seed": 9})
        )
        if model is pair[1]:
            factors = correct_noise(sampler, models.get_metadata(model)["noise_correction"])
        run = sampler.run(Session(model, optimize=False), range(8))
        for _ in run:
            pass
        images.append(run.sample)
    exact, plain, corrected = images
    assert np.mean((corrected - exact) ** 2) < 0.95 * np.mean((plain - exact) ** 2)
    assert bool(factors) == (eta > 0) and all(0 < factor < 1 for factor in factors.values())


def test_samples_without_steps_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 1, 28, 28), np.float32), t=np.arange(4), y=np.arange(4))
    with pytest.raises(OnnxqError, match="sampler step"):
        onnxq.quantize(UNET, tmp_path / "data.npz", recipe="ptqd")
