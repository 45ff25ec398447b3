"""ptq4dm and q-diffusion: which inputs they make, what they learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS, add_weights

import onnxq
from onnxq import model as models
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration import observers
from onnxq.calibration.observers import Statistics
from onnxq.config import make_settings
from onnxq.diffusion.source import open_sampler
from onnxq.diffusion.trajectory import record
from onnxq.formats import FORMATS
from onnxq.runtime import Session

NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
denoiser (float[N,1,8,8] x, int64[N] t) => (float[N,1,8,8] eps)
<float rate = {0.01}, int64[1] column = {1}, int64[2] places = {2, 3}>
{
    [cast] number = Cast <to=1> (t)
    [rate] angle = Mul (number, rate)
    [wave] wave = Sin (angle)
    [column] waves = Unsqueeze (wave, column)
    [embed] e = Gemm (waves, we)
    [places] embedding = Unsqueeze (e, places)
    [first] h1 = Conv <pads=[1,1,1,1]> (x, w1)
    [time] h2 = Add (h1, embedding)
    [gate1] s1 = Sigmoid (h2)
    [silu1] a1 = Mul (h2, s1)
    [middle] h3 = Conv <pads=[1,1,1,1]> (a1, w2)
    [residual] r = Add (h3, h1)
    [shortcut] both = Concat <axis=1> (r, h1)
    [join] h4 = Conv (both, w3)
    [gate2] s2 = Sigmoid (h4)
    [silu2] a2 = Mul (h4, s2)
    [last] eps = Conv <pads=[1,1,1,1]> (a2, w4)
}
"""
SHAPES = {"we": (1, 32), "w1": (32, 1, 3, 3), "w2": (32, 32, 3, 3), "w3": (32, 64, 1, 1), "w4": (1, 32, 3, 3)}
OPTIONS = {"steps": 8, "weights": "int3", "activations": "int8"}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.onnx"
    ir.save(add_weights(NETWORK, SHAPES), path)
    return path


def held_out_error(denoiser: Path, result: onnxq.Result) -> float:
    """Mean squared error along other trajectories."""
    sampler, _ = open_sampler(models.load(denoiser), denoiser, make_settings({"steps": 8, "seed": 9}))
    exact, found = Session(denoiser), Session(result.model, optimize=False)
    visits = sampler.run(exact, range(16))
    return float(np.mean([np.mean((found.run(visit.feed)[0] - visit.raw) ** 2) for visit in visits]))


def test_the_power_rule_is_the_best_of_its_thresholds() -> None:
    values = np.random.default_rng(0).standard_t(3, 5000).astype(np.float32)
    statistics = Statistics()
    statistics.update(values, 1 << 20)
    sampled, counts = statistics.distribution()
    number_format = FORMATS["int4"]

    def error(limit: float) -> float:
        scale, zero = scale_and_zero_point(-limit, limit, number_format, symmetric=True)
        return float(counts @ np.abs(fake_quantize(sampled, scale, zero, number_format) - sampled) ** 2.4)

    largest = float(np.abs(values).max())
    chosen = observers.power(statistics, number_format, True)
    errors = [error(largest * step / 100) for step in range(1, 101)]
    assert error(max(-chosen.low, chosen.high)) == pytest.approx(min(errors), rel=1e-6) and min(errors) < errors[-1]
    positive = Statistics()
    positive.update(np.abs(values))
    assert observers.power(positive, FORMATS["uint8"], False).low == 0


@pytest.mark.parametrize("freedom", [2.5, 3.0, 5.0])
def test_the_power_rule_suits_heavy_tails(freedom: float) -> None:
    """At 8 bits a product's output is closer than with the least divergence (KL) or the least absolute error (L1)."""
    generator = np.random.default_rng(0)
    values = generator.standard_t(freedom, (4000, 64)).astype(np.float32)
    weights = generator.standard_normal((64, 32)).astype(np.float32)
    statistics, number_format = Statistics(), FORMATS["int8"]
    statistics.update(values, 1 << 20)

    def rounded(limit: float) -> np.ndarray:
        return fake_quantize(values, limit / number_format.high, 0, number_format) - values

    limits = np.abs(values).max() * np.arange(1, 101) / 100
    absolute = min(limits, key=lambda limit: float(np.abs(rounded(limit)).mean()))
    found = {
        name: float(((rounded(limit) @ weights) ** 2).mean())
        for name, limit in {
            "power": observers.power(statistics, number_format, True).high,
            "divergence": observers.entropy(statistics, number_format, True).high,
            "absolute": absolute,
        }.items()
    }
    assert found["power"] < found["divergence"] < found["absolute"], found


def test_a_block_learns_from_what_the_quantized_network_makes(denoiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads differs from the float network's behind the first block; what it learns to give does not."""
    pytest.importorskip("torch")
    from onnxq.autograd.blocks import Block
    from onnxq.learning.walk import FLOAT, QUANTIZED, Walk

    moved: dict[str, float] = {}
    targets: dict[str, list[np.ndarray]] = {}
    prepare, rows = Walk.prepare, slice(0, 4)

    def watched(walk: Walk, block: Block) -> None:
        prepare(walk, block)
        found, exact = (walk.inputs(block, rows, kind) for kind in (QUANTIZED, FLOAT))
        moved.setdefault(block.output, max(float((found[name] - exact[name]).abs().max()) for name in exact))
        targets.setdefault(block.output, []).append(walk.target(block, rows).numpy())

    monkeypatch.setattr(Walk, "prepare", watched)
    knobs = {"iterations": 8, "trajectories": 4, "kept_steps": 4, "split": "none"}
    onnxq.quantize(denoiser, recipe="q-diffusion", knobs=knobs, **OPTIONS)
    values = list(moved.values())
    assert values[0] == 0 and values[-1] > 0
    sampler, _ = open_sampler(models.load(denoiser), denoiser, make_settings({"steps": 8}))
    visited = [visit.raw for visit in sampler.run(Session(denoiser), range(4))]
    first = targets["eps"][0]
    assert all(min(float(np.abs(row - raw).max()) for step in visited for raw in step) < 1e-4 for row in first)


def test_ptq4dm_draws_its_own_steps(denoiser: Path) -> None:
    """Its inputs come from trajectories of its own, skewed to the middle; 3-bit ends become 8-bit ones."""
    result = onnxq.quantize(denoiser, recipe="ptq4dm", knobs={"trajectories": 20, "kept_steps": 2}, **OPTIONS)
    assert "20 trajectories of 8 steps" in result.numbers["samples_from"]
    assert 20 < result.numbers["samples"] <= 40  # two draws may fall on one step
    again = onnxq.quantize(denoiser, recipe="ptq4dm", knobs={"trajectories": 20, "kept_steps": 2}, **OPTIONS)
    assert ir.to_proto(result.model).SerializeToString() == ir.to_proto(again.model).SerializeToString()


def test_inputs_of_all_steps_are_better_than_those_of_the_first(denoiser: Path, tmp_path: Path) -> None:
    """Ranges from the noisiest steps alone do not fit the others (Q-Diffusion, section 3.1)."""
    generator = np.random.default_rng(0)
    steps = np.arange(64) % 8
    scale = np.linspace(3.0, 0.2, 8)[steps].reshape(-1, 1, 1, 1)  # what the network sees shrinks along the way
    x = (generator.standard_normal((64, 1, 8, 8)) * scale).astype(np.float32)
    t = 999 - steps * 125
    errors = {}
    for name, kept in (("all", steps >= 0), ("last", steps >= 6)):
        np.savez(tmp_path / f"{name}.npz", x=x[kept], t=t[kept], step=steps[kept])
        result = onnxq.quantize(denoiser, tmp_path / f"{name}.npz", recipe="ptq4dm", activations="int8")
        exact, found = (Session(model, optimize=False).run({"x": x, "t": t})[0] for model in (denoiser, result.model))
        errors[name] = float(np.mean((exact - found) ** 2))
    assert errors["all"] < 0.5 * errors["last"]


def test_inputs_of_the_sampler_are_better_than_images_and_than_those_of_one_step(tmp_path: Path) -> None:
    """At W8A8, over all steps of other trajectories (PTQ4DM, tables 1 and 3)."""
    unet, steps = MODELS / "fashion_unet_guided.onnx", 8
    samplers = [
        open_sampler(models.load(unet), unet, make_settings({"steps": steps, "seed": seed}))[0] for seed in (0, 9)
    ]
    exact = Session(unet)
    chosen = {"all": np.ones((4, steps), bool), "last": np.arange(steps)[None].repeat(32, axis=0) == steps - 1}
    for name, kept in chosen.items():
        record(samplers[0], exact, kept, tmp_path / f"{name}.npz")
    images = np.load(MODELS / "fashion_calibration.npz")["x"][:32]
    np.savez(tmp_path / "images.npz", **{**np.load(tmp_path / "all.npz"), "x": images})
    visits = list(samplers[1].run(exact, range(8)))
    errors = {}
    for name in (*chosen, "images"):
        result = onnxq.quantize(unet, tmp_path / f"{name}.npz", recipe="ptq4dm", steps=steps)
        found = Session(result.model, optimize=False)
        errors[name] = np.mean([np.mean((found.run(visit.feed)[0] - visit.raw) ** 2) for visit in visits])
    assert errors["all"] < 0.8 * min(errors["last"], errors["images"])


def test_learned_rounding_beats_nearest_on_inputs_not_seen(denoiser: Path) -> None:
    knobs = {"iterations": 600, "trajectories": 8, "kept_steps": 8}
    learned = onnxq.quantize(denoiser, recipe="q-diffusion", knobs=knobs, **OPTIONS)
    nearest = onnxq.quantize(
        denoiser, recipe="ptq4dm", knobs={"selection": "uniform", "trajectories": 8}, first_last="int3", **OPTIONS
    )
    assert held_out_error(denoiser, learned) < 0.5 * held_out_error(denoiser, nearest)


def test_the_second_phase_moves_steps_of_activations_alone(denoiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq.recipes import q_diffusion

    phases = []
    original = q_diffusion.reconstruct

    def watched(job, blocks, options, **others):  # type: ignore[no-untyped-def]
        before = snapshot(job.model)
        original(job, blocks, options, **others)
        after = snapshot(job.model)
        phases.append({name for name in before if not np.array_equal(before[name], after[name])})

    monkeypatch.setattr(q_diffusion, "reconstruct", watched)
    knobs = {"iterations": 20, "trajectories": 4}
    onnxq.quantize(denoiser, recipe="q-diffusion", knobs=knobs | {"correct_biases": False}, **OPTIONS)
    rounding, steps = phases
    assert {"w2", "w3"} <= rounding and not any(name.endswith("_scale") and name[0] != "w" for name in rounding)
    assert steps and all(name.endswith("_scale") and name[0] != "w" for name in steps)


def snapshot(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("recipe", ["default", "tfmq-dm"])
def test_a_fixed_batch_needs_no_data_either(recipe: str, tmp_path: Path) -> None:
    """As exports for guidance have, one row with the condition and one without."""
    found = []
    for batch in ("N", "2"):
        path = models.save(add_weights(NETWORK.replace("[N", f"[{batch}"), SHAPES), tmp_path / f"{batch}.onnx")
        result = onnxq.quantize(path, recipe=recipe, steps=6, knobs={"iterations": 20} if recipe == "tfmq-dm" else {})
        found.append(result.numbers["sqnr_db"])
    assert found[1] > found[0] - 3


@pytest.mark.parametrize(
    ("recipe", "knobs"),
    [("apq-dm", {"groups": 2, "iterations": 4}), ("q-dm", {"steps": 2}), ("q-diffusion", {"iterations": 2})],
)
def test_a_fixed_batch_may_have_inputs_that_all_rows_share(recipe: str, knobs: dict, tmp_path: Path) -> None:
    """As FLUX's positions, in an export for two rows, which are of different steps."""
    network = NETWORK.replace("int64[N] t)", "int64[N] t, float[8,8] places_of)").replace("[N", "[2")
    network = network.replace("[first] h1 = Conv <pads=[1,1,1,1]> (x, w1)", "p = Add (x, places_of) h1 = CONV (p, w1)")
    path = models.save(add_weights(network.replace("CONV", "Conv <pads=[1,1,1,1]>"), SHAPES), tmp_path / "network.onnx")
    np.savez(tmp_path / "conditions.npz", places_of=np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8))
    given = {"steps": 4, "samples": 16, "conditions": str(tmp_path / "conditions.npz"), "budget": "quick"}
    numbers = onnxq.quantize(path, recipe=recipe, knobs=knobs, **given).numbers
    assert numbers["sqnr_db"] > 15


@pytest.mark.parametrize(
    ("recipe", "knobs"),
    [
        ("ptq4dm", {}),
        ("q-diffusion", {"iterations": 2}),
        ("apq-dm", {}),
        ("apq-dm", {"lowering": "rescale"}),
        ("q-dm", {"steps": 2}),
        ("diffusion", {"iterations": 2}),
    ],
)
def test_networks_of_few_steps_are_served(denoiser: Path, recipe: str, knobs: dict[str, object]) -> None:
    """Distilled denoisers take one to four steps: fewer than recipes keep, and than APQ-DM has groups."""
    numbers = onnxq.quantize(denoiser, recipe=recipe, steps=2, knobs={"trajectories": 4, **knobs}).numbers
    assert numbers["sqnr_db"] > 20 and numbers["samples"] <= 4 * 2
