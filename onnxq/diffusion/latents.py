"""Latents and the pictures that they stand for: the decoder of a pipeline, and how its latents are scaled.

A denoiser of latents works on numbers of variance 1. Those that the decoder reads (the second half of a variational
autoencoder) are larger or smaller and shifted, as the autoencoder's ``config.json`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from onnxq import model as models
from onnxq.calibration.data import Array, InputSpec, input_specs
from onnxq.diffusion.denoiser import batch_rows, shown
from onnxq.diffusion.exported_config import CONFIG, read_config
from onnxq.diffusion.packing import token_grid, unpacked
from onnxq.diffusion.trajectory import Sampler
from onnxq.errors import OnnxqError, unwanted
from onnxq.runtime import Session

DECODER = Path("vae_decoder", "model.onnx")
PICTURE_RANGE = (-1.0, 1.0)  # black and white, as decoders draw them


class Scaling(BaseModel):
    """What stands in an autoencoder's ``config.json``; a decoder reads ``x · std / factor + mean + shift``."""

    model_config = ConfigDict(allow_inf_nan=False)
    scaling_factor: PositiveFloat = 1.0
    shift_factor: float = 0.0
    latents_mean: list[float] = [0.0]
    latents_std: list[PositiveFloat] = [1.0]
    batch_norm_eps: float | None = None  # there: scaled by statistics among its weights instead, as FLUX.2's

    def applied(self, latents: Array) -> Array:
        """What a decoder reads in place of latents [batch, channels, height, width] of variance 1.

        Raises:
            OnnxqError: mean or deviation are those of another number of channels.
        """
        channels = latents.shape[1]
        if not {len(self.latents_mean), len(self.latents_std)} <= {1, channels}:
            raise OnnxqError(
                f"expected latents_mean and latents_std of {channels} channels in the autoencoder's config.json, found "
                f"{len(self.latents_mean)} and {len(self.latents_std)} numbers",
                hint="give the config.json of the pipeline that the decoder comes from",
            )
        mean, deviation = (
            np.asarray(value, np.float32).reshape(1, -1, 1, 1) for value in (self.latents_mean, self.latents_std)
        )
        result: Array = latents * deviation / np.float32(self.scaling_factor) + mean + np.float32(self.shift_factor)
        return result


def read_scaling(decoder: Path) -> Scaling | None:
    """How latents for a decoder are scaled; ``None`` where no configuration of an autoencoder is near it.

    Args:
        decoder: Its file; the configuration lies beside it, or in the pipeline's folder ``vae``.

    Raises:
        OnnxqError: it says something else than numbers.
    """
    folder = decoder.absolute().parent
    for file in (folder / CONFIG, folder.parent / "vae" / CONFIG):
        entries = read_config(file)
        if not Scaling.model_fields.keys() & entries.keys():
            continue
        try:
            return Scaling(**{name: value for name, value in entries.items() if value is not None})
        except ValidationError as error:
            raise OnnxqError(
                f"expected {unwanted(error)} in {file}", hint="it is the autoencoder's of the pipeline"
            ) from error
    return None


class LatentDecoder:
    """Draws the pictures that latents stand for.

    Args:
        path: The decoder, from latents [batch, channels, height, width] to pictures in [-1, 1].
        spec: Its only input.
        device: Where it runs.
        grid: Rows and columns of tokens, where latents come packed.
    """

    def __init__(self, path: Path, spec: InputSpec, device: str = "cpu", grid: tuple[int, int] | None = None) -> None:
        self.spec, self.grid = spec, grid
        self.batch = spec.batch or 1  # pictures are large
        self.scaling = read_scaling(path) or Scaling()
        self.session = Session(path, device=device)

    def scaled(self, latents: Array) -> Array:
        """What it reads in place of latents of variance 1."""
        latents = latents if self.grid is None else unpacked(latents, self.grid)
        return self.scaling.applied(latents).astype(self.spec.dtype)

    def __call__(self, latents: Array) -> Array:
        """Pictures [samples, channels, height, width]."""
        pictures = []
        for start in range(0, len(latents), self.batch):
            given = {self.spec.name: self.scaled(batch_rows(latents, start, self.batch))}
            pictures.append(self.session.run(given)[0].astype(np.float32, copy=False))
        return np.concatenate(pictures)[: len(latents)]


def find_decoder(
    given: Path | None, pipelines: Sequence[Path], sampler: Sampler, device: str = "cpu"
) -> LatentDecoder | None:
    """The decoder that the user names, else that of the pipeline if it reads what the denoiser makes.

    Args:
        given: Its file.
        pipelines: Folders that may be that of the pipeline, likeliest first.
        sampler: The denoiser, with its conditions: packed latents stand where positions say.
        device: Where it runs.

    Raises:
        OnnxqError: the one that is named reads something else.
    """
    path = given or next((path for folder in pipelines if (path := folder / DECODER).is_file()), None)
    specs = [] if path is None else input_specs(models.read(path))
    noise = sampler.denoiser.noise_shape
    grid = token_grid(sampler.denoiser, sampler.conditions or {})
    latents = noise if grid is None else unpacked(np.empty((1, *noise)), grid).shape[1:]
    if path is not None and len(specs) == 1 and _draws(specs[0], latents):
        decoder = LatentDecoder(path, specs[0], device, grid)
        if given is not None or decoder.scaling.batch_norm_eps is None:
            return decoder
    if given is None:
        return None
    found = ", ".join(f"{spec.name} {shown(spec.shape)}" for spec in specs)
    raise OnnxqError(
        f"expected a decoder of samples {shown([None, *latents])} in {given}, found inputs {found}",
        hint="give --decoder the one of the denoiser's own pipeline, vae_decoder/model.onnx",
    )


def _draws(spec: InputSpec, latents: Sequence[int]) -> bool:
    """Whether an input takes latents, which are pictures [channels, height, width]."""
    sizes = spec.row_shape
    return len(sizes) == len(latents) == 3 and all(a in (None, b) for a, b in zip(sizes, latents, strict=True))
