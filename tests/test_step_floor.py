"""The layers that hold a step floor: found with few runs, and the float network runs over the data once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_temporal_features import NETWORK, SHAPES

from onnxq import model as models
from onnxq import switchboard, targets
from onnxq.calibration import observers
from onnxq.calibration.data import Iterables, Sample
from onnxq.config import make_settings
from onnxq.diffusion.source import open_sampler
from onnxq.diffusion.step_floor import hold_floor
from onnxq.diffusion.trajectory import Trajectories
from onnxq.job import Job
from onnxq.progress import Progress
from onnxq.ranking import Ranking
from onnxq.runtime import Session
from onnxq.sensitivity import ErrorPower, Probe, judged_samples

LAYERS = 24


class Counted(Iterables):
    """Calibration samples that count how often they were read through."""

    passes = 0

    def __iter__(self) -> Iterator[Sample]:
        self.passes += 1
        return super().__iter__()


def chain(fragile: tuple[int, ...]) -> ir.Model:
    """Products in a row; the input of a fragile one holds one value, a hundred times the others, that it ignores."""
    shapes = {f"w{index}": (32, 32) for index in range(LAYERS)}
    nodes = [
        f"[layer{index}] h{index} = Gemm <transB=1> ({'x' if index == 0 else f'r{index - 1}'}, w{index})\n"
        f"[relu{index}] r{index} = Relu (h{index})"
        for index in range(LAYERS - 1)
    ]
    last = LAYERS - 1
    text = "\n".join([*nodes, f"[layer{last}] y = Gemm <transB=1> (r{last - 1}, w{last})"])
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    model = add_weights(f"{head} chain (float[N,32] x) => (float[N,32] y) {{ {text} }}", shapes)
    for place, index in enumerate(fragile):
        large, ignored = (
            np.array(model.graph.initializers[name].const_value.numpy()) for name in (f"w{index - 1}", f"w{index}")
        )
        large[0] = np.abs(large[0]) * 100 / 2**place
        ignored[:, 0] = 0
        for name, array in ((f"w{index - 1}", large), (f"w{index}", ignored)):
            model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


def job_of(model: ir.Model, steps: int = 4, weights: str | None = None) -> tuple[Job, Counted]:
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    source = Counted([{"x": x, "step": np.arange(64) % steps}])
    target = targets.get("tensorrt")
    settings = make_settings({"target": "tensorrt"})
    job = Job(model, target, target.scheme(weights, None), settings, source, Progress(enabled=False))
    job.prepare()
    return job, source


def probe_of(model: ir.Model) -> tuple[Probe, list[switchboard.Layer]]:
    job, source = job_of(model)
    placement = job.place(model.graph)
    layers = switchboard.layers_of(model.graph, lambda node: job.scheme, placement.left_float)
    statistics = job.observe(switchboard.activations_of(model.graph, layers))
    samples = judged_samples(Session(model), source, job.specs, 32)
    return Probe(model, samples, statistics, job.specs, observers.get("minmax")), layers


def test_the_worst_layers_are_found_without_judging_all() -> None:
    probe, layers = probe_of(chain((3, 17)))
    alone = probe.errors_alone(layers)
    order = sorted(alone, key=lambda name: alone[name].worst_db)
    assert order[:2] == ["layer3", "layer17"]
    ranking = Ranking(probe, layers)
    assert ranking.first(2) == order[:2]
    assert ranking.judged < LAYERS
    assert ranking.first(1) == order[:1] and sorted(ranking.first(99)) == sorted(order)
    assert ranking.judged == 2 * (LAYERS - 1)
    assert Ranking(probe, []).first(3) == []


def test_the_float_network_runs_over_the_data_once_for_floor_and_scales() -> None:
    job, source = job_of(chain((3,)))
    found = hold_floor(job, observers.get("minmax"), None, 12.0)
    assert found is not None and found.float_layers == ["layer3"]
    passes = source.passes
    job.insert(means=True)
    statistics = job.record()
    assert source.passes == passes and job.recording is not None
    other, source = job_of(chain((3,)))
    other.exceptions |= job.exceptions
    other.insert(means=True)
    passes = source.passes
    expected = other.record()
    assert source.passes > passes and other.recording is not None
    assert statistics.keys() == expected.keys()
    assert all(statistics[name].high == expected[name].high for name in expected)
    assert job.recording.channel_means.keys() >= other.recording.channel_means.keys() > set()
    for name, mean in other.recording.channel_means.items():
        np.testing.assert_allclose(job.recording.channel_means[name], mean, rtol=1e-5)
    assert job.recording.first_taps.keys() == other.recording.first_taps.keys()
    assert job.recording.samples == other.recording.samples == 64


def test_what_a_run_over_the_data_did_not_see_is_seen_by_the_next() -> None:
    job, source = job_of(chain(()))
    job.observe(["x"])
    passes = source.passes
    job.observe(["x"])
    assert source.passes == passes
    job.insert()
    taps = job.record().keys()
    assert source.passes > passes and taps > {"x"}


def test_record_wants_insert_first() -> None:
    job, _ = job_of(chain(()))
    with pytest.raises(RuntimeError, match="insert"):
        job.record()


def test_few_samples_that_differ_are_judged_with_caution() -> None:
    """The pooled ratio of a step of few samples, which differ a hundredfold, is mostly above what others will have."""
    generator = np.random.default_rng(0)

    def power_of(count: int) -> ErrorPower:
        power, signal = ErrorPower(), np.sqrt(10.0 ** generator.uniform(-1, 1, (count, 1)))
        power.add([signal], [signal + 0.3 * generator.standard_normal((count, 1))], np.full(count, 49))
        return power

    truth, few = power_of(20000), [power_of(16) for _ in range(300)]
    assert abs(truth.cautious_by_step_db[49] - truth.worst_db) < 0.1
    above = np.mean([power.worst_db > truth.worst_db for power in few])
    cautiously = np.mean([power.cautious_by_step_db[49] > truth.worst_db for power in few])
    assert above > 0.4 and cautiously < 0.3
    one = power_of(1)
    assert one.cautious_by_step_db == one.by_step_db


def test_every_trajectory_keeps_its_quietest_step(tmp_path: Path) -> None:
    path = tmp_path / "denoiser.onnx"
    ir.save(add_weights(NETWORK, SHAPES), path)
    sampler, _ = open_sampler(models.load(path), path, make_settings({"steps": 10}))
    for policy, wanted in (("uniform", 4), ("ndtc", None)):
        kept = Trajectories(sampler, Session(path), count=8, trajectories=4, policy=policy)
        steps = [int(sample["step"]) for sample in kept]
        assert wanted is None or steps.count(9) == wanted
        assert set(steps) - {9}


def test_no_number_is_no_good_number() -> None:
    power = ErrorPower()
    power.add([np.ones((2, 3))], [np.array([[1.0, 1.0, np.nan], [1.0, 1.0, 1.1]])], np.array([0, 1]))
    assert power.by_step_db[0] == power.cautious_by_step_db[0] == power.worst_db == power.db == -np.inf
    assert 20 < power.by_step_db[1] < 30
