"""Images of quantized denoisers, whoever made them, beside the float one's: error of steps, of images, of features.

    python tests/benchmarks/denoiser_images.py FLOAT.onnx [QUANTIZED.onnx …] [--features NET.onnx --reference NPZ]

Every model samples from the same noise. `worst` and `mean`: SQNR of the prediction in the steps of the float
trajectory, over a few samples. `image error`: squared, over the power of the float images. `distance`: the Fréchet
distance of the images' features to the reference's, with its difference to float's in percent; `to float`: that to the
float images of the same noise. `float, seed N` is the float model from other noise, which says how far distances spread
without any quantization.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path

import numpy as np

from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion import comparison
from onnxq.diffusion.source import open_sampler
from onnxq.diffusion.trajectory import Sampler
from onnxq.runtime import Session


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--scheduler", default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--judged", type=int, default=16, help="samples for the SQNR of steps")
    parser.add_argument("--seeds", type=int, default=3, help="of the float model")
    arguments = parser.parse_args()
    settings = {"steps": arguments.steps, "guidance": arguments.guidance, "scheduler": arguments.scheduler}
    sampler, _ = open_sampler(models.load(arguments.float), arguments.float, make_settings({**settings, "seed": 1000}))
    network = comparison.FeatureNetwork(arguments.features, arguments.reference) if arguments.features else None
    session = Session(arguments.float)
    print(f"{'model':40} {'worst':>6} {'mean':>6} {'image error':>12} {'distance':>9} {'':>8} {'to float':>9}")
    exact = images(sampler, session, arguments.samples)
    wanted = None if network is None else features(network, sampler, exact)
    own = 0.0 if network is None or wanted is None else comparison.frechet_distance(wanted.moments, network.reference)
    print(f"{'float':40} {'':6} {'':6} {'':12} {own:9.3f}", flush=True)
    for seed in range(1, arguments.seeds):
        other = images(dataclasses.replace(sampler, seed=1000 + seed), session, arguments.samples)
        print(f"{f'float, seed {seed}':40} {'':6} {'':6} {'':12} {distances(network, sampler, other, wanted, own)}")
    for path in arguments.models:
        literal = models.get_metadata(models.read(path)).get("target", "cpu") != "cpu"
        quantized = Session(path, optimize=not literal)
        pair = {"float": (sampler, session), "quantized": (sampler, quantized)}
        ratios = comparison.sample(pair, arguments.judged, 0).numbers["trajectory_sqnr_db"]
        found = images(sampler, quantized, arguments.samples)
        error = float(np.sum((found - exact) ** 2) / np.sum(exact**2))
        print(
            f"{path.stem[:40]:40} {min(ratios):6.1f} {statistics.mean(ratios):6.1f} {error:12.2e} "
            f"{distances(network, sampler, found, wanted, own)}",
            flush=True,
        )


def images(sampler: Sampler, session: Session, count: int) -> np.ndarray:
    """What the sampler ends in, for samples 0 to ``count``."""
    found = []
    for start in range(0, count, sampler.batch):
        run = sampler.run(session, range(start, min(count, start + sampler.batch)))
        for _ in run:
            pass
        found.append(run.sample)
    return np.concatenate(found)


def features(network: comparison.FeatureNetwork, sampler: Sampler, found: np.ndarray) -> comparison.Features:
    """Moments of the images' features."""
    low, high = sampler.schedule.data_range
    sums = comparison.Features()
    for start in range(0, len(found), 64):
        sums.update(network(np.clip((found[start : start + 64] - low) / (high - low) * 2 - 1, -1, 1)))
    return sums


def distances(
    network: comparison.FeatureNetwork | None,
    sampler: Sampler,
    found: np.ndarray,
    wanted: comparison.Features | None,
    own: float,
) -> str:
    """Fréchet distances to the reference and to the float images, as columns."""
    if network is None or wanted is None:
        return ""
    sums = features(network, sampler, found)
    distance = comparison.frechet_distance(sums.moments, network.reference)
    to_float = comparison.frechet_distance(sums.moments, wanted.moments)
    return f"{distance:9.3f} {100 * (distance / own - 1):+7.1f}% {to_float:9.4f}"


if __name__ == "__main__":
    main()
