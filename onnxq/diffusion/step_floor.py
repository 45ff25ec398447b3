"""Layers that stay float so that no sampler step loses too much.

In the last, least noisy steps a denoiser has to find noise that is far smaller than the picture: an activation whose
codes are a hundredth of the picture apart no longer holds it. Per step, and not on average, a few layers near the
input and the output make nearly all of the error there.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.calibration.data import STEP_KEY
from onnxq.calibration.observers import Observer
from onnxq.calibration.weight_ranges import Search
from onnxq.diffusion.sparing import RANKING_STEPS, SparingSearch
from onnxq.job import Job
from onnxq.sensitivity import ErrorPower

SPREAD_DB = 10.0  # by which single samples differ in the last step, where what is left of the noise is their own
GROWTH = 1.5  # of the number of float layers, until the floor holds


@dataclass(frozen=True)
class Floor:
    """What was found.

    Attributes:
        before: The error with every layer quantized.
        after: The error with some in float.
        float_layers: Those, the most sensitive first.
    """

    before: ErrorPower
    after: ErrorPower
    float_layers: list[str]


def hold_floor(job: Job, observer: Observer, search: Search | None, floor_db: float) -> Floor | None:
    """Give the most sensitive layers a float scheme in ``job.exceptions`` until every step has ``floor_db``.

    Layers are ranked by the error that each makes alone in the worst steps; of that ranking the shortest beginning
    that suffices stays float. Everything is measured on calibration samples, on the graph that the target will run.
    With a floor of 0 steps are judged and nothing changes; at most half of the layers stay float for it.

    Returns:
        What was found, or ``None`` where samples carry no steps.
    """
    if STEP_KEY not in next(iter(job.source), {}):
        return None
    layers = SparingSearch(job, observer, search)
    with job.progress.stage("steps", "Judging steps"):
        before = after = layers.judge(0)
        worst = sorted(before.by_step_db, key=lambda step: before.by_step_db[step])[:RANKING_STEPS]
        if floor_db > 0 and before.worst_db < floor_db + SPREAD_DB:
            before = after = layers.look_closer(worst)
        if 0 < floor_db > _held_db(before):
            layers.rank(worst)
            count = _shortest(layers, floor_db)
            after = layers.judge(count)
            if _held_db(after) < floor_db:
                job.warnings.append(
                    f"a sampler step keeps only {_held_db(after):.1f} dB although {count} layers stay float for it"
                )
            for name in layers.ranking.first(count):
                job.exceptions[name] = layers.spared
                job.reasons[name] = f"in float every sampler step keeps {floor_db:g} dB"
        job.step_sqnr_db = after.by_step_db
    return Floor(before, after, list(job.reasons))


def _held_db(power: ErrorPower) -> float:
    """What the worst step keeps, with a margin for the samples that were not seen."""
    return min(power.cautious_by_step_db.values(), default=float("inf"))


def _growing(total: int) -> list[int]:
    counts = [min(1, total)]
    while counts[-1] < total:
        counts.append(min(total, max(counts[-1] + 1, round(counts[-1] * GROWTH))))
    return counts


def _shortest(layers: SparingSearch, floor_db: float) -> int:
    """How many of the first layers have to be float, if fewer never help more; half if that is not enough."""
    low, high = 0, len(layers.layers) // 2
    for count in _growing(high):
        if _held_db(layers.judge(count)) >= floor_db:
            high = count
            break
        low = count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _held_db(layers.judge(middle)) >= floor_db else (middle, high)
    return high
