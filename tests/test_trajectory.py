"""Denoisers from ONNX alone: roles of inputs, schedules, trajectories and which of their steps are kept."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS
from scipy import stats
from test_cli_errors import assert_two_lines, run

import onnxq
from onnxq import OnnxqError, kinds
from onnxq import model as models
from onnxq.calibration.archives import Npz
from onnxq.config import make_settings
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.conditions import open_conditions
from onnxq.diffusion.diffusers_schedule import MODULES, Diffusers
from onnxq.diffusion.schedule import open_schedule
from onnxq.diffusion.schedule_file import ASSUMED_DIFFUSION, read_schedule
from onnxq.diffusion.selection import ndtc, select
from onnxq.diffusion.source import open_sampler
from onnxq.diffusion.trajectory import Sampler, record
from onnxq.runtime import Session

UNET = MODELS / "fashion_unet_guided.onnx"

# Its velocity is the time, so that x_k = x_0 + (t_0 + … + t_(k-1)) / T.
CLOCK = """
<ir_version: 10, opset_import: ["" : 21]>
clock (float[N,1,4,4] x, float[N] t) => (float[N,1,4,4] v)
<int64[3] axes = {1, 2, 3}, float zero = {0.0}>
{ a = Unsqueeze (t, axes)  z = Mul (x, zero)  v = Add (z, a) }
"""

LABELLED = """
<ir_version: 10, opset_import: ["" : 21]>
labelled (int64[N] first, float[N,1,4,4] x, TYPE[RANK] second) => (float[N,1,4,4] eps)
<float[3,1] table = {1.0, 2.0, 3.0}, int64[2] axes = {2, 3}, int64[3] all = {1, 2, 3}, int64[1] last = {1}>
{
    row = Gather (table, first)
    wide = Unsqueeze (row, axes)
    time = Cast <to=1> (second)
    wave = Sin (time)
    waves = Unsqueeze (wave, all)
    sum = Add (x, wide)
    eps = EXPRESSION
}
"""


def labelled(kind: str = "int64", rank: str = "N") -> ir.Model:
    expression = "Add (sum, waves)" if rank else "Add (sum, wave)"
    text = LABELLED.replace("TYPE[RANK]", f"{kind}[{rank}]" if rank else f"{kind}[]").replace("EXPRESSION", expression)
    if not rank:
        text = text.replace("    waves = Unsqueeze (wave, all)\n", "")
    return ir.from_onnx_text(text)


def sampler_of(model: ir.Model, config: dict, steps: int, guidance: float = 1.0, seed: int = 0) -> Sampler:
    denoiser = denoisers.find(model)
    return Sampler(denoiser, open_schedule(config, denoiser, steps), guidance, {}, seed)


@pytest.mark.parametrize(("kind", "rank"), [("int64", "N"), ("int32", "N"), ("float", "N"), ("int64", "")])
def test_roles_follow_from_the_graph_and_not_from_names(kind: str, rank: str) -> None:
    """Labels come first and are called ``first``; what becomes a sine is the timestep."""
    found = denoisers.find(labelled(kind, rank))
    assert (found.sample.name, found.timestep.name, found.output) == ("x", "second", "eps")
    assert [(item.spec.name, item.classes, item.null_class) for item in found.conditions] == [("first", 3, 2)]
    assert found.timesteps(7.6, 3).shape == (() if not rank else (3,))
    assert found.timesteps(7.6, 3).ravel()[0] == (pytest.approx(7.6) if kind == "float" else 8)


def test_a_table_of_times_is_a_timestep() -> None:
    text = CLOCK.replace("float[N] t", "int64[N] steps").replace(
        "a = Unsqueeze (t, axes)", "row = Gather (times, steps)  a = Unsqueeze (row, late)"
    )
    text = text.replace("int64[3] axes = {1, 2, 3}", "int64[2] late = {2, 3}, float[4,1] times = {0.0, 1.0, 2.0, 3.0}")
    found = denoisers.find(ir.from_onnx_text(text))
    assert found.timestep.name == "steps" and found.timestep_rows == 4 and not found.conditions
    with pytest.raises(OnnxqError, match="timesteps below 4"):
        open_schedule(ASSUMED_DIFFUSION, found, 10)


def test_every_input_is_kept_with_its_own_timestep(tmp_path: Path) -> None:
    """The pairs (x_t, t) are those of the analytic trajectory: recorded before the step, not mirrored."""
    model, steps = ir.from_onnx_text(CLOCK), 7
    sampler = sampler_of(model, {"_class_name": "FlowMatching"}, steps)
    path = tmp_path / "all.npz"
    assert record(sampler, Session(model), np.ones((5, steps), bool), path) == 35
    times = np.arange(steps) / steps
    shift = np.concatenate([[0], np.cumsum(times / steps)])
    with np.load(path) as rows:
        assert np.allclose(rows["t"], times[rows["step"]])
        starts = rows["x"] - shift[rows["step"]][:, None, None, None]
    noise = np.stack([np.random.default_rng([0, index]).standard_normal((1, 4, 4), np.float32) for index in range(5)])
    distances = np.abs(starts[:, None] - noise[None]).max(axis=(2, 3, 4))
    assert distances.min(axis=1).max() < 1e-6
    assert (np.bincount(distances.argmin(axis=1), minlength=5) == steps).all()


@pytest.mark.parametrize(("guidance", "classes"), [(1.0, 11), (3.0, 10)])  # the last stands for none
def test_every_class_has_its_turn(guidance: float, classes: int) -> None:
    """Few trajectories, drawn class by class, would miss some classes: two or three of ten in sixteen."""
    model, config = models.load(UNET), json.loads(UNET.with_suffix(".scheduler.json").read_text())

    def labels(seed: int, indices: range) -> list[int]:
        return list(sampler_of(model, config, 2, guidance, seed).run(Session(UNET), indices).conditional["y"])

    whole = labels(0, range(2 * classes))
    assert sorted(whole[:classes]) == sorted(whole[classes:]) == list(range(classes))
    assert whole[:classes] != whole[classes:] and labels(1, range(classes)) != whole[:classes]
    assert labels(0, range(3, 7)) == whole[3:7]


def test_one_pass_keeps_what_a_run_for_each_sample_would(tmp_path: Path) -> None:
    """Choosing few steps changes which rows are kept, not the rows; batches of another size neither."""
    model = models.load(UNET)
    config = json.loads(UNET.with_suffix(".scheduler.json").read_text())
    sampler, session = sampler_of(model, config | {"_class_name": "DDPMScheduler"}, 6, seed=3), Session(UNET)
    chosen = ndtc(9, sampler.schedule.timesteps, 1, seed=1)
    record(sampler, session, chosen, tmp_path / "few.npz")
    with np.load(tmp_path / "few.npz") as few:
        rows = {key: few[key] for key in few.files}
    assert len(rows["step"]) == chosen.sum() == 9
    for sample in range(9):
        step = int(chosen[sample].argmax())
        alone = next(visit for visit in sampler.run(session, [sample]) if visit.step == step)
        found = np.abs(rows["x"] - alone.feed["x"]).max(axis=(1, 2, 3)).argmin()
        assert rows["step"][found] == step and rows["t"][found] == alone.feed["t"][0]
        np.testing.assert_allclose(rows["x"][found], alone.feed["x"][0], atol=2e-4)


def test_guidance_keeps_both_branches_where_it_acts(tmp_path: Path) -> None:
    model = labelled("float")
    config = {"_class_name": "FlowMatching", "guidance_interval": [0.2, 0.6]}
    sampler = sampler_of(model, config, 10, guidance=3.0)
    count = record(sampler, Session(model), np.ones((4, 10), bool), tmp_path / "guided.npz")
    assert count == 4 * (10 + 5)
    with np.load(tmp_path / "guided.npz") as rows:
        inside = (rows["second"] > 0.15) & (rows["second"] < 0.65)
        null = rows["first"] == 2
        assert null[inside].mean() == 0.5 and not null[~inside].any()
        for step in np.unique(rows["step"][inside]):
            here = rows["step"] == step
            assert np.array_equal(np.sort(rows["x"][here & null], 0), np.sort(rows["x"][here & ~null], 0))


def test_guided_predictions_extrapolate() -> None:
    model = labelled("float")
    sampler = sampler_of(model, {"_class_name": "FlowMatching"}, 4, guidance=3.0)
    visit = next(iter(sampler.run(Session(model), [0, 1])))
    with_condition, without = visit.raw[:2], visit.raw[2:]
    np.testing.assert_allclose(visit.prediction, without + 3 * (with_condition - without), rtol=1e-6)


def test_any_first_part_of_a_file_is_spread_over_the_steps(tmp_path: Path) -> None:
    model = ir.from_onnx_text(CLOCK)
    sampler = sampler_of(model, {"_class_name": "FlowMatching"}, 8)
    for name in ("a.npz", "b.npz"):
        record(sampler, Session(model), select("uniform", 16, sampler.schedule.timesteps, 4, 0), tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    steps = [int(row["step"]) for row in Npz(tmp_path / "a.npz", sampler.denoiser.specs)]
    assert set(Counter(steps).values()) == {8} and set(steps[:8]) == set(range(8))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_ndtc_draws_from_the_normal_distribution() -> None:
    times = list(range(999, -1, -1))
    chosen = ndtc(100_000, times, clamp=False, mean=0.5, deviation=0.1)
    drawn = np.asarray(times)[chosen.argmax(axis=1)] / 999
    assert abs(drawn.mean() - 0.5) < 0.005 and abs(drawn.std() - 0.1) < 0.001
    clamped = np.asarray(times)[ndtc(100_000, times).argmax(axis=1)]
    expected = [stats.norm.cdf(-1), stats.norm.sf(1.5)]  # 15.9 % and 6.7 % lie outside [0, T]
    half_a_step = 0.5 / 999 / 0.4 * stats.norm.pdf(1)
    assert abs((clamped == 0).mean() - expected[0]) < 0.005 + half_a_step
    assert abs((clamped == 999).mean() - expected[1]) < 0.005 + half_a_step
    assert clamped.min() == 0 and clamped.max() == 999
    resampled = np.asarray(times)[ndtc(100_000, times, clamp=False).argmax(axis=1)]
    assert (resampled == 0).mean() < 0.005


def test_ddim_is_the_published_update() -> None:
    """diffusers behind our schedule gives x' = √a' x0 + √(1-a') e, x0 clipped and e corrected by what was clipped."""
    denoiser = denoisers.find(labelled())
    schedule = open_schedule(ASSUMED_DIFFUSION, denoiser, 10)
    generator = np.random.default_rng(0)
    sample = generator.standard_normal((2, 1, 4, 4)).astype(np.float32)
    noise = generator.standard_normal(sample.shape).astype(np.float32)
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    schedule.begin([1, 2])
    for step in (0, 5, 9):
        now = alphas[int(schedule.timesteps[step])]
        later = alphas[int(schedule.timesteps[step + 1])] if step < 9 else 1.0
        image = np.clip((sample - np.sqrt(1 - now) * noise) / np.sqrt(now), -1, 1)
        corrected = (sample - np.sqrt(now) * image) / np.sqrt(1 - now)
        expected = np.sqrt(later) * image + np.sqrt(1 - later) * corrected
        np.testing.assert_allclose(schedule.advance(noise, step, sample), expected, atol=2e-5)


def test_ddim_with_all_its_noise_is_ddpm() -> None:
    """Eta 1 has DDPM's variance, and the noise is drawn as diffusers draws it; half of it can be left out."""
    denoiser = denoisers.find(labelled())
    config = {**ASSUMED_DIFFUSION, "eta": 1.0}
    stochastic = open_schedule(config, denoiser, 10)
    published = open_schedule({**config, "_class_name": "DDPMScheduler", "eta": 0}, denoiser, 10)
    halved = open_schedule(config, denoiser, 10)
    plain = open_schedule(config, denoiser, 10)
    assert isinstance(halved, Diffusers) and isinstance(plain, Diffusers)
    halved.noise_factors, plain.noise_factors = {4: 0.5}, {4: 0.0}
    generator = np.random.default_rng(0)
    sample, noise = (generator.standard_normal((2, 1, 4, 4)).astype(np.float32) for _ in range(2))
    moved = []
    for schedule in (stochastic, published, halved, plain):
        schedule.begin([1, 2])
        moved.append(schedule.advance(noise, 4, sample))
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-5)
    np.testing.assert_allclose(moved[2] - moved[3], 0.5 * (moved[0] - moved[3]), atol=1e-6)
    assert np.abs(moved[0] - moved[3]).max() > 0.01


@pytest.mark.parametrize("name", [name for name in MODULES if "Flow" not in name])
def test_every_scheduler_runs(name: str) -> None:
    model = labelled()
    config = {**ASSUMED_DIFFUSION, "_class_name": name}
    sampler = sampler_of(model, config, 4)
    run_ = sampler.run(Session(model), [0, 1, 2])
    visits = list(run_)
    assert len(visits) == len(sampler.schedule.timesteps) >= 4
    assert np.isfinite(run_.sample).all() and run_.sample.dtype == np.float32
    again = sampler.run(Session(model), [2])
    assert len(list(again)) == len(visits)  # a scheduler keeps state between steps; a new run starts afresh
    np.testing.assert_allclose(again.sample[0], run_.sample[2], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheduler", "missing.json"], ("missing.json", "scheduler_config.json")),
        (["--scheduler", "{not json"], ("JSON",)),
        (["--scheduler", '{"_class_name": "Magic"}'], ("'Magic'", "DDIMScheduler")),
        (["--scheduler", '{"_class_name": "DDIMScheduler", "prediction_type": "score"}'], ("prediction_type", "score")),
        (["--scheduler", '{"_class_name": "FlowMatching"}'], ("float timestep", "int64")),
        (["--scheduler", '{"_class_name": "DDIMScheduler", "num_train_timesteps": 10}'], ("between 1 and 10", "50")),
        (["--scheduler", '{"_class_name": "DDIMScheduler", "eta": 2}'], ("eta", "less than or equal to 1", "2")),
        (["--scheduler", '{"_class_name": "DDPMScheduler", "eta": 1}'], ("eta", "DDPMScheduler")),
        (["--steps", "5000"], ("between 1 and 1000", "5000")),
        (["--steps", "3", "--keep", "4"], ("between 1 and 3", "4")),
        (["--select", "srm"], ("uniform, all, ndtc", "'srm'")),
    ],
)
def test_bad_schedules_are_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: tuple[str, ...]
) -> None:
    model = tmp_path / "model.onnx"
    ir.save(labelled(), model)
    if options[1].startswith("{"):
        file = tmp_path / "scheduler.json"
        file.write_text(options[1])
        options = [options[0], str(file)]
    code, stderr = run(capsys, "trajectories", model, "-o", tmp_path / "out.npz", "-q", *options)
    assert_two_lines(code, stderr, *words)
    assert not (tmp_path / "out.npz").exists()


def test_bad_models_are_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "guidance": (CLOCK, ["--guidance", "2"], ("unconditional", "guidance")),
        "rank": (CLOCK.replace("float[N] t", "float[N,2] t"), [], ("timestep", "[batch]")),
        "dtype": (CLOCK.replace("float[N] t", "bool[N] t").replace("a = Unsq", "c = Cast <to=1> (t) a = Unsq")
                  .replace("Unsqueeze (t,", "Unsqueeze (c,"), [], ("timestep", "bool")),
        "size": (CLOCK.replace("4,4", "H,W"), [], ("known size",)),
    }  # fmt: skip
    for name, (text, options, words) in cases.items():
        model = tmp_path / f"{name}.onnx"
        ir.save(ir.from_onnx_text(text), model)
        code, stderr = run(capsys, "trajectories", model, "-o", tmp_path / "out.npz", "-q", *options)
        assert_two_lines(code, stderr, *words)
    code, stderr = run(capsys, "trajectories", MODELS / "fashion_resnet.onnx", "-o", tmp_path / "out.npz", "-q")
    assert_two_lines(code, stderr, "expected a denoiser")
    assert not (tmp_path / "out.npz").exists()


def test_a_denoiser_needs_no_data(tmp_path: Path) -> None:
    """Without --data it samples itself, says so, and keeps more than 20 dB in every step."""
    numbers = onnxq.quantize(UNET, steps=10, samples=64, guidance=3.0, seed=1).numbers
    assert "16 trajectories of 10 steps, guidance 3" in numbers["samples_from"]
    assert "fashion_unet_guided.scheduler.json" in numbers["samples_from"] and not numbers["warnings"]
    assert sorted(numbers["step_sqnr_db"]) == list(range(10)) and min(numbers["step_sqnr_db"].values()) > 20


def test_where_the_schedule_comes_from(tmp_path: Path) -> None:
    model = labelled()
    denoiser, path = denoisers.find(model), tmp_path / "model.onnx"
    assert "assumed" in read_schedule(None, model, path, denoiser)[1]
    (tmp_path / "model.scheduler.json").write_text('{"_class_name": "PNDMScheduler"}')
    assert read_schedule(None, model, path, denoiser)[0] == {"_class_name": "PNDMScheduler"}
    models.set_metadata(model, scheduler='{"_class_name": "DDPMScheduler"}')
    assert read_schedule(None, model, path, denoiser)[0] == {"_class_name": "DDPMScheduler"}
    (tmp_path / "other.json").write_text('{"_class_name": "DDIMScheduler"}')
    found, line = read_schedule(tmp_path / "other.json", model, path, denoiser)
    assert found == {"_class_name": "DDIMScheduler"} and "other.json" in line


@pytest.mark.parametrize(
    ("name", "entries", "unread"),
    [
        ("PNDMScheduler", {"clip_sample": False, "skip_prk_steps": True, "eta": 0.0, "_diffusers_version": "1"},
         ["clip_sample"]),
        ("FlowMatching", {"even_sigmas": True, "prediction_type": "sample", "sigmas": "even"}, ["even_sigmas"]),
    ],
)  # fmt: skip
def test_entries_of_a_schedule_that_nothing_reads_are_named(
    tmp_path: Path, name: str, entries: dict[str, object], unread: list[str]
) -> None:
    (tmp_path / "schedule.json").write_text(json.dumps({"_class_name": name, **entries}))
    settings = make_settings({"scheduler": str(tmp_path / "schedule.json"), "steps": 4})
    model = ir.from_onnx_text(CLOCK) if name == "FlowMatching" else labelled()
    line = open_sampler(model, None, settings)[1]
    assert line.endswith(f"schedule.json, where {name} does not read {', '.join(unread)}")


def test_conditions_that_are_no_labels_are_given(tmp_path: Path) -> None:
    text = CLOCK.replace("float[N] t)", "float[N] t, float[N,3,8] prompt)")
    model = ir.from_onnx_text(text)
    denoiser = denoisers.find(model)
    with pytest.raises(OnnxqError, match="'prompt'"):
        open_conditions(None, denoiser)
    np.savez(tmp_path / "wrong.npz", prompt=np.zeros((2, 3, 7), np.float32))
    with pytest.raises(OnnxqError, match="found \\[2, 3, 7\\]"):
        open_conditions(tmp_path / "wrong.npz", denoiser)
    rows = {"prompt": np.ones((2, 3, 8), np.float32), "prompt.unconditional": np.zeros((3, 8), np.float32)}
    np.savez(tmp_path / "right.npz", **rows)
    conditions = open_conditions(tmp_path / "right.npz", denoiser)
    schedule = open_schedule({"_class_name": "FlowMatching"}, denoiser, 2)
    sampler = Sampler(denoiser, schedule, 2.0, conditions)
    sampler.check()
    feed = next(iter(sampler.run(Session(model), [0, 1, 2]))).feed
    assert feed["prompt"].shape == (6, 3, 8) and feed["prompt"][:3].all() and not feed["prompt"][3:].any()


def test_conditions_are_taken_from_all_over_a_file(tmp_path: Path) -> None:
    """Rows of one condition stay together, arrays without a batch axis and rows for guidance stay whole."""
    text = CLOCK.replace("float[N] t)", "float[N] t, float[N,3] prompt, float[N,1] size, float[7,1] place)")
    denoiser = denoisers.find(ir.from_onnx_text(text))
    order = np.arange(10, dtype=np.float32)[:, None]
    rows = {"prompt": np.repeat(order, 3, axis=1), "size": order, "place": np.ones((7, 1), np.float32)}
    np.savez(tmp_path / "given.npz", **rows, **{"size.unconditional": np.zeros(1, np.float32)})

    def chosen(samples: int | None) -> list[float]:
        found = open_conditions(tmp_path / "given.npz", denoiser, samples=samples)
        np.testing.assert_array_equal(found["prompt"][:, :1], found["size"])
        assert found["place"].shape == (7, 1) and found["size.unconditional"].shape == (1,)
        return [float(row) for row in found["size"][:, 0]]

    assert chosen(4) == [0, 2, 5, 7] and chosen(1) == [0]
    assert chosen(10) == chosen(11) == chosen(None) == list(range(10))


def beside(sample: str, output: str, axis: int, noisy: slice) -> ir.Model:
    """A network that predicts the sum of the noisy channels and the mean of the others."""
    start, end = noisy.start, noisy.stop
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    net (float[{sample}] x, float[N] t) => (float[{output}] eps)
    <int64[1] start = {{{start}}}, int64[1] end = {{{end}}}, int64[1] axis = {{{axis}}}>
    {{ noisy = Slice (x, start, end, axis)  mean = ReduceMean <keepdims=1> (x, axis)  eps = Add (noisy, mean) }}"""
    return ir.from_onnx_text(text)


@pytest.mark.parametrize(
    ("sample", "output", "axis"),
    [("N,9,4,4", "N,4,4,4", 1), ("N,2,9,4,4", "N,2,4,4,4", 2), ("N,16,9", "N,16,4", 2)],
    ids=["inpainting", "video", "tokens"],
)
@pytest.mark.parametrize("place", ["behind", "before"])
def test_a_sample_may_have_channels_beside_its_noise(
    sample: str, output: str, axis: int, place: str, tmp_path: Path
) -> None:
    """They are given as conditions, stay as they are along the trajectory, and may differ without the condition."""
    noisy = slice(0, 4) if place == "behind" else slice(5, 9)
    model = beside(sample, output, axis, noisy)
    assert kinds.kind_of(model) is kinds.Kind.DENOISER
    denoiser = denoisers.find(model)
    shape = tuple(map(int, output.split(",")[1:]))
    assert (denoiser.channels, denoiser.channel_axis, denoiser.beside, denoiser.noise_shape) == (4, axis, 5, shape)
    with pytest.raises(OnnxqError, match=r"'x.behind', which are not class labels, found none"):
        open_conditions(None, denoiser)
    wide = [5 if index == axis - 1 else size for index, size in enumerate(shape)]
    path, rows = tmp_path / "conditions.npz", np.random.default_rng(0).standard_normal((2, *wide)).astype(np.float32)
    np.savez(path, **{f"x.{place}": rows[..., :-1]})
    with pytest.raises(OnnxqError, match=r"expected rows of shape .*5.* under 'x.behind'"):
        open_conditions(path, denoiser)
    np.savez(path, **{f"x.{place}": rows})
    schedule = open_schedule({"_class_name": "FlowMatching"}, denoiser, 3)
    run = Sampler(denoiser, schedule, 1.0, open_conditions(path, denoiser)).run(Session(model), [0, 1, 2])
    for visit in run:
        given, noise = np.split(visit.feed["x"], [5] if place == "before" else [4], axis)[
            :: 1 if place == "before" else -1
        ]
        np.testing.assert_array_equal(given, rows[[0, 1, 0]])
        np.testing.assert_array_equal(noise, run.sample)
        assert visit.raw.shape == run.sample.shape == (3, *shape)


def test_what_is_beside_the_noise_may_differ_without_the_condition(tmp_path: Path) -> None:
    model = beside("N,3,4,4", "N,1,4,4", 1, slice(0, 1))
    model.graph.inputs.append(ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 2])))
    denoiser, path = denoisers.find(model), tmp_path / "conditions.npz"
    schedule = open_schedule({"_class_name": "FlowMatching"}, denoiser, 1)
    rows = {"x.behind": np.ones((1, 2, 4, 4), np.float32), "y": np.ones((1, 2), np.float32)}
    rows["y.unconditional"] = np.zeros(2, np.float32)

    def without() -> np.ndarray:
        np.savez(path, **rows)
        sampler = Sampler(denoiser, schedule, 2.0, open_conditions(path, denoiser))
        feed = next(iter(sampler.run(Session(model), [0]))).feed
        assert feed["x"].shape == (2, 3, 4, 4) and feed["x"][0, 1:].all() and not feed["y"][1].any()
        return feed["x"][1, 1:]

    assert without().all()  # the same mask
    rows["x.behind.unconditional"] = np.zeros((2, 4, 4), np.float32)
    assert not without().any()
    rows["x.behind.unconditional"] = np.zeros((2, 4, 5), np.float32)
    with pytest.raises(OnnxqError, match=r"one row of shape .* under 'x.behind.unconditional'"):
        without()


def test_what_is_beside_the_noise_may_be_all_that_guides() -> None:
    """As the small picture in super-resolution, or none."""
    denoiser = denoisers.find(beside("N,3,4,4", "N,1,4,4", 1, slice(0, 1)))
    schedule = open_schedule({"_class_name": "FlowMatching"}, denoiser, 1)
    rows = {"x.behind": np.ones((1, 2, 4, 4), np.float32)}
    with pytest.raises(OnnxqError, match="a model without conditions"):
        Sampler(denoiser, schedule, 2.0, rows).check()
    Sampler(denoiser, schedule, 2.0, rows | {"x.behind.unconditional": np.zeros((2, 4, 4), np.float32)}).check()


def test_the_timestep_is_the_one_that_is_called_so() -> None:
    """The weight of guidance is a float for each sample, too, and may come first (FLUX)."""
    text = CLOCK.replace("float[N] t)", "float[N] guidance, float[N] t)")
    found = denoisers.find(ir.from_onnx_text(text))
    assert found.timestep.name == "t" and [item.spec.name for item in found.conditions] == ["guidance"]


def test_a_sample_may_be_one_row_of_numbers() -> None:
    """As in the prior of unCLIP, which makes embeddings; two states of a control loop are none."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    prior (float[N,8] x, float[N] t) => (float[N,8] y)
    <int64[1] last = {1}> { a = Unsqueeze (t, last)  y = Add (x, a) }"""
    model = ir.from_onnx_text(text)
    denoiser = denoisers.find(model)
    assert kinds.kind_of(model) is kinds.Kind.DENOISER and denoiser.noise_shape == (8,)
    model.graph.inputs[1].name = "gain"
    assert kinds.kind_of(model) is kinds.Kind.CNN


def test_features_of_pictures_make_no_denoiser() -> None:
    """Fewer channels are a prediction only where something is surely a timestep."""
    model = beside("N,3,4,4", "N,1,4,4", 1, slice(0, 1))
    assert kinds.kind_of(model) is kinds.Kind.DENOISER
    model.graph.inputs[1].name = "threshold"
    assert kinds.kind_of(model) is kinds.Kind.CNN


def test_a_flag_is_no_timestep() -> None:
    """Whether to use a cache, or to train, is one number too."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,3,4,4] x, {flag}, float[N] t) => (float[N,3,4,4] y) {{
        a = If (flag) <then_branch = b () => (p) {{ p = Identity (x) }}, else_branch = c () => (q) {{ q = Neg (x) }}>
        y = Abs (a)
    }}"""
    for flag in ("bool flag", "bool[1] flag"):
        model = ir.from_onnx_text(text.format(flag=flag))
        assert denoisers.find(model).timestep.name == "t"
        model.graph.inputs.pop()
        assert kinds.kind_of(model) is kinds.Kind.CNN


def test_an_inpainting_denoiser_needs_no_data(tmp_path: Path) -> None:
    """A guided UNet whose sample has a mask beside the noise, from the command line's own function."""
    model = models.load(UNET)
    first = next(node for node in model.graph if node.op_type == "Conv")
    weight = first.inputs[1]
    assert weight is not None and weight.const_value is not None
    array = weight.const_value.numpy()
    wider = np.concatenate([array, 0.1 * array, 0.1 * array], 1)
    weight.const_value = ir.Tensor(wider, name=weight.name)
    weight.shape = ir.Shape(wider.shape)
    sample = next(value for value in model.graph.inputs if value.name == "x")
    size = wider.shape[1]
    sample.shape = ir.Shape([sample.shape[0], size, *sample.shape[2:]])  # type: ignore[index]
    path = tmp_path / "inpainting.onnx"
    onnxq.save(model, path)
    masks = np.random.default_rng(1).random((8, size - array.shape[1], 28, 28)).astype(np.float32)
    np.savez(tmp_path / "conditions.npz", **{"x.behind": masks})
    given = {"conditions": str(tmp_path / "conditions.npz"), "scheduler": str(UNET.with_suffix(".scheduler.json"))}
    with pytest.raises(OnnxqError, match=r"x.behind"):
        onnxq.quantize(path, steps=5, samples=16)
    for recipe, knobs in (("int8", {}), ("ptqd", {"base": "int8"})):
        numbers = onnxq.quantize(path, recipe=recipe, knobs=knobs, steps=5, samples=32, guidance=2.0, **given).numbers
        assert sorted(numbers["step_sqnr_db"]) == list(range(5)) and min(numbers["step_sqnr_db"].values()) > 20


@pytest.mark.parametrize("name", [name for name in MODULES if "Flow" in name])
def test_the_flow_of_diffusers_reaches_what_its_velocity_points_at(name: str) -> None:
    """It has no init_noise_sigma, as the schedulers of diffusion have."""
    pytest.importorskip("diffusers")
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> net (float[N,1,2,2] x, float[N] t) => (float[N,1,2,2] y) '
        "{ y = Identity (x) }"
    )
    schedule = open_schedule({"_class_name": name, "shift": 3.0}, denoisers.find(model), 4)
    assert schedule.begin([0]) == 1.0
    noise, data = np.full((1, 1, 2, 2), 2.0, np.float32), np.full((1, 1, 2, 2), -1.0, np.float32)
    sample = noise
    for step, time in enumerate(schedule.timesteps):  # the way to the data, also where a scheduler adds noise again
        sample = schedule.advance((sample - data) / np.float32(time / 1000), step, sample)
    np.testing.assert_allclose(sample, data, atol=1e-5)


def test_the_size_of_a_free_sample_is_the_published_one(tmp_path: Path) -> None:
    """As exporters leave it: height and width are free, and the network's config.json has its `sample_size`."""
    text = CLOCK.replace("float[N,1,4,4] x", "float[N,1,H,W] x").replace("float[N,1,4,4] v", "float[N,1,H,W] v")
    path = tmp_path / "pipeline" / "unet" / "model.onnx"
    path.parent.mkdir(parents=True)
    models.save(ir.from_onnx_text(text), path)

    def size(file: Path = path, **settings: object) -> tuple[int, ...]:
        sampler, _ = open_sampler(models.load(file), file, make_settings({"steps": 2, **settings}))
        return sampler.denoiser.noise_shape

    with pytest.raises(OnnxqError, match="sample of known size") as error:
        size()
    assert "--shapes x:1x1x64x64" in (error.value.hint or "")
    config = path.with_name("config.json")
    for wrong in ("[1, 2, 3]", '"large"', "0", "null", "true"):
        config.write_text(f'{{"sample_size": {wrong}}}')
        with pytest.raises(OnnxqError, match="sample of known size"):
            size()
    config.write_text('{"sample_size": [8, 6]}')
    assert size() == (1, 8, 6)
    config.write_text('{"sample_size": 8}')
    assert size() == (1, 8, 8) and size(shapes={"x": [1, 1, 4, 4]}) == (1, 4, 4)
    shutil.copy(path, tmp_path / "quantized.onnx")
    (tmp_path / "pipeline" / "scheduler").mkdir()
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    assert size(tmp_path / "quantized.onnx", scheduler=str(tmp_path / "pipeline")) == (1, 8, 8)
