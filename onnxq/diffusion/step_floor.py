"""Layers that stay float so that no sampler step loses too much.

In the last, least noisy steps a denoiser has to find noise that is far smaller than the picture: an activation whose
codes are a hundredth of the picture apart no longer holds it. Per step, and not on average, a few layers near the
input and the output make nearly all of the error there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxq import model as models
from onnxq.calibration import calibrate
from onnxq.calibration.data import STEP_KEY
from onnxq.calibration.observers import Observer
from onnxq.calibration.weight_ranges import Search, once
from onnxq.job import Job
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.passes.lower_weights import LowerWeights
from onnxq.ranking import Cost, Ranking, in_worst_step
from onnxq.runtime import Session
from onnxq.scheme import Scheme
from onnxq.sensitivity import ErrorPower, Judged, Probe, error_power, judged_samples
from onnxq.switchboard import Layer, activations_of, layers_of
from onnxq.targets import Placement
from onnxq.targets.placement import schemes_of

ROWS = 96  # samples that candidates are judged on
RANKING_STEPS = 4  # the worst steps, in which single layers are judged
SPREAD_DB = 10.0  # by which single samples differ in the last step, where what is left of the noise is their own
RANKING_ROWS = 16
LARGE_BYTES = 64 << 20  # of weights; above, a quarter of the rows has to do, or judging would outlast sampling
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
    search_ = FloorSearch(job, observer, search)
    with job.progress.stage("steps", "Judging steps"):
        before = after = search_.judge(0)
        worst = sorted(before.by_step_db, key=lambda step: before.by_step_db[step])[:RANKING_STEPS]
        if floor_db > 0 and before.worst_db < floor_db + SPREAD_DB:
            before = after = search_.look_closer(worst)
        if 0 < floor_db > _held_db(before):
            search_.rank(worst)
            count = search_.shortest(floor_db)
            after = search_.judge(count)
            if _held_db(after) < floor_db:
                job.warnings.append(
                    f"a sampler step keeps only {_held_db(after):.1f} dB although {count} layers stay float for it"
                )
            for name in search_.ranking.first(count):
                job.exceptions[name] = search_.spared
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


class FloorSearch:
    """Candidates: which layers are spared (in float, unless another scheme is given), and how good the rest then is."""

    ranking: Ranking

    def __init__(self, job: Job, observer: Observer, search: Search | None, spared: Scheme | None = None) -> None:
        self.job, self.observer = job, observer
        self.search = None if search is None else once(search)  # each candidate is the same network
        self.spared = spared or job.target.scheme("float", "float")
        placement = job.place(job.model.graph)
        schemes = schemes_of(job.scheme, job.exceptions)
        self.layers: list[Layer] = layers_of(job.model.graph, schemes, placement.left_float)
        self.statistics = job.observe(activation_roots(placement) | set(activations_of(job.model.graph, self.layers)))
        self._float = Session(job.model, device=job.settings.device)
        self._part = 4 if models.initializer_bytes(job.model) > LARGE_BYTES else 1
        self.samples: list[Judged] = judged_samples(self._float, job.source, job.specs, ROWS // self._part)
        self._judged: dict[int, ErrorPower] = {}

    def look_closer(self, steps: list[int]) -> ErrorPower:
        """Judge these steps on as many samples as all of them were judged on: till now each had two or three."""
        rows, job = ROWS // self._part, self.job
        rest = set(self.judge(0).by_step_db) - set(steps)
        self.samples = judged_samples(self._float, job.source, job.specs, rows, steps)
        if rest:
            self.samples += judged_samples(self._float, job.source, job.specs, rows, rest)
        self._judged.clear()
        return self.judge(0)

    def rank(self, steps: list[int], cost: Cost = in_worst_step) -> None:
        """Order the layers by the error that each spares in these steps, largest first, as far as it will be needed."""
        job = self.job
        samples = judged_samples(self._float, job.source, job.specs, RANKING_ROWS // self._part, steps)
        probe = Probe(job.model, samples, self.statistics, job.specs, self.observer, self.search, job.settings.device)
        layers = [replace(layer, scheme=self._lost(layer.scheme)) for layer in self.layers]
        self.ranking = Ranking(replace(probe, workers=job.workers), layers, cost)

    def _lost(self, scheme: Scheme) -> Scheme:
        """What a layer is rid of where it is spared; what stays as it is makes no difference, and counts as float."""
        in_float = self.job.target.scheme("float", "float")
        return Scheme(
            scheme.weights if scheme.weights != self.spared.weights else in_float.weights,
            scheme.activations if scheme.activations != self.spared.activations else in_float.activations,
        )

    def shortest(self, floor_db: float) -> int:
        """How many of the first layers have to be float, if fewer never help more; half if that is not enough."""
        low, high = 0, len(self.layers) // 2
        for count in _growing(high):
            if _held_db(self.judge(count)) >= floor_db:
                high = count
                break
            low = count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _held_db(self.judge(middle)) >= floor_db else (middle, high)
        return high

    def judge(self, count: int) -> ErrorPower:
        """The error of the target's own graph with the first so many layers spared."""
        if count not in self._judged:
            candidate = self._candidate(self.ranking.first(count) if count else [])
            session = Session(candidate, optimize=False, device=self.job.settings.device)
            self._judged[count] = error_power(session.run, self.samples)
        return self._judged[count]

    def _candidate(self, spared: Sequence[str]) -> ir.Model:
        model = self.job.model.clone()
        placement = self.job.place(model.graph, dict.fromkeys(spared, self.spared))
        self.job.observe(activation_roots(placement))  # a float layer may move its neighbours' pairs
        InsertQDQ(placement.sites)(model)
        calibrate.set_activation_scales(model, self.statistics, self.observer)
        calibrate.set_weight_scales(model, self.search)
        LowerWeights()(model)
        return model


def activation_roots(placement: Placement) -> set[str]:
    """Names of the activations whose ranges a placement needs."""
    values = [site.like or site.value for site in placement.sites if not site.value.is_initializer()]
    return {value.name or "" for value in values}
