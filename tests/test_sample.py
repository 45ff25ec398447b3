"""Images of a quantized denoiser beside the float one's, and the numbers that go with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS
from PIL import Image
from test_cli_errors import assert_two_lines, run
from test_trajectory import CLOCK

from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion.comparison import FeatureNetwork, Features, frechet_distance
from onnxq.diffusion.router import Router
from onnxq.diffusion.source import open_sampler
from onnxq.errors import OnnxqError
from onnxq.passes.cache_temporal_features import CacheTemporalFeatures
from onnxq.runtime import Session

UNET = MODELS / "fashion_unet_guided.onnx"
FEATURES = ("--features", MODELS / "fashion_features.onnx", "--reference", MODELS / "fashion_features_reference.npz")


def test_frechet_distance_of_known_gaussians() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.uniform(0.5, 2, 6), generator.uniform(0.5, 2, 6)
    basis, _ = np.linalg.qr(generator.standard_normal((6, 6)))
    mean = generator.standard_normal(6)
    one = (mean, (basis * first) @ basis.T)
    other = (mean + 0.5, (basis * second) @ basis.T)
    expected = 6 * 0.25 + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)  # covariances that commute
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_features_add_up_to_mean_and_covariance() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 4)) * [1, 2, 3, 4] + 7
    statistics = Features()
    for part in np.split(rows, 5):
        statistics.update(part)
    mean, covariance = statistics.moments
    np.testing.assert_allclose(mean, rows.mean(axis=0))
    np.testing.assert_allclose(covariance, np.cov(rows.T), atol=1e-10)


def test_real_images_are_near_their_reference() -> None:
    network = FeatureNetwork(FEATURES[1], FEATURES[3])
    with np.load(MODELS / "fashion_test.npz") as archive:
        images = archive["x"].astype(np.float32)[:500]
    real, noisy = Features(), Features()
    real.update(network(images))
    noisy.update(network(images + 0.3 * np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)))
    near = frechet_distance(real.moments, network.reference)
    assert near < 6 and frechet_distance(noisy.moments, network.reference) > 3 * near


def test_a_reference_of_bytes_is_one_of_images(tmp_path: Path) -> None:
    with np.load(MODELS / "fashion_test.npz") as archive:
        images = archive["x"].astype(np.float32)[:100]
    codes = ((images[:, 0] + 1) * 127.5).round().astype(np.uint8)
    np.savez(tmp_path / "bytes.npz", images=codes)
    np.savez(tmp_path / "floats.npz", images=codes[:, None] / np.float32(127.5) - 1)
    one, other = (FeatureNetwork(FEATURES[1], tmp_path / f"{name}.npz").reference for name in ("bytes", "floats"))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6)


def test_a_model_against_itself_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("-n", 5, "--steps", 3, "--seed", 2, "-q", *FEATURES)
    code, _ = run(capsys, "sample", UNET, "--against", UNET, "-o", tmp_path / "grid.png", "--json",
                  tmp_path / "numbers.json", "--report", tmp_path / "report.html", *arguments)  # fmt: skip
    assert code == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<polyline") == 2 and page.count('<img class="samples" src="data:image/png;base64,') == 3
    assert "quantized less float, 1 times" in page  # what there is not is not made stronger
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["trajectory_sqnr_db"] == ["inf"] * 3 and numbers["same_seed_image_sqnr_db"] == "inf"
    assert numbers["frechet_distance_float"] == numbers["frechet_distance_quantized"] > 0
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    side = (pixels.shape[1] - 8 * (pixels.shape[0] // 30)) // 2
    assert np.array_equal(pixels[:, :side], pixels[:, -side:]) and pixels.std() > 20


def test_another_seed_gives_other_images_and_the_same_seed_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grids = []
    for index, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{index}.png"
        assert run(capsys, "sample", UNET, "-n", 2, "--steps", 2, "--seed", seed, "-q", "-o", path)[0] == 0
        grids.append(path.read_bytes())
    assert grids[0] == grids[1] != grids[2]


def test_bad_input_is_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = run(capsys, "sample", UNET, *FEATURES[:2])
    assert_two_lines(code, stderr, "--features and --reference together")
    np.savez(tmp_path / "reference.npz", other=np.zeros(3))
    code, stderr = run(capsys, "sample", UNET, *FEATURES[:3], tmp_path / "reference.npz")
    assert_two_lines(code, stderr, "mean and covariance", "found other")
    clock = tmp_path / "clock.onnx"
    ir.save(ir.from_onnx_text(CLOCK.replace("[N,1,4,4]", "[N,5,4,4]")), clock)
    code, stderr = run(capsys, "sample", clock, "--steps", 2, "-n", 1, "-q", "-o", tmp_path / "grid.png")
    assert_two_lines(code, stderr, "1 or 3 channels")
    assert not (tmp_path / "grid.png").exists()


def test_a_model_with_tables_wants_its_own_timesteps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.load(UNET)
    sampler, _ = open_sampler(model, UNET, make_settings({"steps": 4}))
    CacheTemporalFeatures(sampler.denoiser, sampler.schedule.timesteps, everything=True)(model)
    cached = models.save(model, tmp_path / "cached.onnx")
    code, _ = run(capsys, "sample", cached, "--against", UNET, "-n", 2, "--steps", 4, "-q", "--json", tmp_path / "n")
    ratios = json.loads((tmp_path / "n").read_text())["trajectory_sqnr_db"]
    assert code == 0 and all(ratio == "inf" or ratio > 100 for ratio in ratios)
    found = run(capsys, "sample", cached, "--against", UNET, "-n", 2, "--steps", 5, "-q")
    assert_two_lines(*found, "expected the 4 timesteps that the model has tables for", "--steps 4")


def test_a_loop_over_diffusers_schedulers_runs_the_network() -> None:
    """What the README shows."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    unet, session, labels = Router(UNET), Session(UNET), np.array([3, 7])
    scheduler = diffusers.DDIMScheduler.from_config(json.loads(UNET.with_suffix(".scheduler.json").read_text()))
    scheduler.set_timesteps(4)
    sample = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        predicted = unet.predict(sample.numpy(), int(timestep), y=labels)
        feed = {"x": sample.numpy(), "t": np.full(2, int(timestep)), "y": labels}
        np.testing.assert_array_equal(predicted, session.run(feed)[0])
        sample = scheduler.step(torch.from_numpy(predicted), timestep, sample).prev_sample
    assert float(sample.abs().max()) <= 1.01
    with pytest.raises(OnnxqError, match="expected the conditions y"):
        unet.predict(sample.numpy(), 5)
