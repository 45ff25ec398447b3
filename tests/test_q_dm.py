"""q-dm: what training on the float network's predictions is worth, and activations of one range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_temporal_features import NETWORK, SHAPES

import onnxq
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.arithmetic import fake_quantize
from onnxq.config import make_settings
from onnxq.diffusion.denoiser import find
from onnxq.diffusion.partition import uniform
from onnxq.diffusion.schedule import open_schedule
from onnxq.diffusion.schedule_file import ASSUMED_DIFFUSION
from onnxq.diffusion.source import open_sampler
from onnxq.errors import OnnxqError
from onnxq.formats import FORMATS
from onnxq.passes.normalise_attention import NormaliseAttention
from onnxq.runtime import Session

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.onnx"
    ir.save(add_weights(NETWORK.replace("int64 t,", "int64[N] t,"), SHAPES), path)
    return path


OPTIONS = {"steps": 10, "samples": 240, "weights": "int4", "activations": "int4"}
KNOBS = {"trajectories": 24, "kept_steps": 10, "steps": 150}  # of 8 trajectories, half of all seeds learn too little


def held_out_error(path: Path, result: onnxq.Result) -> float:
    """Squared error of the prediction as part of its power, on inputs that nothing was learned from."""
    generator, total = np.random.default_rng(11), []
    exact, found = Session(path), Session(result.model, optimize=False)
    for time in (900, 500, 100, 0):
        feed = {
            "x": generator.standard_normal((8, 1, 4, 4)).astype(np.float32),
            "t": np.full(8, time),
            "y": generator.integers(0, 2, 8),
        }
        wanted = exact.run(feed)[0]
        total.append(((found.run(feed)[0] - wanted) ** 2).sum() / (wanted**2).sum())
    return float(np.mean(total))


def test_training_beats_rounding_at_four_bits_and_one_range_helps(denoiser: Path) -> None:
    rounded = onnxq.quantize(denoiser, recipe="int8", knobs={"step_floor_db": 0.0}, **OPTIONS)
    errors = {"rounded": held_out_error(denoiser, rounded)}
    for taq in ("none", "table"):
        trained = onnxq.quantize(denoiser, recipe="q-dm", knobs={**KNOBS, "taq": taq}, **OPTIONS)
        errors[taq] = held_out_error(denoiser, trained)
        assert any(node.op_type == "ArgMin" for node in trained.model.graph) == (taq == "table")
        assert not any(graphs.is_quantize(node) and graphs.is_constant(node.inputs[0]) for node in trained.model.graph)
    assert errors["table"] < errors["none"] < errors["rounded"]
    assert errors["table"] <= 0.5 * errors["rounded"]


def same_noise_error(path: Path, result: onnxq.Result) -> float:
    """Squared error of the images that the same noise ends in, as part of their power."""
    images = []
    for model in (path, result.model):
        sampler, _ = open_sampler(models.load(path), path, make_settings({"steps": 10, "seed": 9}))
        run = sampler.run(Session(model, optimize=False), range(16))
        list(run)
        images.append(run.sample)
    return float(np.sum((images[1] - images[0]) ** 2) / np.sum(images[0] ** 2))


def test_training_on_many_inputs_helps_images_too_and_does_not_harm_eight_bits(denoiser: Path) -> None:
    """W4A4 and W8A8 from 64 trajectories; the fifth of rounding's error that a longer training gives is not reached."""
    rounded, trained = {}, {}
    for weights in ("int4", "int8"):
        options = {"steps": 10, "samples": 640, "weights": weights, "activations": weights}
        rounded[weights] = onnxq.quantize(denoiser, recipe="int8", knobs={"step_floor_db": 0.0}, **options)
        # Weights as large as here take larger steps than the default's, which suits networks that were trained.
        knobs = {"trajectories": 64, "kept_steps": 10, "steps": 300, "weight_rate": 3e-4}
        trained[weights] = onnxq.quantize(denoiser, recipe="q-dm", knobs=knobs, **options)
    errors = {name: [held_out_error(denoiser, item[name]) for item in (trained, rounded)] for name in trained}
    assert errors["int4"][0] < 0.5 * errors["int4"][1] and errors["int8"][0] < errors["int8"][1]
    assert same_noise_error(denoiser, trained["int4"]) < 0.6 * same_noise_error(denoiser, rounded["int4"])


# What predicts noise best where the data is normally distributed: a factor, here from two layers with a Relu between.
BEST_DENOISER = """
<ir_version: 10, opset_import: ["" : 21]>
best (float[N,32] x) => (float[N,32] eps)
{
    [first] h = Gemm <transB=1> (x, w1)
    [relu] r = Relu (h)
    [second] eps = Gemm <transB=1> (r, w2)
}
"""


def test_mimicking_the_float_network_learns_more_than_the_noise_does() -> None:
    """NeM: the same batches and steps at W4A4; gradients vary less, for the target holds nothing that is unknown."""
    from onnxq.autograd.interpreter import TorchGraph
    from onnxq.calibration import calibrate, weight_ranges
    from onnxq.learning import quantizers
    from onnxq.learning.finetune import Batch, FineTuning, finetune
    from onnxq.learning.student import Student
    from onnxq.passes.insert_qdq import InsertQDQ
    from onnxq.targets import get

    generator, alpha, deviation = np.random.default_rng(0), 0.5, 0.8
    basis, _ = np.linalg.qr(generator.standard_normal((32, 32)))
    factor = np.sqrt(1 - alpha) / (alpha * deviation**2 + 1 - alpha)

    def graph() -> TorchGraph:
        model = add_weights(BEST_DENOISER, {"w1": (64, 32), "w2": (32, 64)})
        for name, array in (
            ("w1", np.concatenate([basis, -basis])),
            ("w2", factor * np.concatenate([basis.T, -basis.T], axis=1)),
        ):
            model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
        target = get("tensorrt")
        target.prepare(model)
        InsertQDQ(target.place(model.graph, target.scheme("int4", "int4")).sites)(model)
        calibrate.set_weight_scales(model, weight_ranges.get("mse"))
        for name, value in model.graph.initializers.items():
            if name.endswith("_scale") and not name.startswith("w"):
                value.const_value = ir.tensor(np.float32(2.5 / 7).reshape(tuple(value.shape)), name=name)
        return TorchGraph(model)

    def batch(step: int, mimics: bool) -> Batch:
        own = np.random.default_rng((1, step))
        image, noise = (own.standard_normal((16, 32)).astype(np.float32) for _ in range(2))
        x = np.float32(np.sqrt(alpha)) * np.float32(deviation) * image + np.float32(np.sqrt(1 - alpha)) * noise
        return Batch({"x": torch.from_numpy(x)}, {} if mimics else {"eps": torch.from_numpy(noise)})

    def loss(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
        return (found["eps"] - wanted["eps"]).square().mean()

    errors, spread = [], []
    for mimics in (True, False):
        net = graph()
        student = Student(net, quantizers.find(net.model.graph))
        gradients = []
        for step in range(32):
            item = batch(step, mimics)
            wanted = dict(item.teacher) or student.teach(item.inputs, ["eps"])
            (found,) = torch.autograd.grad(loss(student.run(item.inputs, ["eps"]), wanted), [student.masters["w1"]])
            gradients.append(found)
        spread.append(float(torch.stack(gradients).var(dim=0).mean()))
        options = FineTuning(200, 16, weight_rate=1e-3, step_rate=1e-3)
        finetune(student, lambda step, mimics=mimics: batch(step, mimics), ["eps"], loss, options)
        with torch.no_grad():
            unseen = [batch(1000 + step, True).inputs for step in range(16)]
            pairs = [(student.run(item, ["eps"]), student.teach(item, ["eps"])) for item in unseen]
            errors.append(float(np.mean([loss(*pair) for pair in pairs])))
    assert spread[0] < 0.5 * spread[1]
    assert errors[0] < 0.9 * errors[1]


def test_without_quantizers_the_teacher_is_the_float_network(denoiser: Path) -> None:
    """Function preservation of the tables, and NeM's zero: teacher and student agree where nothing is rounded."""
    from onnxq.autograd.interpreter import TorchGraph
    from onnxq.learning.quantizers import as_float, find
    from onnxq.passes.insert_qdq import InsertQDQ
    from onnxq.passes.time_conditioned_scales import TimeConditionedScales, conditionable
    from onnxq.targets import get

    model = models.load(denoiser)
    target = get("tensorrt")
    target.prepare(model)
    InsertQDQ(target.place(model.graph, target.scheme("int4", "int4")).sites)(model)
    times = [900.0, 500.0, 100.0, 0.0]
    tables = {name: np.asarray([0.1, 0.2, 0.7, 1.3]) for name in conditionable(model.graph)}
    TimeConditionedScales("t", times, tables, "rescale")(model)
    graph = TorchGraph(model)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 1, 4, 4)).astype(np.float32)
    for time in (900, 120):
        feed = {"x": x, "t": np.full(3, time), "y": np.asarray([0, 1, 2])}
        wanted = Session(denoiser).run(feed)[0]
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()}
        found = graph.run(given, ["eps"], replaced=as_float(find(model.graph)))["eps"].numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_one_step_suits_activations_that_are_divided_by_what_they_reach() -> None:
    """Ranges that drift from 1 to 20 at four bits: about what a scale for each step gains."""
    generator = np.random.default_rng(0)
    reach = np.geomspace(1, 20, 50)
    values = [generator.standard_normal(4000) * deviation for deviation in reach]
    number_format = FORMATS["int4"]

    def error(groups: np.ndarray) -> float:
        means = np.asarray([reach[groups == group].mean() for group in groups])
        scale = max(np.abs(value / mean).max() for value, mean in zip(values, means, strict=True)) / 7
        rounded = [
            fake_quantize(value / mean, scale, 0, number_format) * mean
            for value, mean in zip(values, means, strict=True)
        ]
        return float(np.mean([((a - b) ** 2).mean() / (b**2).mean() for a, b in zip(rounded, values, strict=True)]))

    assert error(uniform(50, 50)) <= error(np.zeros(50, int)) / 7
    assert error(uniform(50, 8)) <= error(np.zeros(50, int)) / 5


def test_what_is_rounded_reaches_about_as_far_in_every_step(denoiser: Path, tmp_path: Path) -> None:
    """Samples that shrink tenfold along the sampler: quantizers see a range that hardly moves."""
    generator, steps = np.random.default_rng(0), np.arange(80) % 10
    x = generator.standard_normal((80, 1, 4, 4)) * np.geomspace(10, 1, 10)[steps].reshape(-1, 1, 1, 1)
    times = np.asarray(open_schedule(ASSUMED_DIFFUSION, find(models.load(denoiser)), 10).timesteps)
    data = {"x": x.astype(np.float32), "t": times[steps].astype(np.int64), "y": generator.integers(0, 2, 80)}
    np.savez(tmp_path / "data.npz", step=steps, **data)
    spread = {}
    for taq in ("none", "table"):
        knobs = {"taq": taq, "steps": 1, "weight_rate": 1e-9, "step_rate": 1e-9, "groups": 0}
        made = onnxq.quantize(denoiser, tmp_path / "data.npz", recipe="q-dm", knobs=knobs, **OPTIONS).model
        read = [node.inputs[0].name for node in made.graph if graphs.is_quantize(node) and node.inputs[0].producer()]
        values = Session(made, taps=read, optimize=False).run(data, read)
        reach = [[np.abs(value[steps == step]).max() for step in range(10)] for value in values]
        spread[taq] = [max(steps) / min(steps) for steps in reach]
    assert len(spread["none"]) == len(spread["table"]) >= 2
    assert all(
        after < 2 < before / 2 for before, after in zip(spread["none"], spread["table"], strict=True) if before > 4
    )
    assert max(spread["none"]) > 4


def test_the_trained_network_is_the_exported_one(denoiser: Path) -> None:
    """The graph in torch, as it was trained, and in onnxruntime, as it is stored, over a hundred inputs."""
    from onnxq.autograd.interpreter import TorchGraph

    made = onnxq.quantize(denoiser, recipe="q-dm", knobs=KNOBS | {"steps": 20}, **OPTIONS).model
    generator = np.random.default_rng(5)
    feed = {
        "x": generator.standard_normal((100, 1, 4, 4)).astype(np.float32),
        "t": generator.integers(0, 1000, 100),
        "y": generator.integers(0, 2, 100),
    }
    wanted = Session(made, optimize=False).run(feed)[0]
    found = TorchGraph(made, "cpu").run({name: torch.from_numpy(array) for name, array in feed.items()}, ["eps"])
    np.testing.assert_allclose(found["eps"].detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taq", ["none", "table"])
def test_one_timestep_for_the_batch_trains_as_well_as_one_for_each_row(
    taq: str, denoiser: Path, tmp_path: Path
) -> None:
    single = tmp_path / "scalar.onnx"
    ir.save(add_weights(NETWORK, SHAPES), single)
    knobs = KNOBS | {"taq": taq, "steps": 60}
    found = [
        onnxq.quantize(path, recipe="q-dm", knobs=knobs, **OPTIONS).numbers["sqnr_db"] for path in (single, denoiser)
    ]
    assert abs(found[0] - found[1]) < 1 and min(found) > 5, found


def test_taq_is_table_norm_or_none(denoiser: Path) -> None:
    with pytest.raises(OnnxqError, match="taq of table, norm, none"):
        onnxq.quantize(denoiser, recipe="q-dm", knobs={"taq": "tables"}, **OPTIONS)
    with pytest.raises(OnnxqError, match="expected attention"):
        onnxq.quantize(denoiser, recipe="q-dm", knobs={"taq": "norm"}, **OPTIONS)


# Four tokens of four numbers, which the timestep multiplies by up to 10: so it does queries and keys.
ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
denoiser (float[N,1,4,4] x, int64[N] t) => (float[N,1,4,4] eps)
<float rate = {0.0015}, float nine = {9.0}, float one = {1.0}, float half = {0.2}, int64[2] tail = {1, 2},
 int64[3] rows = {-1, 4, 4}, int64[4] whole = {-1, 1, 4, 4}>
{
    [cast] number = Cast <to=1> (t)
    [rate] angle = Mul (number, rate)
    [wave] wave = Sin (angle)
    [more] more = Mul (wave, nine)
    [amount] amount = Add (more, one)
    [places] factor = Unsqueeze (amount, tail)
    [tokens] tokens = Reshape (x, rows)
    [lift] lifted = MatMul (tokens, w_in)
    [drift] h = Mul (lifted, factor)
    [query] q = MatMul (h, w_q)
    [key] k = MatMul (h, w_k)
    [value] v = MatMul (lifted, w_v)
    [turn] kt = Transpose <perm=[0,2,1]> (k)
    [scores] s = MatMul (q, kt)
    [scale] logits = Mul (s, half)
    [shares] p = Softmax <axis=-1> (logits)
    [mix] o = MatMul (p, v)
    [out] y = MatMul (o, w_out)
    [image] eps = Reshape (y, whole)
}
"""
ATTENTION_SHAPES = {"w_in": (4, 32), "w_q": (32, 32), "w_k": (32, 32), "w_v": (32, 32), "w_out": (32, 4)}


def test_normalised_queries_and_keys_reach_equally_far_in_every_step(tmp_path: Path) -> None:
    """The pass: mean 0 and deviation 1 times the gain, whatever the step; another function; done once."""
    model = models.load(_attention(tmp_path))
    plain = Session(model.clone(), taps=["q", "kt"])
    rewrite = NormaliseAttention({"q": 2.0, "kt": 0.5})
    assert rewrite(model).modified and rewrite.normalised == ["q", "kt"]
    assert not NormaliseAttention({"q": 2.0, "kt": 0.5})(model).modified
    scores = next(node for node in model.graph if node.name == "scores")
    names = [value.name or "" for value in scores.inputs if value is not None]
    normalised = Session(model, taps=names)
    x = np.random.default_rng(0).standard_normal((10, 1, 4, 4)).astype(np.float32)
    feed = {"x": x, "t": np.arange(10) * 100}
    for before, after, axis, gain in zip(
        plain.run(feed, ["q", "kt"]), normalised.run(feed, names), (-1, -2), (2, 0.5), strict=True
    ):
        np.testing.assert_allclose(after.std(axis=axis), gain, rtol=1e-3)
        np.testing.assert_allclose(after.mean(axis=axis), 0, atol=1e-5)
        reach = [np.abs(value).max(axis=(1, 2)) for value in (before, after)]
        assert np.ptp(np.log(reach[1])) < np.ptp(np.log(reach[0])) - np.log(2)  # the ratio shrinks at least twofold
    assert np.abs(plain.run(feed, ["eps"])[0] - normalised.run(feed, ["eps"])[0]).max() > 1e-2


def test_a_network_trains_with_normalised_attention(tmp_path: Path) -> None:
    """At W4A4 it is nearer to the float network than rounding leaves it; its gains have moved, each by itself."""
    path = _attention(tmp_path)
    sampler, _ = open_sampler(models.load(path), path, make_settings({"steps": 10, "seed": 9}))
    visits = list(sampler.run(Session(path), range(16)))
    errors = {}
    options = OPTIONS | {"samples": 320}
    knobs = {"trajectories": 32, "kept_steps": 10, "steps": 300, "taq": "norm", "weight_rate": 1e-3}
    for recipe, own in (("int8", {"step_floor_db": 0.0}), ("q-dm", knobs)):
        made = onnxq.quantize(path, recipe=recipe, knobs=own, **options).model
        found = Session(made, optimize=False)
        errors[recipe] = np.mean([np.mean((found.run(visit.feed)[0] - visit.raw) ** 2) for visit in visits])
    gains = [value.const_value for name, value in made.graph.initializers.items() if name.endswith("_gain")]
    assert len(gains) == 2 and all(gain is not None and np.ptp(gain.numpy()) > 0 for gain in gains)
    assert errors["q-dm"] < errors["int8"]


@pytest.mark.parametrize(
    "export",
    [
        ATTENTION.replace("[N", "[2"),
        ATTENTION.replace("int64[N] t", "int64 t").replace("int64[2] tail = {1", "int64[3] tail = {0, 1"),
    ],
    ids=["batch of two", "single timestep"],
)
def test_it_trains_alike_in_exports_whose_samples_cannot_share_a_run(export: str, tmp_path: Path) -> None:
    knobs = {"trajectories": 4, "kept_steps": 10, "steps": 20, "taq": "norm"}
    options = {"steps": 10, "samples": 40, "recipe": "q-dm", "knobs": knobs}
    found = [onnxq.quantize(_attention(tmp_path, text), **options).numbers["sqnr_db"] for text in (ATTENTION, export)]
    assert abs(found[0] - found[1]) < 1 and min(found) > 8, found


def _attention(folder: Path, text: str = ATTENTION) -> Path:
    path = folder / "attention.onnx"
    ir.save(add_weights(text, ATTENTION_SHAPES), path)
    return path
