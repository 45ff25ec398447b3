"""What an error in a sampler step does to the images, and which inputs follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_denoiser_recipes import NETWORK, SHAPES
from test_trajectory import CLOCK, sampler_of

import onnxq
from onnxq.diffusion.influence import image_influence
from onnxq.diffusion.selection import by_influence, select
from onnxq.runtime import Feed, Session

DDIM = {
    "_class_name": "DDIMScheduler",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "timestep_spacing": "trailing",
}
TIMELESS = "f = Cast <to=1> (t)  n = Mul (f, zero)  a = Unsqueeze (n, axes)  z = Mul (x, one)"


def test_a_constant_velocity_moves_the_image_by_its_share_of_the_path() -> None:
    """Velocity t_k in step k of T: an error e of it moves the image by e/T, so that steps count as t_k² does."""
    model, steps = ir.from_onnx_text(CLOCK), 9
    sampler = sampler_of(model, {"_class_name": "FlowMatching"}, steps)
    influence = image_influence(sampler, Session(model))
    images = sampler.run(Session(model), range(4))
    list(images)
    times = np.asarray(sampler.schedule.timesteps)
    expected = times**2 / steps**2 / np.mean(images.sample**2)
    probed = [1, 2, 4, 8]
    np.testing.assert_allclose(influence[probed], expected[probed], rtol=1e-2)
    assert influence[0] < 1e-6 * influence[1]  # nothing of a prediction of 0 is disturbed
    assert influence[2] < influence[3] < influence[4]


def test_the_network_runs_only_where_a_sampler_goes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine steps undisturbed; disturbed in step 0, 1, 2, 4 and 8, those that come after it."""

    class Counting:
        def __init__(self) -> None:
            self.session, self.count = Session(model), 0

        def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
            self.count += 1
            return self.session.run(feed, outputs)

    model = ir.from_onnx_text(CLOCK)
    counting = Counting()
    sampler = sampler_of(model, {"_class_name": "FlowMatching"}, 9)
    influence = image_influence(sampler, counting)
    assert counting.count == 9 + 8 + 7 + 6 + 4
    monkeypatch.setattr(type(sampler), "batch", 3)
    np.testing.assert_allclose(image_influence(sampler, Session(model)), influence, rtol=1e-5)


def test_a_first_step_without_signal_counts_most() -> None:
    """A network that takes what it sees for noise: the first image is its error over the signal, clipped."""
    text = CLOCK.replace("float zero = {0.0}", "float zero = {0.0}, float one = {1.0}").replace(
        "float[N] t", "int64[N] t"
    )
    text = text.replace("a = Unsqueeze (t, axes)  z = Mul (x, zero)", TIMELESS)
    model = ir.from_onnx_text(text)
    for betas, most in (("squaredcos_cap_v2", True), ("linear", False)):
        sampler = sampler_of(model, {**DDIM, "beta_schedule": betas}, 8)
        influence = image_influence(sampler, Session(model))
        assert (influence[0] > 100 * influence[1:].max()) == most
        assert influence[1:].max() > influence[-1]


def test_inputs_are_spread_evenly_and_by_influence() -> None:
    steps, samples, kept = 20, 16, 10
    for influence in (np.ones(steps), 0.5 ** np.arange(steps), 2.0 ** np.arange(steps), np.eye(steps)[0] + 1e-9):
        chosen = by_influence(influence, samples, kept, seed=0)
        counts = chosen.sum(axis=0)
        assert counts.sum() == samples * kept and counts.min() >= 1
        even = select("uniform", samples, range(steps), kept // 2, 0)
        assert chosen[:samples][even].all()
        last = steps - chosen[:, ::-1].argmax(axis=1)
        assert last.sum() <= 2 * samples * steps  # runs of the network
    assert counts[0] >= samples * kept // 2 and chosen[samples:, 0].all() and not chosen[samples:, 1:].any()
    np.testing.assert_array_equal(chosen, by_influence(influence, samples, kept, seed=0))


def test_the_recipe_takes_its_inputs_where_errors_count(tmp_path: Path) -> None:
    """More trajectories begin than end; the rows are as many as without."""
    path = tmp_path / "denoiser.onnx"
    ir.save(add_weights(NETWORK, SHAPES), path)
    scheduler = tmp_path / "denoiser.scheduler.json"
    scheduler.write_text(
        '{"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}'
    )
    options = {"steps": 8, "weights": "int4", "activations": "int8"}
    knobs = {"trajectories": 8, "kept_steps": 4, "iterations": 2}
    samples = {}
    for selection in ("influence", "uniform"):
        result = onnxq.quantize(path, recipe="diffusion", knobs=knobs | {"selection": selection}, **options)
        samples[selection] = result.numbers["samples"]
        assert 0 <= result.numbers["foretold_image_error"] < np.inf
    assert abs(samples["influence"] - samples["uniform"]) <= 8
