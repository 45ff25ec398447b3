"""Fine-tuning: what learns, what stays, what gradients are, that it resumes and that its bytes repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import DATA, MODELS, add_weights

import onnxq
from onnxq import OnnxqError, targets
from onnxq.autograd.interpreter import TorchGraph
from onnxq.calibration import calibrate, observers
from onnxq.calibration.data import Iterables
from onnxq.config import Settings
from onnxq.job import Job
from onnxq.learning import quantizers
from onnxq.learning.activations import gradient_factor
from onnxq.learning.checkpoint import Checkpoint
from onnxq.learning.finetune import Batch, FineTuning, Moment, finetune
from onnxq.learning.losses import compared_outputs, divergence, relative_error
from onnxq.learning.student import Student, input_weights
from onnxq.progress import Progress

FASHION = (MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz")
KNOBS = {"steps": 12, "batch": 8, "samples": 32}


PERCEPTRON = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,32] x) => (float[N,16] y)
{
    [first] a = Gemm <transB=1> (x, w1, b1)
    [silu] s = Sigmoid (a)
    [gate] m = Mul (a, s)
    [second] y = Gemm <transB=1> (m, w2, b2)
}
"""


def correlated(rows: int, seed: int) -> np.ndarray:
    """Inputs as networks see them: for uncorrelated ones the nearest codes are the best, and nothing can be learned."""
    mixing = np.random.default_rng(99).standard_normal((8, 32)) / 8**0.5
    return (np.random.default_rng(seed).standard_normal((rows, 8)) @ mixing).astype(np.float32)


def perceptron(target: str = "cpu", weights: str = "int4", activations: str = "uint4", size: float = 1.0) -> Job:
    """A small network with Q/DQ and scales; its activations go below 0, so that zero points matter.

    Args:
        size: What its inputs are multiplied with, and its first weights divided by: the function is the same.
    """
    model = add_weights(PERCEPTRON, {"w1": (24, 32), "b1": (24,), "w2": (16, 24), "b2": (16,)})
    first = model.graph.initializers["w1"]
    assert first.const_value is not None
    first.const_value = ir.tensor(first.const_value.numpy() / np.float32(size), name="w1")
    x = np.float32(size) * correlated(64, 1)
    chosen = targets.get(target)
    job = Job(model, chosen, chosen.scheme(weights, activations), Settings(), Iterables([{"x": x}]), Progress())
    job.prepare()
    job.insert()
    job.ranges = calibrate.set_activation_scales(job.model, job.record(), observers.get("minmax"))
    calibrate.set_weight_scales(job.model)
    return job


def student_of(job: Job, **options: bool) -> Student:
    return Student(TorchGraph(job.model), quantizers.find(job.model.graph), **options)


def batches(step: int) -> Batch:
    return Batch({"x": torch.from_numpy(correlated(16, step))})


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 1e-3), ("sgd", 0.1)])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_network_of_large_inputs_learns_as_one_of_usual_ones(optimizer: str, rate: float, is_told: bool) -> None:
    """Bytes are a hundred times as large, weights on them as small: at the same rate those would be torn apart."""
    found = []
    for size in (1.0, 128.0):
        job = perceptron(size=size)
        student = student_of(job)
        if is_told:
            student.input_sizes |= dict.fromkeys(input_weights(job.model.graph, student.quantizers), size)
            assert list(student.input_sizes) == ["w1"]

        def larger(step: int, size: float = size) -> Batch:
            return Batch({"x": size * batches(step).inputs["x"]})

        options = FineTuning(20, 16, optimizer, weight_rate=rate, step_rate=0.0)
        finetune(student, larger, ["y"], lambda a, b: (a["y"] - b["y"]).square().mean(), options)
        with torch.no_grad():
            found.append(student.run(larger(99).inputs, ["y"])["y"].numpy())
    apart = float(np.square(found[0] - found[1]).sum() / np.square(found[0]).sum())
    assert apart < 1e-3 if is_told else apart > 0.1


def mse(student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]) -> torch.Tensor:
    return relative_error(student["y"], teacher["y"])


def test_an_untrained_student_is_the_quantized_graph_and_its_teacher_the_float_one() -> None:
    job = perceptron()
    student = student_of(job)
    given = batches(0).inputs
    graph = TorchGraph(job.model)
    torch.testing.assert_close(student.run(given, ["y"])["y"], graph.run(given, ["y"])["y"], rtol=1e-5, atol=1e-5)
    float_model = add_weights(PERCEPTRON, {"w1": (24, 32), "b1": (24,), "w2": (16, 24), "b2": (16,)})
    exact = TorchGraph(float_model).run(given, ["y"])["y"]
    torch.testing.assert_close(student.teach(given, ["y"])["y"], exact)


def test_training_lowers_the_error_and_the_stored_graph_is_what_was_trained() -> None:
    job = perceptron(weights="int3", activations="uint8")
    student = student_of(job)
    unseen = batches(10_000).inputs
    exact = student.teach(unseen, ["y"])["y"]
    before = relative_error(student.run(unseen, ["y"])["y"], exact)
    learned = finetune(student, batches, ["y"], mse, FineTuning(steps=200, weight_rate=3e-3, step_rate=3e-3))
    trained = student.run(unseen, ["y"])["y"].detach()
    assert relative_error(trained, exact) < 0.7 * before
    quantizers.store(TorchGraph(job.model), learned)
    job.lower()
    stored = TorchGraph(job.model).run(unseen, ["y"])["y"]
    torch.testing.assert_close(stored, trained, rtol=1e-4, atol=1e-4)


def test_steps_stay_positive_and_zero_points_whole_whatever_the_rate() -> None:
    job = perceptron()
    student = student_of(job)
    learned = finetune(student, batches, ["y"], mse, FineTuning(steps=20, weight_rate=0.0, step_rate=1.0))
    for item in student.quantizers:
        assert (learned[item.scale] > 0).all()
        if item.zero_point in learned:
            zero = learned[item.zero_point]
            assert torch.equal(zero, zero.round()) and item.low <= zero <= item.high
    assert any(item.zero_point in learned for item in student.quantizers)


def test_zero_points_of_a_symmetric_target_stay() -> None:
    job = perceptron("tensorrt", "int4", "int4")
    learned = finetune(student_of(job), batches, ["y"], mse, FineTuning(steps=3, step_rate=1e-2))
    assert not any(name.endswith("zero_point") for name in learned)


def test_gradients_are_lsqs_and_lsq_pluss() -> None:
    """Equation 3 of LSQ, and 5 and 6 of LSQ+: an offset has a gradient where values are clipped, and there alone."""
    job = perceptron()
    student = student_of(job)
    step = next(item for item in student.activations if item.shift.requires_grad)
    size, zero = float(step.step.detach()), float(step.zero_point.detach())
    low, high = step.quantizer.low, step.quantizer.high
    values = torch.tensor([0.3, -0.4, 1000.0, -1000.0, 0.11]) * size
    step(values).sum().backward()
    ratio = values / size
    codes = ratio.round() + zero
    inside = (codes >= low) & (codes <= high)
    of_step = torch.where(inside, ratio.round() - ratio, codes.clamp(low, high) - zero).sum() * size
    torch.testing.assert_close(step.log_step.grad, of_step, rtol=1e-4, atol=1e-6)
    of_zero = -(~inside).sum() * size * (high - low)
    torch.testing.assert_close(step.shift.grad, of_zero.reshape(step.shift.shape), rtol=1e-4, atol=1e-6)


def test_the_scaled_gradient_is_one_over_the_root_of_values_times_levels() -> None:
    job = perceptron()
    plain, scaled = student_of(job), student_of(job, scaled=True)
    for student in (plain, scaled):
        student.run(batches(0).inputs, ["y"])["y"].square().sum().backward()
    for name, weight in plain.weights.items():
        per_step = weight.grid.weight.numel() // weight.grid.scale.numel()
        factor = gradient_factor(per_step, weight.grid.high)
        assert factor == pytest.approx((per_step * weight.grid.high) ** -0.5)
        torch.testing.assert_close(scaled.weights[name].log_step.grad, weight.log_step.grad * factor)


def test_a_run_that_is_interrupted_goes_on_to_the_same_result(tmp_path: Path) -> None:
    options = FineTuning(steps=9, weight_rate=1e-3, step_rate=1e-3, save_every=2)
    whole = finetune(student_of(perceptron()), batches, ["y"], mse, options)
    seen: list[int] = []

    def until_five(step: int) -> Batch:
        if step == 5:
            raise KeyboardInterrupt
        return batches(step)

    def counted(step: int) -> Batch:
        seen.append(step)
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        finetune(student_of(perceptron()), until_five, ["y"], mse, options, checkpoint=Checkpoint(tmp_path, "a"))
    resumed = finetune(student_of(perceptron()), counted, ["y"], mse, options, checkpoint=Checkpoint(tmp_path, "a"))
    assert seen == [4, 5, 6, 7, 8]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Generator:
    """A companion: one number that learns to make hard batches, kept with the checkpoint."""

    def __init__(self) -> None:
        self.amplitude = np.float32(1.0)

    def __call__(self, step: int) -> Batch:
        self.amplitude *= np.float32(1.1)
        return Batch({"x": batches(step).inputs["x"] * float(self.amplitude)})

    def state(self) -> dict[str, np.ndarray]:
        return {"amplitude": np.asarray(self.amplitude)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self.amplitude = np.float32(state["amplitude"])


def test_a_generator_in_the_loop_is_resumed_too_and_terms_see_inner_values(tmp_path: Path) -> None:
    options = FineTuning(steps=6, optimizer="sgd", weight_rate=1e-3, step_rate=1e-3, milestones=(0.5,), save_every=3)
    moments: list[Moment] = []

    def attention(moment: Moment) -> torch.Tensor:
        moments.append(moment)
        return (moment.student["m"] - moment.teacher["m"]).square().mean()

    def run(folder: Path, generator: Generator, steps: int) -> dict[str, torch.Tensor]:
        def stop(step: int) -> None:
            if step == steps:
                raise KeyboardInterrupt

        return finetune(student_of(perceptron()), generator, ["y", "m"], mse, options, terms=[attention],
                        companions=[generator], checkpoint=Checkpoint(folder, "a"), on_step=stop)  # fmt: skip

    whole = run(tmp_path / "whole", Generator(), 100)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Generator(), 4)
    resumed = run(tmp_path / "parts", Generator(), 100)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert moments[0].student["m"].requires_grad and not moments[0].teacher["m"].requires_grad
    assert [options.rate_factor(step) for step in (0, 2, 3)] == [1.0, 1.0, 0.1]


def test_the_teacher_is_never_changed() -> None:
    job = perceptron()
    before = {name: value.const_value.numpy().copy() for name, value in job.model.graph.initializers.items()}
    student = student_of(job)
    exact = student.teach(batches(0).inputs, ["y"])["y"]
    finetune(student, batches, ["y"], mse, FineTuning(steps=5, weight_rate=1e-2))
    assert torch.equal(student.teach(batches(0).inputs, ["y"])["y"], exact)
    for name, value in job.model.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), before[name])


def test_a_mask_is_no_bias() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    network (float[N,8,32] x) => (float[N,8,32] y)
    {
        [keys] k = MatMul (x, w1)
        [shift] kb = Add (k, b1)
        [turn] t = Transpose <perm=[0,2,1]> (kb)
        [scores] s = MatMul (x, t)
        [masked] m = Add (s, mask)
        [soft] p = Softmax (m)
        [mix] y = MatMul (p, x)
    }
    """
    model = add_weights(text, {"w1": (32, 32), "b1": (32,), "mask": (8, 8)})
    graph = TorchGraph(model)
    assert set(Student(graph, [], learn_steps=False).masters) == {"w1", "b1"}


def test_the_loss_follows_the_outputs() -> None:
    model = add_weights(PERCEPTRON, {"w1": (24, 32), "b1": (24,), "w2": (16, 24), "b2": (16,)})
    assert compared_outputs(model) == {"y": "kl"} and compared_outputs(model, "mse") == {"y": "mse"}
    soft = PERCEPTRON.replace("(float[N,16] y)", "(float[N,16] p)").replace("\n}", "\n    [soft] p = Softmax (y)\n}")
    assert compared_outputs(add_weights(soft, {"w1": (24, 32), "b1": (24,), "w2": (16, 24), "b2": (16,)})) == {
        "y": "kl"
    }
    with pytest.raises(OnnxqError, match="expected a loss of auto, kl, mse, found 'l1'"):
        compared_outputs(model, "l1")
    logits = torch.randn(5, 7)
    assert float(divergence(logits, logits)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(logits + 3, logits, temperature=4)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("distil", ["network", "blocks"])
def test_lsq_beats_nearest_rounding_and_repeats_its_bytes(distil: str, tmp_path: Path) -> None:
    formats = {"weights": "int3", "activations": "int4", "samples": 32}
    knobs = {"weight_ranges": "mse", "observer": "mse", "bias_correction": False}
    nearest = onnxq.quantize(*FASHION, recipe="int8", knobs=knobs, **formats)
    for name in ("first", "second"):
        options = KNOBS | {"distil": distil, "steps": 25, "loss": "mse"}
        learned = onnxq.quantize(*FASHION, recipe="lsq", knobs=options, output=tmp_path / name, **formats)
        assert learned.numbers["sqnr_db"] > nearest.numbers["sqnr_db"] + 1.0
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]  # no checkpoint is left


def test_steps_that_learn_keep_codes_that_were_chosen_together() -> None:
    job = perceptron("tensorrt", "int4", "int8")
    graph, found = TorchGraph(job.model), quantizers.find(job.model.graph)
    item = next(item for item in found if item.is_weight)
    rounded = quantizers.Grid(graph, item).nearest().detach()
    for starts, kept in (({item.source: rounded}, True), ({}, False)):
        student = Student(graph, found, starts=starts)
        weight, master = student.weights[item.output], student.masters[item.source]
        assert torch.equal(master, rounded) == kept
        with torch.no_grad():
            before = weight(master) / weight.grid.spread(weight.step)
            weight.log_step += 0.2
            after = weight(master) / weight.grid.spread(weight.step)
        assert torch.allclose(before, after, atol=1e-4) == kept


def test_lsq_from_gptqs_codes_starts_where_gptq_ends_and_goes_on_from_there() -> None:
    formats = {"weights": "int3", "activations": "int8", "samples": 32}
    gptq = onnxq.quantize(*FASHION, recipe="gptq", knobs={"observer": "mse"}, **formats).numbers["sqnr_db"]
    knobs = {"distil": "network", "start": "gptq", "loss": "mse", "batch": 8}
    still = knobs | {"steps": 1, "weight_rate": 1e-12, "step_rate": 1e-12}
    started = onnxq.quantize(*FASHION, recipe="lsq", knobs=still, **formats).numbers["sqnr_db"]
    assert started == pytest.approx(gptq, abs=0.2)
    learned = onnxq.quantize(*FASHION, recipe="lsq", knobs=knobs | {"steps": 30, "step_rate": 3e-4}, **formats)
    assert learned.numbers["sqnr_db"] > gptq + 1


def test_crops_and_mixtures_are_those_of_the_seed(tmp_path: Path) -> None:
    knobs = {"distil": "network", "crop": 0.5, "mix": True, "steps": 4, "batch": 8}
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        options = {"recipe": "lsq", "knobs": knobs, "seed": seed, "samples": 16, "output": tmp_path / name}
        onnxq.quantize(*FASHION, **options)
    first, second, third = ((tmp_path / name).read_bytes() for name in ("first", "second", "third"))
    assert first == second != third


def test_lsq_on_the_cpu_target_learns_zero_points(tmp_path: Path) -> None:
    found = onnxq.quantize(*FASHION, recipe="lsq", target="cpu", activations="uint4", knobs=KNOBS, samples=32)
    assert found.numbers["sqnr_db"] > 8


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"distil": "layers"}, "expected distil of blocks, network, found 'layers'"),
        ({"distil": "blocks", "block_inputs": "both"}, "expected block_inputs of student, teacher, found 'both'"),
        ({"optimizer": "lion"}, "expected optimizer of adam, sgd, found 'lion'"),
        ({"weight_rate": 0.0, "step_rate": 0.0}, "expected weights or steps that learn, found neither"),
        ({"crop": 0.5}, "expected distil=network with crop or mix, found distil=blocks"),
        ({"distil": "network", "crop": -1.0}, "expected a crop above 0 and up to 1, found -1"),
        ({"weight_rate": 1e30, "optimizer": "sgd"}, "expected a finite loss while fine-tuning, found"),
    ],
)
def test_bad_knobs_are_named(knobs: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match=message):
        onnxq.quantize(*FASHION, recipe="lsq", knobs=KNOBS | knobs, samples=8, output=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_block_distillation_comes_back_from_three_bits_on_a_real_network(tmp_path: Path) -> None:
    model = DATA / "models" / "resnet20_cifar10.onnx"
    inputs = Path("/nowhere") if not model.is_file() else DATA
    if not inputs.is_dir():
        pytest.skip("the real models are not here (../shared/data)")
    value = next(value for value in ir.load(model).graph.inputs if not value.is_initializer())
    x = np.random.default_rng(0).standard_normal((32, 3, 32, 32)).astype(np.float32)
    formats = {"weights": "int3", "activations": "int8", "samples": 32}
    data = [{value.name: x}]
    nearest = onnxq.quantize(model, data, knobs={"weight_ranges": "mse", "bias_correction": False}, **formats)
    options = {"distil": "blocks", "steps": 15, "batch": 16}
    learned = onnxq.quantize(model, data, recipe="lsq", knobs=options, **formats)
    assert learned.numbers["sqnr_db"] > nearest.numbers["sqnr_db"] + 3
