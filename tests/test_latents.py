"""Latents are drawn by the decoder of their pipeline, scaled as its configuration says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli_errors import assert_two_lines, run
from test_prompts import DRAWING, decoder_file, denoiser_file

from onnxq import model as models
from onnxq.calibration import sizes
from onnxq.calibration.data import input_specs, open_source
from onnxq.config import make_settings
from onnxq.diffusion.latents import LatentDecoder, read_scaling
from onnxq.inputs import calibration_inputs
from onnxq.progress import Progress


@pytest.mark.parametrize("batch", ["N", "2"])
@pytest.mark.parametrize("place", ["vae_decoder", "vae"])
def test_latents_are_scaled_as_diffusers_scales_them(place: str, batch: str, tmp_path: Path) -> None:
    path = decoder_file(tmp_path / "vae_decoder" / "model.onnx", batch)
    latents = np.random.default_rng(1).standard_normal((3, 4, 5, 6)).astype(np.float32)

    def drawn(**entries: object) -> np.ndarray:
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **entries}))
        return LatentDecoder(path, input_specs(models.load(path))[0])(latents)

    def through(read: np.ndarray) -> np.ndarray:
        return np.einsum("oc,nchw->nohw", DRAWING, read)

    assert drawn().shape == (3, 3, 5, 6)
    stable = drawn(scaling_factor=0.18215, shift_factor=None, latents_mean=None)
    np.testing.assert_allclose(stable, through(latents / 0.18215), rtol=1e-4, atol=1e-5)
    flux = drawn(scaling_factor=0.3611, shift_factor=0.1159)
    np.testing.assert_allclose(flux, through(latents / 0.3611 + 0.1159), rtol=1e-4, atol=1e-5)
    mean, deviation = np.asarray([-1.6, 0.3, -0.2, 0.1]), np.asarray([8.4, 5.9, 5.3, 5.9])
    playground = drawn(scaling_factor=0.5, latents_mean=list(mean), latents_std=list(deviation))
    read = latents * deviation[:, None, None] / 0.5 + mean[:, None, None]
    np.testing.assert_allclose(playground, through(read), rtol=1e-4, atol=1e-4)


def test_samples_of_latents_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    denoiser = denoiser_file(tmp_path / "unet" / "model.onnx", {})
    decoder = decoder_file(tmp_path / "vae_decoder" / "model.onnx")
    config, grid = decoder.parent / "config.json", tmp_path / "grid.png"
    config.write_text('{"scaling_factor": 0.25}')

    def sample(*more: object) -> tuple[int, str]:
        grid.unlink(missing_ok=True)
        return run(capsys, "sample", denoiser, "--against", denoiser, "--steps", 2, "-n", 3, "-q", "-o", grid, *more)

    assert sample("--report", tmp_path / "report.html")[0] == 0
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 3
    with Image.open(grid) as picture:
        colours = len(set(picture.getdata()))
    assert colours > 10  # besides frame and gap
    other = decoder_file(tmp_path / "other.onnx", channels=16)
    assert_two_lines(*sample("--decoder", other), "[any, 4, 4, 4]", "latent_sample [any, 16, any, any]")
    assert_two_lines(*sample("--decoder", denoiser), "expected a decoder of samples", "timestep")
    for value in ('"large"', "-1", "Infinity"):
        config.write_text(f'{{"scaling_factor": {value}}}')
        assert_two_lines(*sample(), "scaling_factor", str(config))
    config.write_text('{"latents_mean": [0, 1, 2]}')
    assert_two_lines(*sample(), "latents_mean", "4 channels")
    shutil.move(decoder, tmp_path / "decoder.onnx")
    assert_two_lines(*sample(), "1 or 3 channels", "--decoder")
    assert sample("--decoder", tmp_path / "decoder.onnx")[0] == 0 and grid.is_file()
    shutil.copy(tmp_path / "decoder.onnx", decoder)
    config.write_text('{"batch_norm_eps": 1e-4}')  # FLUX.2's scaling stands among the weights of its encoder
    assert_two_lines(*sample(), "1 or 3 channels")
    assert sample("--decoder", decoder)[0] == 0 and grid.is_file()
    shutil.copy(other, decoder)  # of another model: the samples are what they were, no pictures
    config.write_text("{")
    assert_two_lines(*sample(), "1 or 3 channels")


def test_samples_are_what_their_decoder_is_calibrated_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    denoiser, latents = denoiser_file(tmp_path / "unet" / "model.onnx", {}), tmp_path / "latents.npz"
    arguments = ("sample", denoiser, "--steps", 2, "-n", 70, "-q", "-o", latents)
    assert run(capsys, *arguments)[0] == 0
    with np.load(latents) as alone:
        assert alone.files == ["sample"]
        samples = alone["sample"]
    decoder = decoder_file(tmp_path / "vae_decoder" / "model.onnx")
    (decoder.parent / "config.json").write_text('{"scaling_factor": 0.25}')
    assert run(capsys, *arguments)[0] == 0
    with np.load(latents) as scaled:
        assert samples.shape == (70, 4, 4, 4) and samples.std() > 0.1
        np.testing.assert_allclose(scaled["latent_sample"], samples * 4, rtol=1e-6)
    assert len(open_source(latents, input_specs(models.load(decoder)))) == 70


@pytest.mark.parametrize(("entries", "side"), [({}, 32), ({"latent_channels": 4, "block_out_channels": [8] * 4}, 4)])
def test_the_size_of_latents_is_the_published_one(entries: dict[str, object], side: int, tmp_path: Path) -> None:
    path = decoder_file(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"sample_size": 32, **entries}))
    source, _ = calibration_inputs(models.load(path), path, None, make_settings({"samples": 2}), Progress())
    assert next(iter(source))["latent_sample"].shape == (4, side, side)


def test_a_decoder_without_data_gets_latents_of_its_own_size(tmp_path: Path) -> None:
    path = decoder_file(tmp_path / "model.onnx")
    settings = make_settings({"shapes": {"latent_sample": [1, 4, 8, 8]}, "samples": 8})

    def spread() -> tuple[float, str]:
        model = models.load(path)
        sizes.choose(model, settings.shapes)
        source, notes = calibration_inputs(model, path, None, settings, Progress())
        return float(np.std([sample["latent_sample"] for sample in source])), notes[0]

    deviation, note = spread()
    assert deviation == pytest.approx(1, rel=0.1) and "random inputs" in note
    (tmp_path / "config.json").write_text('{"scaling_factor": 0.18215, "latents_std": null}')
    deviation, note = spread()
    assert deviation == pytest.approx(1 / 0.18215, rel=0.1) and "random latents" in note and "onnxq sample" in note
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    assert read_scaling(path) is None and spread()[0] == pytest.approx(1, rel=0.1)
