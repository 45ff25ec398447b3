"""FLUX and its kin: latents that are packed into tokens, and the positions of those."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image
from test_cli_errors import assert_two_lines, run
from test_prompts import decoder_file

from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.conditions import open_conditions
from onnxq.diffusion.packing import made_positions, token_grid, unpacked
from onnxq.diffusion.source import open_sampler
from onnxq.errors import OnnxqError

TEXT = 5  # tokens
FLUX = "float[N,T,16] hidden_states, float[N] timestep, float[N,S,8] encoder_hidden_states, float[N] guidance, "


def net(inputs: str, rate: float = 1000.0) -> ir.Model:
    """A network of packed samples: waves of its time and its guidance, with positions that count, too."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    net ({inputs}) => (float[N,T,16] out)
    <int64[2] ends = {{1, 2}}, int64[1] last = {{-1}}, float zero = {{0.0}}, float[1] rate = {{{rate}}}>
    {{
        both = Add (timestep, guidance)
        turned = Mul (both, rate)
        wave = Sin (turned)
        waves = Unsqueeze (wave, ends)
        text = ReduceMean <keepdims = 1> (encoder_hidden_states, ends)
        place = ReduceSum <keepdims = 1> (img_ids, last)
        still = Mul (txt_ids, zero)
        none = ReduceSum <keepdims = 0> (still)
        small = Mul (hidden_states, zero)
        a = Add (small, waves)
        b = Add (a, text)
        c = Add (b, place)
        out = Add (c, none)
    }}"""
    return ir.from_onnx_text(text)


def flux(tokens: str = "T", *, batch: str = "", places: int = 3, rate: float = 1000.0) -> ir.Model:
    """With positions [tokens, places], or a batch of them; the axes have the names that exporters give them."""
    positions = f"float[{batch}T,{places}] img_ids, float[{batch}S,{places}] txt_ids"
    return net((FLUX + positions).replace("T,", f"{tokens},"), rate)


def texts(**more: np.ndarray) -> dict[str, np.ndarray]:
    return {"encoder_hidden_states": np.ones((2, TEXT, 8), np.float32), **more}


@pytest.mark.parametrize("batch", ["", "N,"], ids=["shared", "by row"])
def test_positions_are_those_of_diffusers(batch: str) -> None:
    pipelines = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    denoiser = denoisers.find(flux("16", batch=batch))
    specs = {spec.name: spec for spec in denoiser.specs}
    wanted = pipelines.FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32).numpy()
    found = {name: made_positions(specs[name], denoiser, texts()) for name in ("img_ids", "txt_ids")}
    picture, text = found["img_ids"], found["txt_ids"]
    assert picture is not None and text is not None and picture.ndim == text.ndim == (3 if batch else 2)
    np.testing.assert_array_equal(picture.reshape(-1, 3), wanted)
    np.testing.assert_array_equal(text.reshape(-1, 3), np.zeros((TEXT, 3)))
    assert made_positions(specs["hidden_states"], denoiser, texts()) is None


def test_a_fourth_place_counts_the_text() -> None:
    pipelines = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    denoiser = denoisers.find(flux("16", batch="N,", places=4))
    specs = {spec.name: spec for spec in denoiser.specs}
    picture = pipelines.Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 1, 4, 4)).numpy()
    text = pipelines.Flux2Pipeline._prepare_text_ids(torch.zeros(1, TEXT, 8)).numpy()
    np.testing.assert_array_equal(made_positions(specs["img_ids"], denoiser, texts()), picture)
    np.testing.assert_array_equal(made_positions(specs["txt_ids"], denoiser, texts()), text)


def test_latents_are_unpacked_as_diffusers_does_it() -> None:
    pipelines = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    latents = np.random.default_rng(0).standard_normal((3, 4, 6, 8)).astype(np.float32)
    packed = pipelines.FluxPipeline._pack_latents(torch.from_numpy(latents), 3, 4, 6, 8).numpy()
    assert packed.shape == (3, 12, 16)
    np.testing.assert_array_equal(unpacked(packed, (3, 4)), latents)


def test_the_grid_is_what_positions_say() -> None:
    def grid(model: ir.Model, **given: np.ndarray) -> tuple[int, int] | None:
        return token_grid(denoisers.find(model), given)

    wide = np.zeros((12, 3), np.float32)
    wide[:, 1:] = np.indices((2, 6)).reshape(2, -1).T
    assert grid(flux("16")) == (4, 4) and grid(flux("12")) is None
    assert grid(flux("12"), img_ids=wide) == grid(flux("12"), img_ids=wide[None]) == (2, 6)
    assert grid(flux("12"), img_ids=wide[:, :2]) is None and grid(flux("12"), img_ids=2 * wide) is None
    picture = "float[N,4,4,4] x, float[N] t"
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    net ({picture}) => (float[N,4,4,4] out) <int64[3] axes = {{1, 2, 3}}>
    {{ a = Unsqueeze (t, axes)  out = Add (x, a) }}"""
    assert grid(ir.from_onnx_text(text)) is None


def conditions_file(folder: Path, **more: np.ndarray) -> str:
    np.savez(folder / "given.npz", **texts(**more))
    return str(folder / "given.npz")


def test_a_pipeline_of_packed_latents_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes from the autoencoder, positions and guidance by themselves, pictures from the decoder."""
    path, grid, latents = tmp_path / "transformer" / "model.onnx", tmp_path / "grid.png", tmp_path / "latents.npz"
    path.parent.mkdir()
    models.save(flux(), path)
    decoder = decoder_file(tmp_path / "vae_decoder" / "model.onnx")
    config: dict[str, object] = {"latent_channels": 4, "block_out_channels": [8] * 3, "sample_size": 32}
    (decoder.parent / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    given = conditions_file(tmp_path)

    def sample(output: Path, *more: object) -> tuple[int, str]:
        return run(capsys, "sample", path, "--steps", 2, "-n", 3, "-q", "-o", output, "--conditions", given, *more)

    assert sample(grid)[0] == sample(latents)[0] == 0
    with Image.open(grid) as picture:
        assert len(set(picture.getdata())) > 10
    with np.load(latents) as made:
        assert made.files == ["latent_sample"] and made["latent_sample"].shape == (3, 4, 8, 8)
    assert_two_lines(*sample(latents, "--shapes", "hidden_states:1x12x16"), "[12, 3] under 'img_ids'", "nothing")
    other = decoder_file(tmp_path / "other.onnx", channels=16)
    assert_two_lines(*sample(grid, "--decoder", other), "[any, 4, 8, 8]", "latent_sample [any, 16, any, any]")
    (decoder.parent / "config.json").unlink()
    assert_two_lines(*sample(grid), "a sample of known size", "hidden_states")


def test_pictures_are_as_large_as_their_autoencoder_says_only_where_they_are_its_latents(tmp_path: Path) -> None:
    """Inpainting has more channels than the autoencoder: the size of its pictures is not that of the sample."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    net (float[N,9,H,W] x, float[N] t) => (float[N,9,H,W] out) <int64[3] axes = {1, 2, 3}>
    { a = Unsqueeze (t, axes)  out = Add (x, a) }"""
    (tmp_path / "vae").mkdir()
    config = {"latent_channels": 4, "block_out_channels": [8] * 4, "sample_size": 512}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OnnxqError, match="a sample of known size"):
        open_sampler(ir.from_onnx_text(text), tmp_path / "unet" / "model.onnx", make_settings({"steps": 2}))


def test_conditions_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    net (float[N,4,4,4] x, float[N] t) => (float[N,4,4,4] out) <int64[3] axes = {1, 2, 3}>
    { a = Unsqueeze (t, axes)  out = Add (x, a) }"""
    denoiser = denoisers.find(ir.from_onnx_text(text))
    assert open_conditions(None, denoiser) == {}
    with pytest.raises(OnnxqError, match="more than sample and timestep") as error:
        open_conditions(tmp_path / "prompts.txt", denoiser)
    assert "leave --conditions out" in (error.value.hint or "")
