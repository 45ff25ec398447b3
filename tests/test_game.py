"""Games on the classifier that ships here: what each move changes, what stays, and what comes of it at two bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS

import onnxq
from onnxq import model as models
from onnxq import targets
from onnxq.calibration.data import Iterables
from onnxq.config import Settings
from onnxq.job import Job
from onnxq.progress import Progress

torch = pytest.importorskip("torch", reason="synthesis needs torch: pip install 'onnxq[learn]'")

from torch import Tensor  # noqa: E402

from onnxq.autograd.interpreter import TorchGraph  # noqa: E402
from onnxq.learning.attention_transfer import attention_gap  # noqa: E402
from onnxq.learning.augmentation import perturbed  # noqa: E402
from onnxq.learning.finetune import Batch, Batches, FineTuning, finetune  # noqa: E402
from onnxq.learning.losses import Loss, distillation  # noqa: E402
from onnxq.learning.student import Student  # noqa: E402
from onnxq.learning.zero_shot import ZeroShot, ZeroShotKnobs  # noqa: E402
from onnxq.synthesis.disagreement import Balance, Band, disagreement, entropy  # noqa: E402
from onnxq.synthesis.game import Game, GameTerm, Move  # noqa: E402
from onnxq.synthesis.relations import output_gap, relation_gap  # noqa: E402

FASHION, CALIBRATION = MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz"
RATES = {"weight_rate": 1e-3, "step_rate": 1e-3}


def student(step_rate: float = 1e-4, **knobs: Any) -> ZeroShot:
    """The classifier at two and three bits beside its float self, with ranges from real images: none must be made."""
    with np.load(CALIBRATION) as archive:
        source = Iterables([{"x": archive["x"][:16]}])
    target = targets.get("tensorrt")
    job = Job(models.load(FASHION), target, target.scheme("int2", "int3"), Settings(), source, Progress())
    start = ZeroShotKnobs(**{"batch": 8, "weight_rate": 1e-4, "step_rate": step_rate} | knobs)
    return ZeroShot(job, start, classes=True, statistics=True)


def zaqs_gap(zero_shot: ZeroShot) -> Loss:
    """What ZAQ's generator raises and its student lowers."""

    def gap(found: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        return output_gap(found, teacher, list(zero_shot.outputs)) + relation_gap(found, teacher, zero_shot.stages)

    return gap


def adadfqs_terms(zero_shot: ZeroShot, *, band: bool = True, balance: bool = True) -> list[tuple[float, GameTerm]]:
    logits = zero_shot.logits
    bounds = (0.1, 0.8) if band else (0.0, 1.0)
    return [
        (1.0, Band(logits, *bounds)),
        (0.2 * balance, Balance(logits, -1)),
        (0.1 * balance, Balance(logits, 1)),
        (1.0, zero_shot.statistics()),
    ]


def initializers(zero_shot: ZeroShot) -> dict[str, bytes]:
    """Of the float network with its BatchNormalization, and of the Q/DQ graph, as torch has them."""
    found = {}
    for graph in (zero_shot.network.graph, zero_shot.graph):
        names = list(graph.model.graph.initializers)
        found |= {f"{id(graph)}{name}": value.numpy().tobytes() for name, value in graph.run({}, names).items()}
    return found


@pytest.mark.parametrize("weight_rate", [1e-4, 0.0])
def test_biases_start_corrected_and_the_teacher_is_the_float_network(weight_rate: float) -> None:
    plain, corrected = (student(weight_rate=weight_rate, bias_correction=wanted) for wanted in (False, True))
    with np.load(CALIBRATION) as archive:
        inputs = {"x": torch.from_numpy(archive["x"][16:80])}
    exact = TorchGraph(models.load(FASHION)).run(inputs, plain.outputs)
    errors = []
    for zero_shot in (plain, corrected):
        teacher, found = zero_shot.student.teach(inputs, exact), zero_shot.student.run(inputs, exact)
        for name, value in exact.items():
            torch.testing.assert_close(teacher[name], value, rtol=1e-3, atol=1e-3)
        errors.append(sum(float((found[name] - value).detach().square().mean()) for name, value in exact.items()))
    assert errors[1] < 0.8 * errors[0]


# --- ZAQ


def test_the_student_lowers_what_the_generator_raises_and_the_generator_stays() -> None:
    """Five steps on the same images; ZAQ's student makes several for each move."""
    zero_shot = student()
    gap, wanted = zaqs_gap(zero_shot), [*zero_shot.outputs, *zero_shot.stages]
    player = zero_shot.player(1e-3, conditional=False)
    game = zero_shot.game(player, [(-1.0, lambda move: gap(move.student, move.teacher))], reads_student=True,
                          features=zero_shot.stages, student_steps=6)  # fmt: skip
    inputs = game(1).inputs
    teacher, state = zero_shot.student.teach(inputs, wanted), player.state()
    first = gap(zero_shot.student.run(inputs, wanted), teacher)
    finetune(zero_shot.student, lambda step: Batch(inputs), wanted, gap, FineTuning(5, weight_rate=1e-4))
    last = gap(zero_shot.student.run(inputs, wanted), teacher)
    assert float(last.detach()) < 0.95 * float(first.detach())
    assert all(torch.equal(value, teacher[name]) for name, value in zero_shot.student.teach(inputs, wanted).items())
    assert all(np.array_equal(array, state[name]) for name, array in player.state().items())
    assert all(parameter.grad is None for parameter in player.network.parameters())


def test_a_student_that_is_not_rounded_leaves_the_generator_nothing_to_find() -> None:
    zero_shot = student()
    gap, wanted = zaqs_gap(zero_shot), [*zero_shot.outputs, *zero_shot.stages]
    model = models.load(FASHION)
    targets.get("tensorrt").prepare(model)
    exact = Student(TorchGraph(model), [], learn_steps=False)
    player = zero_shot.player(1e-3, conditional=False)
    images, _ = player.draw(4, 1)
    inputs = zero_shot.network.inputs(images)
    found = gap(exact.run(inputs, wanted), exact.teach(inputs, wanted))
    (gradient,) = torch.autograd.grad(found, images)
    assert float(found.detach()) == 0 and float(gradient.abs().max()) == 0
    rounded = gap(zero_shot.student.run(inputs, wanted), zero_shot.student.teach(inputs, wanted))
    assert float(rounded.detach()) > 0.1


def test_what_a_student_sees_does_not_move_its_ranges() -> None:
    """In the authors' code of ZAQ activations widen ranges wherever they come from, test images too."""
    zero_shot = student()
    before = {name: tensor.clone() for name, tensor in zero_shot.student.learned().items()}
    images, _ = zero_shot.player(1e-3, conditional=False).draw(4, 1)
    outputs = []
    for factor in (1.0, 100.0, 1.0):
        with torch.no_grad():
            outputs.append(zero_shot.student.run(zero_shot.network.inputs(factor * images), zero_shot.outputs))
    after = zero_shot.student.learned()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after)
    assert torch.equal(outputs[0][zero_shot.logits], outputs[2][zero_shot.logits])


# --- AdaDFQ, HAST


def test_without_band_and_balance_the_generator_only_matches_statistics() -> None:
    """AdaDFQ's generator is then GDFQ's without its classes."""
    zero_shot = student()
    plain = [(1.0, zero_shot.statistics())]
    found = {}
    for name, terms, reads in (
        ("off", adadfqs_terms(zero_shot, band=False, balance=False), True),
        ("plain", plain, False),
        ("on", adadfqs_terms(zero_shot), True),
    ):
        player = zero_shot.player(1e-3, conditional=True)
        game = zero_shot.game(player, terms, reads_student=reads)
        for _ in range(4):
            game.move()
        found[name] = player.draw(8, 1)[0].detach()
    torch.testing.assert_close(found["off"], found["plain"], atol=1e-3, rtol=0)
    assert float((found["on"] - found["plain"]).abs().max()) > 0.1


@pytest.mark.parametrize("recipe", ["adadfq", "hast"])
def test_only_what_learns_changes(recipe: str) -> None:
    """The float network, its statistics and, with a rate of 0, the ranges stay; so does the other side of a game."""
    zero_shot = student(step_rate=0.0)
    logits = zero_shot.logits
    player = zero_shot.player(1e-3, conditional=True)
    game = zero_shot.game(player, adadfqs_terms(zero_shot), reads_student=True)
    masters = {name: tensor.detach().clone() for name, tensor in zero_shot.student.masters.items()}
    before = initializers(zero_shot)
    batch = game(1)
    state = player.state()
    for name, tensor in zero_shot.student.masters.items():  # a move of the generator, through the student
        assert torch.equal(tensor, masters[name]) and tensor.grad is None
    batches: Batches = lambda step: Batch(batch.inputs)  # noqa: E731
    features = zero_shot.branches if recipe == "hast" else []
    wanted = [*zero_shot.outputs, *features]

    def loss(found: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        if recipe == "adadfq":
            return disagreement(found[logits], teacher[logits], 20.0)
        return distillation(zero_shot.outputs, 20.0)(found, teacher) + 100 * attention_gap(found, teacher, features)

    if recipe == "hast":
        batches = perturbed(batches, zero_shot.student, wanted, loss, 0.01)
    learned = finetune(zero_shot.student, batches, wanted, loss, FineTuning(2, weight_rate=1e-3))
    assert before == initializers(zero_shot)  # what is stored is changed at the end alone
    assert all(np.array_equal(array, state[name]) for name, array in player.state().items())
    scales = {item.scale for item in zero_shot.student.quantizers}
    assert scales and not scales & learned.keys()
    assert sum(not torch.equal(tensor, masters[name]) for name, tensor in zero_shot.student.masters.items()) > 20


@pytest.fixture
def test_images(tmp_path: Path) -> Path:
    """Three hundred pictures of the test split."""
    path = tmp_path / "test.npz"
    with np.load(MODELS / "fashion_test.npz") as archive:
        np.savez(path, x=archive["x"][:300], labels=archive["labels"][:300])
    return path


def top1(recipe: str, test: Path, weights: str, activations: str, **knobs: object) -> float:
    """Top-1 in percent of what a recipe makes of the classifier; all start from the same ranges, of real images."""
    output = test.with_name("quantized.onnx")
    options = {"weights": weights, "activations": activations, "samples": 32, "budget": "quick"}
    knobs = {"observer": "mse", "weight_ranges": "mse"} | knobs
    onnxq.quantize(FASHION, CALIBRATION, output=output, recipe=recipe, knobs=knobs, **options)  # type: ignore[arg-type]
    return 100 * onnxq.compare(FASHION, output, test, latency=False, layers=False).top1_quantized


def test_adadfq_comes_back_from_two_bits_and_networks_agree_more(
    test_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where four bits are enough, on the other hand, it does no harm."""
    agreed: list[float] = []
    original = Game.move

    def listens(self: Game) -> Move:
        move = original(self)
        (logits,) = move.student
        difference = move.teacher[logits] - move.student[logits]
        agreed.append(float(entropy(difference.detach()).mean()) / math.log(difference.shape[1]))
        return move

    monkeypatch.setattr(Game, "move", listens)
    start = top1("int8", test_images, "int2", "int3")
    assert top1("adadfq", test_images, "int2", "int3", steps=40, batch=16, **RATES) > start + 20
    assert len(agreed) == 20 + 40  # half as many moves of the generator alone as there are steps
    assert np.mean(agreed[-20:]) > np.mean(agreed[:20]) + 0.2
    start = top1("int8", test_images, "int4", "int4")
    assert top1("adadfq", test_images, "int4", "int4", steps=4, batch=16, **RATES) > start - 2
