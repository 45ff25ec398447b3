"""A quantized denoiser beside its float one: error of each step, of whole trajectories, and of the images' features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.archives import read_arrays
from onnxq.calibration.data import Array
from onnxq.diffusion.denoiser import Runnable
from onnxq.diffusion.latents import PICTURE_RANGE, LatentDecoder
from onnxq.diffusion.trajectory import Sampler
from onnxq.errors import OnnxqError
from onnxq.progress import Advance
from onnxq.report.metrics import Sqnr
from onnxq.runtime import Session


@dataclass
class Features:
    """Mean and covariance of feature vectors, added up; a Fréchet distance needs no more."""

    count: int = 0
    total: Array = field(default_factory=lambda: np.zeros(0))
    products: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def update(self, features: Array) -> None:
        """Add rows [samples, features]."""
        rows = features.reshape(len(features), -1).astype(np.float64)
        if self.count == 0:
            self.total, self.products = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
        self.count += len(rows)
        self.total += rows.sum(axis=0)
        self.products += rows.T @ rows

    @property
    def moments(self) -> tuple[Array, Array]:
        """Mean [features] and covariance [features, features]."""
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / max(self.count - 1, 1)
        return mean, covariance


def frechet_distance(first: tuple[Array, Array], second: tuple[Array, Array]) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two Gaussians, each mean and covariance.

    The trace of the root is that of (C1^½ C2 C1^½)^½, which is symmetric: two eigendecompositions, no complex numbers.
    Source: M. Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017 (arXiv 1706.08500).
    """
    (mean, covariance), (other_mean, other_covariance) = first, second
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ other_covariance @ root
    trace = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    distance = np.sum((mean - other_mean) ** 2) + np.trace(covariance) + np.trace(other_covariance) - 2 * trace
    return float(max(distance, 0.0))


class FeatureNetwork:
    """Images to feature vectors, by any ONNX model: its output ``features``, or else its first.

    Args:
        path: The network; its one input takes images [batch, channels, height, width] in [-1, 1].
        reference: An ``.npz`` with ``mean`` and ``covariance`` of real images' features, or with images (under the
            network's input name or ``images``) to compute them from: floats in [-1, 1], or bytes.

    Raises:
        OnnxqError: the network has several inputs, or the reference holds neither.
    """

    def __init__(self, path: Path, reference: Path) -> None:
        self.session = Session(path)
        if len(self.session.input_names) != 1:
            raise OnnxqError(
                f"expected a feature network with one input, found {', '.join(self.session.input_names)} in {path}",
                hint="give --features a network that takes images alone",
            )
        names = self.session.own_output_names
        self.output = "features" if "features" in names else names[0]
        hint = "write mean and covariance, or images, with np.savez"
        arrays = read_arrays(reference, what="an .npz of reference features", hint=hint)
        covariance = next((arrays[name] for name in ("covariance", "cov", "sigma") if name in arrays), None)
        mean = next((arrays[name] for name in ("mean", "mu") if name in arrays), None)
        images = next((arrays[name] for name in (self.session.input_names[0], "images") if name in arrays), None)
        if mean is not None and covariance is not None:
            self.reference = (mean.astype(np.float64), covariance.astype(np.float64))
        elif images is not None:
            statistics = Features()
            for start in range(0, len(images), 64):
                statistics.update(self(_as_floats(images[start : start + 64])))
            self.reference = statistics.moments
        else:
            raise OnnxqError(
                f"expected mean and covariance, or images, in {reference}, found {', '.join(sorted(arrays))}",
                hint="write them with np.savez('reference.npz', mean=…, covariance=…)",
            )

    def __call__(self, images: Array) -> Array:
        """Features [samples, …] of images."""
        return np.asarray(self.session.run({self.session.input_names[0]: images}, [self.output])[0])


def _as_floats(images: Array) -> Array:
    """Bytes become numbers in [-1, 1]; pictures without a channel axis get one."""
    if images.dtype == np.uint8:
        images = images / np.float32(127.5) - 1
    return (images[:, None] if images.ndim == 3 else images).astype(np.float32)


@dataclass
class Sampled:
    """What was sampled, and how far it is from the float denoiser's.

    Attributes:
        images: By ``float`` and ``quantized``: the first samples [count, channels, …], drawn if there is a decoder.
        samples: All of the quantized denoiser's as they are, latents where those are; ``None`` if nobody asked.
        picture_range: Their values of black and white.
        numbers: The keys of ``--json``.
    """

    images: dict[str, Array]
    samples: Array | None
    picture_range: tuple[float, float]
    numbers: dict[str, Any]


def sample(
    samplers: dict[str, tuple[Sampler, Runnable]],
    count: int,
    shown: int,
    features: FeatureNetwork | None = None,
    advance: Advance | None = None,
    decoder: LatentDecoder | None = None,
    keeps_all: bool = False,
) -> Sampled:
    """Sample one denoiser, or a float and a quantized one with the same noise and conditions.

    Args:
        samplers: ``quantized`` alone, or with ``float``; the seed, the schedule and the guidance are the same.
        count: How many samples.
        shown: How many of them to keep as images.
        features: For Fréchet distances.
        advance: Called with the number of samples that are done.
        decoder: Draws the images, where samples are latents.
        keeps_all: Whether to keep all samples of the quantized denoiser as they are, beside the images.

    Returns:
        Images and numbers: ``trajectory_sqnr_db`` is the quantized network's prediction in each step on the float
        trajectory; ``same_seed_sqnr_db`` the samples x_t that each arrives at on its own, with the last step's result
        as ``same_seed_image_sqnr_db``; ``frechet_distance_*`` the distance of the images' features to the reference.
    """
    sampler, _ = samplers["quantized"]
    steps = len(sampler.schedule.timesteps)
    per_step, path_error = [Sqnr() for _ in range(steps)], [Sqnr() for _ in range(steps + 1)]
    statistics = {kind: Features() for kind in samplers}
    images: dict[str, list[Array]] = {kind: [] for kind in samplers}
    kept_samples: list[Array] = []
    low, high = picture_range = sampler.schedule.data_range if decoder is None else PICTURE_RANGE
    for start in range(0, count, sampler.batch):
        indices = range(start, min(count, start + sampler.batch))
        paths: dict[str, list[Array]] = {}
        for kind, (own, session) in sorted(samplers.items()):  # float first
            judge = _judge(samplers, per_step) if kind == "float" else None
            paths[kind] = list(_walk(own, session, indices, judge))
            kept = max(0, shown - start)
            result = paths[kind][-1]
            used = result[: None if features is not None else kept]
            drawn = used if decoder is None or not len(used) else decoder(used)
            if kept or not start:
                images[kind].append(drawn[:kept])
            if keeps_all and kind == "quantized":
                kept_samples.append(result)
            if features is not None:
                statistics[kind].update(features(np.clip((drawn - low) / (high - low) * 2 - 1, -1, 1)))
        if "float" in paths:
            for ratio, wanted, found in zip(path_error, paths["float"], paths["quantized"], strict=True):
                ratio.update(wanted, found)
        if advance is not None:
            advance(indices[-1] + 1)
    numbers: dict[str, Any] = {"samples": count, "steps": steps, "timesteps": sampler.schedule.timesteps}
    if "float" in samplers:
        ratios = [ratio.value for ratio in per_step]
        numbers["trajectory_sqnr_db"] = ratios
        numbers["worst_step_sqnr_db"] = min(value for value in ratios if value is not None)
        numbers["same_seed_sqnr_db"] = [ratio.value for ratio in path_error[1:]]
        numbers["same_seed_image_sqnr_db"] = path_error[-1].value
    if features is not None:
        for kind, seen in statistics.items():
            numbers[f"frechet_distance_{kind}"] = frechet_distance(seen.moments, features.reference)
    whole = {kind: np.concatenate(parts) for kind, parts in images.items()}
    return Sampled(whole, np.concatenate(kept_samples) if keeps_all else None, picture_range, numbers)


Judge = Callable[[int, dict[str, Array], Array], None]


def _judge(samplers: dict[str, tuple[Sampler, Runnable]], ratios: list[Sqnr]) -> Judge:
    own, session = samplers["quantized"]

    def judge(step: int, feed: dict[str, Array], raw: Array) -> None:
        ratios[step].update(raw, own.denoiser.predict(session, feed))

    return judge


def _walk(sampler: Sampler, session: Runnable, indices: range, judge: Judge | None) -> Iterator[Array]:
    """The samples before each step and after the last; x_t of one batch is all that is kept."""
    run = sampler.run(session, indices)
    for visit in run:
        if judge is not None:
            judge(visit.step, visit.feed, visit.raw)
        yield run.sample
    yield run.sample
