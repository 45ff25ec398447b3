"""Mean errors that are images: how they are found, when they are kept, and how the graph takes them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from test_trajectory import CLOCK

import onnxq
from onnxq.diffusion.mean_image import ErrorImage, mean_image, worth_storing
from onnxq.diffusion.noise_correction import Correction
from onnxq.passes.correct_prediction import CorrectPrediction
from onnxq.runtime import Session

NONE = Correction(0.0, np.zeros(2), 0.0)
PATTERN = np.outer([1.0, -1.0], np.sin(np.arange(64))).reshape(2, 8, 8)


def halves(image: np.ndarray, rows: int, seed: int) -> tuple[ErrorImage, ErrorImage]:
    generator = np.random.default_rng(seed)
    found = (ErrorImage(), ErrorImage())
    for half in found:
        for _ in range(rows):
            exact = generator.standard_normal((1, 2, 8, 8))
            half.update(exact, exact + image + 0.5 * generator.standard_normal(exact.shape))
    return found


def test_an_image_is_found_again_and_shrunk_by_its_noise() -> None:
    image = 0.3 * PATTERN
    image = image - image.mean(axis=(1, 2), keepdims=True)
    pair = halves(image, 4, seed=0)
    found, gain = mean_image(pair, NONE)
    both = ErrorImage()
    for half in pair:
        both.merge(half)
    raw, noise = both.mean(NONE)
    assert noise == pytest.approx(0.25 / 8, rel=0.1)  # of the mean of eight samples
    assert np.mean((found - image) ** 2) < 0.8 * np.mean((raw - image) ** 2)
    assert 0 < gain < np.mean(image**2)  # of half the samples, on the others


def test_noise_alone_gives_no_image() -> None:
    """On other samples the error grows by less than a hundredth, whatever was found."""
    for seed in range(20):
        found, _ = mean_image(halves(np.zeros((2, 8, 8)), 4, seed), NONE)
        assert np.mean(found**2) < 0.01 * 0.25
    assert not mean_image(halves(PATTERN, 1, 0), NONE)[0].any()  # of one sample nothing is known


def test_what_the_correction_of_channels_leaves_is_looked_at() -> None:
    """Slope and means of channels are taken out before."""
    generator = np.random.default_rng(0)
    correction = Correction(0.25, np.asarray([0.3, -0.2]), 0.0)
    pair = (ErrorImage(), ErrorImage())
    for half in pair:
        for _ in range(3):
            exact = generator.standard_normal((1, 2, 8, 8))
            half.update(exact, 1.25 * exact + correction.mean.reshape(1, 2, 1, 1))
    assert np.abs(mean_image(pair, correction)[0]).max() < 1e-9
    assert np.abs(pair[0].mean(NONE)[0]).max() > 0.1


def test_images_are_stored_where_they_take_error_off_what_is_sampled() -> None:
    """In any case where one counts; others, the best first, as long as they are small; never one that does not help."""
    images = {0: (PATTERN, 0.02), 1: (PATTERN, 0.02), 2: (PATTERN, 0.0), 3: (PATTERN, 0.03)}
    errors, weights = dict.fromkeys(range(4), 0.1), {0: 10.0, 1: 0.1, 2: 10.0, 3: 0.1}
    size = 4 * PATTERN.size
    assert list(worth_storing(images, errors, weights, 0)) == [0]
    assert list(worth_storing(images, errors, weights, 3 * size)) == [0, 3]
    assert list(worth_storing(images, errors, weights, 4 * size)) == [0, 1, 3]
    assert list(worth_storing(images, errors, dict.fromkeys(range(4), 1.0), 0)) == [0, 1, 3]


def test_the_graph_adds_the_image_in_its_step_alone() -> None:
    model = ir.from_onnx_text(CLOCK)
    plain = Session(model)
    image = np.arange(16.0).reshape(1, 4, 4)
    times = np.asarray([0.9, 0.5, 0.1])
    CorrectPrediction("v", "t", times, np.ones(3), np.asarray([[0.5], [0.0], [0.0]]), {1: image})(model)
    assert model.graph.initializers["correction_images"].shape == (2, 1, 4, 4)
    corrected = Session(model)
    x = np.random.default_rng(0).standard_normal((3, 1, 4, 4)).astype(np.float32)
    feed = {"x": x, "t": times.astype(np.float32)}
    added = corrected.run(feed)[0] - plain.run(feed)[0]
    np.testing.assert_allclose(added, np.stack([np.full((1, 4, 4), 0.5), image, np.zeros((1, 4, 4))]), atol=1e-6)


def test_the_recipe_keeps_the_first_step_of_a_real_denoiser(shared_data: Path) -> None:
    """It starts at a signal of 5e-5: its inputs, a layer and its mean image are all for the first step."""
    path = shared_data / "denoisers" / "mnist_unet_attention.onnx"
    knobs = {"iterations": 1, "start": "nearest", "trajectories": 8, "kept_steps": 8}
    made = onnxq.quantize(path, recipe="diffusion", knobs=knobs, steps=10, weights="int4", activations="int8")
    images = made.model.graph.initializers["correction_images"]
    rows = made.model.graph.initializers["correction_rows"].const_value
    assert images.const_value is not None and not images.const_value.numpy()[0].any()
    assert rows is not None and rows.numpy()[0] == 1 and rows.numpy().max() + 1 == len(images.const_value.numpy())
    moved = [name for name, why in made.numbers["left_float"].items() if "error of the images" in why]
    assert 1 <= len(moved) <= 3 and any(name.startswith("node_conv2d_24") for name in moved)
