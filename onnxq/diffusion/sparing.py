"""Which layers of a denoiser are spared, and how good the rest then is, as the target will run it.

Floors of steps and errors of images ask the same two things: in what order layers are worth sparing (in float, or with
another scheme), and what every sampler step keeps when the first few of them are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from onnxq import model as models
from onnxq.calibration import calibrate
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
from onnxq.targets.placement import schemes_of

ROWS = 96  # samples that candidates are judged on
RANKING_STEPS = 4  # the worst steps, in which single layers are judged
RANKING_ROWS = 16
LARGE_BYTES = 64 << 20  # of weights; above, a quarter of the rows has to do, or judging would outlast sampling


class SparingSearch:
    """Candidates: which layers are spared (in float, unless another scheme is given), and how good the rest then is."""

    ranking: Ranking

    def __init__(self, job: Job, observer: Observer, search: Search | None, spared: Scheme | None = None) -> None:
        self.job, self.observer = job, observer
        self.search = None if search is None else once(search)  # each candidate is the same network
        self.spared = spared or job.target.scheme("float", "float")
        placement = job.place(job.model.graph)
        schemes = schemes_of(job.scheme, job.exceptions)
        self.layers: list[Layer] = layers_of(job.model.graph, schemes, placement.left_float)
        self.statistics = job.observe(placement.ranged | set(activations_of(job.model.graph, self.layers)))
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
        self.job.observe(placement.ranged)  # a float layer may move its neighbours' pairs
        InsertQDQ(placement.sites)(model)
        calibrate.set_activation_scales(model, self.statistics, self.observer)
        calibrate.set_weight_scales(model, self.search)
        LowerWeights()(model)
        return model
