"""Norm tweaking: the distance, the closed form, what may change and what may not, and a real decoder."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import DATA

import onnxq
from onnxq.calibration.data import input_specs
from onnxq.calibration.generated_text import GeneratedText
from onnxq.errors import OnnxqError
from onnxq.learning.norms import channel_distance, closed_form_scale, norm_parameters
from onnxq.runtime import Session

STORIES = DATA / "language" / "stories260k.onnx"


def test_the_distance_is_that_of_means_and_unbiased_variances() -> None:
    first = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    second = torch.tensor([[1.0, 9, 3], [8, 5, 6]])
    assert channel_distance(first, first) == 0
    assert float(channel_distance(first, second)) == pytest.approx(29 / 3)


def test_the_closed_form_is_the_least_of_its_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weights = [torch.randn(rows, 24, generator=generator) for rows in (16, 40)]
    rounded = [(weight * 1.2).round() / 1.2 for weight in weights]
    products = (x.mT @ x / len(x)).to(torch.float64)
    found = closed_form_scale(products, weights, rounded)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        inputs = x.to(torch.float64)
        pairs = [
            (weight.to(torch.float64), code.to(torch.float64)) for weight, code in zip(weights, rounded, strict=True)
        ]
        errors = [(inputs @ exact.mT - inputs * scale @ code.mT).square().sum() / len(x) for exact, code in pairs]
        curvature = products * torch.stack([code.mT @ code for _, code in pairs]).sum(dim=0)
        return torch.stack(errors).sum() + 0.01 * curvature.diagonal().mean() * (scale - 1).square().sum()

    scale = found.clone().requires_grad_(True)
    loss(scale).backward()
    ones = torch.ones(24, dtype=torch.float64)
    assert scale.grad is not None and scale.grad.abs().max() < 1e-6 * loss(ones)
    assert loss(found) < loss(ones)


def test_the_model_writes_its_own_text(shared_data: object) -> None:
    model = ir.load(STORIES)
    specs = input_specs(model)
    first, again = (list(GeneratedText(model, specs, count=6, seed=3, length=20)) for _ in range(2))
    assert len(first) == 6 and all(row["input_ids"].shape == (20,) for row in first)
    np.testing.assert_array_equal([row["input_ids"] for row in first], [row["input_ids"] for row in again])
    # What it writes is likelier to it than random tokens are.
    session = Session(model)

    def surprise(tokens: np.ndarray) -> float:
        logits = session.run({"input_ids": tokens})[0][:, 4:-1].astype(np.float64)
        log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return -float(np.take_along_axis(log, tokens[:, 5:, None], -1).mean())

    written = np.stack([row["input_ids"] for row in first])
    random = np.random.default_rng(0).integers(0, 512, written.shape)
    assert surprise(written) < 0.5 * surprise(random)


def test_only_norms_change_and_held_out_text_comes_closer(shared_data: object) -> None:
    """int2 blocks on a real decoder: the codes and their scales stay, and both methods bring the output closer."""
    tokens = np.random.default_rng(0).integers(3, 512, (1, 48))
    data = [{"input_ids": np.stack([row["input_ids"] for row in GeneratedText(
        ir.load(STORIES), input_specs(ir.load(STORIES)), count=16, seed=1, length=48)])}]  # fmt: skip
    options = {"recipe": "norm-tweaking", "weights": "int3:32"}
    still = onnxq.quantize(STORIES, data, **options, knobs={"rate": 0.0})
    norms = set(norm_parameters(ir.load(STORIES).graph))
    assert len(norms) == 11
    reference = Session(STORIES).run({"input_ids": tokens})[0]

    def error(result: onnxq.Result) -> float:
        return float(np.square(Session(result.model, optimize=False).run({"input_ids": tokens})[0] - reference).mean())

    for method in ("gradient", "closed_form"):
        tweaked = onnxq.quantize(STORIES, data, **options, knobs={"method": method})
        before, after = (
            {name: value.const_value.numpy() for name, value in result.model.graph.initializers.items()}
            for result in (still, tweaked)
        )
        changed = {name for name, array in after.items() if not np.array_equal(array, before[name])}
        assert changed and changed <= norms
        assert tweaked.numbers["sqnr_db"] > still.numbers["sqnr_db"]
        assert error(tweaked) < error(still) * 1.05  # tokens at random are far from what it learned on


def test_what_does_not_fit_is_refused(shared_data: object) -> None:
    words = (({"base": "awq"}, "base of nearest, gptq"), ({"method": "exact"}, "method of gradient, closed_form"))
    for knobs, message in words:
        with pytest.raises(OnnxqError, match=message):
            onnxq.quantize(STORIES, [{"input_ids": np.ones((1, 8), np.int64)}], recipe="norm-tweaking", knobs=knobs)
