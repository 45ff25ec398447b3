"""Statistics merge, and each range rule does what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.calibration import observers
from onnxq.calibration.observers import OBSERVERS, Range, Statistics
from onnxq.formats import parse_format

INT8, UINT8 = parse_format("int8")[0], parse_format("uint8")[0]


def statistics(*batches: np.ndarray) -> Statistics:
    found = Statistics()
    for batch in batches:
        found.update(batch.astype(np.float32), sampled=batch.size)
    return found


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from(sorted(OBSERVERS)), st.booleans())
def test_merging_parts_equals_seeing_all(seed: int, parts: int, rule: str, symmetric: bool) -> None:
    generator = np.random.default_rng(seed)
    batches = [generator.standard_normal((4, 50)) * generator.gamma(1.0) for _ in range(parts)]
    whole, merged = statistics(*batches), Statistics()
    for batch in batches:
        merged.merge(statistics(batch))
    assert (merged.low, merged.high, merged.count, merged.rows) == (whole.low, whole.high, whole.count, whole.rows)
    assert OBSERVERS[rule](merged, INT8, symmetric) == OBSERVERS[rule](whole, INT8, symmetric)


@pytest.mark.parametrize("rule", sorted(OBSERVERS))
@pytest.mark.parametrize("values", [np.zeros(100), np.full(100, 3.0), np.full(100, -3.0), np.array([1e-30, 1e30])])
def test_odd_tensors_give_finite_ranges_around_zero(rule: str, values: np.ndarray) -> None:
    for symmetric in (True, False):
        found = OBSERVERS[rule](statistics(values[None]), INT8, symmetric)
        assert np.isfinite([found.low, found.high]).all() and found.low <= 0 <= found.high


def test_minmax_is_everything_and_the_others_cut_an_outlier() -> None:
    values = np.random.default_rng(0).standard_normal((8, 10000))
    values[0, 0] = 100.0
    seen = statistics(values)
    assert observers.minmax(seen, INT8, True).high == 100.0
    assert observers.mse(seen, INT8, True).high < 80  # one value in 80,000 may still cost more than finer steps gain
    for rule in ("entropy", "percentile", "robust", "mean_extremes"):
        assert OBSERVERS[rule](seen, INT8, True).high < 30, rule


def test_mse_finds_the_clip_that_rounding_measures() -> None:
    """The closed form agrees with quantizing for real, within a candidate's distance."""
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    chosen = observers.mse(statistics(values[None]), parse_format("int4")[0], True).high
    limit = float(np.abs(values).max())
    candidates = np.linspace(0.1, 1, 120) * limit

    def error(clip: float) -> float:
        step = clip / 7
        return float(np.mean((np.clip(np.rint(values / step), -8, 7) * step - values) ** 2))

    best = min(error(clip) for clip in candidates)
    assert error(chosen) < 1.03 * best


def test_relu_outputs_keep_zero_as_their_low_end() -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal((4, 5000)), 0)
    for rule in OBSERVERS:
        assert OBSERVERS[rule](statistics(values), UINT8, False).low == 0.0


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(observers.OnnxqError, match="range rule"):
        observers.get("guess")


def test_range_holds_two_ends() -> None:
    assert Range(-1.0, 2.0).high == 2.0


@pytest.mark.parametrize("symmetric", [False, True])
def test_robust_covers_scores_of_which_each_sample_has_one(symmetric: bool) -> None:
    """Speech or not: most samples lie far to one side, and the mean over them is no extreme."""
    generator = np.random.default_rng(0)
    scores = np.where(generator.random(1000) < 0.3, -6.0, 9.0) + generator.standard_normal(1000)
    seen = OBSERVERS["robust"](statistics(scores.reshape(1000, 1)), INT8 if symmetric else UINT8, symmetric)
    assert seen.low < -6 and seen.high > 10


@pytest.mark.parametrize("symmetric", [True, False])
def test_robust_keeps_a_channel_that_every_sample_reaches_and_cuts_what_a_rare_one_does(symmetric: bool) -> None:
    generator = np.random.default_rng(0)
    batches = [generator.standard_normal((1, 512, 768)) for _ in range(4)]
    for batch in batches:
        batch[:, 0, 7] = 40.0  # one value of 393,216 in each sample
    number_format = INT8 if symmetric else UINT8
    regular = statistics(*batches)
    assert OBSERVERS["mse"](regular, number_format, symmetric).high < 30
    assert OBSERVERS["robust"](regular, number_format, symmetric).high == pytest.approx(0.8 * 40, rel=1e-3)
    narrow = parse_format("int4" if symmetric else "uint4")[0]
    assert OBSERVERS["robust"](regular, narrow, symmetric) == OBSERVERS["mse"](regular, narrow, symmetric)
    rare = statistics(*(np.where(batch == 40.0, 4.0, batch) for batch in batches[1:]), batches[0] * 10)
    typical = OBSERVERS["mean_extremes"](rare, number_format, symmetric)
    assert OBSERVERS["robust"](rare, number_format, symmetric).high <= 1.5 * max(typical.high, -typical.low) + 1e-6
