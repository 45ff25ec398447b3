"""Bits of activations by the step of the sampler: the rule, and the graphs with their index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS

import onnxq
from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion.router import Router
from onnxq.diffusion.schedule_file import ASSUMED_DIFFUSION
from onnxq.diffusion.source import open_sampler
from onnxq.diffusion.step_precision import choose, forward_snr_db
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

UNET = MODELS / "fashion_unet_guided.onnx"


def test_few_bits_serve_the_noisy_steps() -> None:
    """The noise of the forward process falls along the sampler and that of quantization grows: one change."""
    forward = np.linspace(-30, 40, 50)
    low, high = (dict(enumerate(np.linspace(top, 0, 50))) for top in (20, 35))
    chosen = choose([low, high], forward)
    assert chosen == sorted(chosen) and set(chosen) == {0, 1}
    for step, setting in enumerate(chosen):
        assert (low[step] > forward[step]) == (setting == 0)
    sparse = {step: ratio for step, ratio in low.items() if step % 7 == 0}
    assert choose([sparse, high], forward) == chosen  # a line between the measured steps
    assert choose([dict.fromkeys(range(50), float("inf")), high], forward) == [0] * 50
    assert choose([dict.fromkeys(range(50), -50.0)] * 3, forward) == [2] * 50  # nothing suffices: the most


def test_the_forward_ratio_is_that_of_the_betas(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps(ASSUMED_DIFFUSION))
    sampler, _ = open_sampler(models.load(UNET), UNET, make_settings({"steps": 10, "scheduler": str(file)}))
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[int(time) for time in sampler.schedule.timesteps]]
    found = forward_snr_db(sampler.schedule)
    np.testing.assert_allclose(found, 10 * np.log10(alphas / (1 - alphas)), rtol=1e-3)
    assert found == sorted(found) and found[0] < -10


def test_two_graphs_share_what_is_equal(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    knobs = {"base": "ptq4dm", "low_activations": "int3"}
    result = onnxq.quantize(
        UNET, output=output, recipe="ptqd", knobs=knobs, steps=20, samples=60, weights="int8", activations="int8"
    )
    by_step = result.numbers["activations_by_step"]
    assert by_step == sorted(by_step) and set(by_step) == {"int3", "int8"}
    index = json.loads((tmp_path / "out.groups.json").read_text())
    assert [entry["steps"] for entry in index["groups"]] == [
        [step for step, name in enumerate(by_step) if name == kind] for kind in ("int3", "int8")
    ]
    low, high = (models.read(tmp_path / f"out.group{number}.onnx") for number in (0, 1))
    shared = [
        name
        for name, value in low.graph.initializers.items()
        if name in high.graph.initializers and getattr(value.const_value, "location", None) == "out.onnx.data"
    ]
    stored = sum(low.graph.initializers[name].const_value.nbytes for name in shared)
    assert stored > 0.8 * models.initializer_bytes(low)
    router = Router(tmp_path / "out.groups.json")
    sample = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    labels = np.asarray([1, 2])
    for number, entry in enumerate(index["groups"]):
        time = entry["timesteps"][0]
        feed = {"x": sample, "t": np.full(2, time, np.int64), "y": labels}
        expected = Session(tmp_path / f"out.group{number}.onnx").run(feed)[0]
        np.testing.assert_array_equal(router.predict(sample, time, y=labels), expected)


def test_bits_by_step_need_a_diffusion(shared_data: Path) -> None:
    path = shared_data / "denoisers" / "mnist_dit_guided.onnx"
    with pytest.raises(OnnxqError, match="products of alpha"):
        onnxq.quantize(path, recipe="ptqd", knobs={"base": "ptq4dm", "low_activations": "int4"}, steps=3, samples=6)
