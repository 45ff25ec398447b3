"""Recipes for denoisers take back the mean shift of rounded weights: along a sampler it adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxq
from onnxq import model as models
from onnxq.config import make_settings
from onnxq.diffusion.source import open_sampler
from onnxq.runtime import Session

UNET = Path("models/fashion_unet_guided.onnx").absolute()
SAMPLER: dict[str, Any] = {"steps": 5, "scheduler": str(UNET.with_suffix(".scheduler.json"))}
WIDTHS = {"weights": "int4", "activations": "int8"}


def images(model: Any) -> np.ndarray:
    sampler, _ = open_sampler(models.load(UNET), UNET, make_settings(SAMPLER | {"seed": 9}))
    run = sampler.run(Session(model, optimize=False), range(8))
    list(run)
    return run.sample


def image_error(recipe: str, **knobs: object) -> float:
    """Squared error of the images that the same noise ends in, as part of their power."""
    made = onnxq.quantize(UNET, recipe=recipe, knobs=knobs, samples=40, **WIDTHS, **SAMPLER)
    wanted = images(UNET)
    return float(np.sum((images(made.model) - wanted) ** 2) / np.sum(wanted**2))


@pytest.mark.parametrize("recipe", ["ptq4dm", "apq-dm"])
def test_corrected_biases_keep_images(recipe: str) -> None:
    pytest.importorskip("diffusers")
    knobs = {"trajectories": 8, "kept_steps": 5}
    corrected, plain = (image_error(recipe, bias_correction=value, **knobs) for value in (True, False))
    assert corrected < 0.5 * plain


def test_training_starts_from_corrected_biases_and_its_teacher_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is the float network, though the student's biases were changed in the graph that both had."""
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    import torch

    from onnxq.autograd.interpreter import TorchGraph
    from onnxq.learning.quantizers import as_float, find
    from onnxq.recipes import q_dm

    learn, found = q_dm.distil_network, {}

    def noting(job: Any, *arguments: Any, teacher: Session | None = None, **options: Any) -> None:
        found["teacher"], found["start"] = teacher, job.model.clone()
        learn(job, *arguments, teacher=teacher, **options)

    monkeypatch.setattr(q_dm, "distil_network", noting)
    knobs = {"trajectories": 2, "kept_steps": 5, "steps": 1, "taq": "none"}
    onnxq.quantize(UNET, recipe="q-dm", knobs=knobs, samples=10, **WIDTHS, **SAMPLER)
    sampler, _ = open_sampler(models.load(UNET), UNET, make_settings(SAMPLER | {"seed": 9}))
    visit = next(iter(sampler.run(Session(UNET), range(4))))
    np.testing.assert_allclose(sampler.denoiser.predict(found["teacher"], visit.feed), visit.raw, atol=1e-4)
    graph, name = TorchGraph(found["start"]), sampler.denoiser.output
    feed = {key: torch.from_numpy(value) for key, value in visit.feed.items()}
    with torch.no_grad():
        shifted = graph.run(feed, [name], replaced=as_float(find(graph.model.graph)))[name].numpy()
    assert np.abs(shifted - visit.raw).max() > 1e-2
