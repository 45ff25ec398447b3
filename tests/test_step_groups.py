"""apq-dm's search: mixtures of quantizers, steps picked by what is undecided, and what comes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_time_scales import OPTIONS, QUICK, denoiser  # noqa: F401

import onnxq
from onnxq.diffusion.selection import ActiveSelection
from onnxq.errors import OnnxqError

torch = pytest.importorskip("torch")


def mixture(sharpness: float, groups: int = 4) -> object:
    from onnxq.learning.quantizers import Quantizer
    from onnxq.learning.step_groups import GroupedQuantizer

    quantizer = Quantizer("x", "y", "s", "z", -8, 7, None, None, None, False)
    scales = np.geomspace(0.05, 0.8, groups)
    return GroupedQuantizer(quantizer, 0.0, scales, np.arange(groups) % groups, sharpness, "cpu")


def test_a_decided_mixture_is_the_quantizer_itself() -> None:
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    decided = mixture(1e4)
    for decided.step in range(4):
        scale = decided.log_scales[decided.step].exp()
        alone = (value / scale).round().clamp(-8, 7) * scale
        assert torch.equal(decided(value), alone)
        decided.hard = True
        assert torch.equal(decided(value), alone)
        decided.hard = False
        assert decided.entropy(decided.step) == 0


def test_an_undecided_mixture_is_the_mean_of_all() -> None:
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    open_ = mixture(0.0)
    scales = open_.log_scales.exp()
    mean = torch.stack([(value / scale).round().clamp(-8, 7) * scale for scale in scales]).mean(0)
    torch.testing.assert_close(open_(value), mean)
    torch.testing.assert_close(open_.entropy(0), torch.tensor(1.0))


def test_steps_come_in_turn_where_all_are_alike() -> None:
    active = ActiveSelection(np.ones(7, bool))
    assert [active.pick(np.full(7, 0.3)) for _ in range(14)] == [*range(7), *range(7)]


def test_an_undecided_step_comes_first_and_absent_ones_never() -> None:
    undecided = np.asarray([0.1, 0.1, 0.9, 0.1])
    assert ActiveSelection(np.ones(4, bool)).pick(undecided) == 2
    active = ActiveSelection(np.asarray([True, True, False, True]))
    assert 2 not in {active.pick(undecided) for _ in range(20)}


def test_choices_are_taken_and_kept_only_if_they_are_better(denoiser: Path) -> None:  # noqa: F811
    knobs = {**QUICK, "groups": 3, "partition": "learned", "iterations": 150}
    result = onnxq.quantize(denoiser, weights="int8", activations="int4", knobs=knobs, **OPTIONS)
    learned = result.numbers["time_scales"]["learned"]
    assert learned["decided"] >= 0.95
    assert learned["learned"] == pytest.approx(learned["relaxed"], rel=0.01)
    assert learned["kept"] == (learned["learned"] < learned["first"])
    assert sum(learned["visits"]) == 150
    assert min(learned["visits"]) >= 1


def test_groups_that_all_share_are_not_learned(denoiser: Path) -> None:  # noqa: F811
    with pytest.raises(OnnxqError, match="of each activation's own"):
        onnxq.quantize(denoiser, knobs={"partition": "learned", "lowering": "subgraphs"}, **OPTIONS)
