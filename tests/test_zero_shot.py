"""Fine-tuning without data: what generators, terms and students do, property by property of the papers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS, add_weights

import onnxq
from onnxq import OnnxqError
from onnxq import model as models
from onnxq.runtime import Session

torch = pytest.importorskip("torch", reason="synthesis needs torch: pip install 'onnxq[learn]'")

from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from onnxq.learning.attention_transfer import attention_gap, channel_attention  # noqa: E402
from onnxq.learning.augmentation import mixed, mixture, random_crops, steepest  # noqa: E402
from onnxq.learning.finetune import Batch  # noqa: E402
from onnxq.learning.keep_best import KeepBest  # noqa: E402
from onnxq.synthesis.centers import Centers, MatchCenters  # noqa: E402
from onnxq.synthesis.disagreement import Balance, Band, agreement, disagreement, entropy  # noqa: E402
from onnxq.synthesis.features import residual_branches, stage_ends  # noqa: E402
from onnxq.synthesis.game import Game, Move  # noqa: E402
from onnxq.synthesis.network import Network  # noqa: E402
from onnxq.synthesis.player import Player  # noqa: E402
from onnxq.synthesis.relations import channel_relations, output_gap, relation_gap  # noqa: E402
from onnxq.synthesis.statistics import moments  # noqa: E402
from onnxq.synthesis.synthesize import synthesise  # noqa: E402
from onnxq.synthesis.terms import MatchStatistics, PredictClasses, deep_from, layer_weights  # noqa: E402
from onnxq.synthesis.texture import TextureEnergy, laws_masks, texture_energy  # noqa: E402

FASHION = MODELS / "fashion_resnet.onnx"
RECIPES = ("gdfq", "zaq", "adadfq", "hast", "texq")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fashion() -> Network:
    return Network(models.load(FASHION), 0, "cpu")


def predictions(network: Network, images: Tensor) -> Tensor:
    assert network.logits is not None
    return network.graph.run(network.given(images), [network.logits])[network.logits]


# --- the generator and the game


def test_a_player_draws_by_number_and_goes_on_from_its_state() -> None:
    first, second = (Player((1, 10, 14), 3, 7) for _ in range(2))
    images, labels = first.draw(6, 1)
    assert images.shape == (6, 1, 10, 14) and set(labels.tolist()) <= {0, 1, 2}
    assert torch.equal(images, second.draw(6, 1)[0]) and not torch.equal(images, second.draw(6, 2)[0])
    for number in range(3):
        first.step(first.draw(6, number)[0].square().mean() * 0 + first.draw(6, number)[0][:, :, :3].mean())
    second.restore(first.state())
    for player in (first, second):
        player.step(player.draw(6, 9)[0][:, :, :3].mean())
    assert torch.equal(first.draw(6, 10)[0], second.draw(6, 10)[0])


def test_classes_tell_images_apart() -> None:
    player = Player((1, 8, 8), 2, 0)
    codes = normal(1, 256).expand(2, 256) + player.classes_embedded(torch.tensor([0, 1]))
    images = player.network(torch.cat([codes, normal(6, 256, seed=1)]))
    assert not torch.allclose(images[0], images[1], atol=0.1)


def linear_game(student_steps: int = 1, warm_up: int = 0) -> tuple[Game, Tensor]:
    """A game against a teacher whose only value is the mean of the lower half of its images."""
    weight = torch.ones(1, requires_grad=True)
    game = Game(
        Player((1, 8, 8), 2, 0, rate=1e-2),
        lambda images: {"x": images},
        lambda images: {"mean": images[:, :, 4:].mean((1, 2, 3))},
        lambda images: {"mean": weight * images[:, :, 4:].mean((1, 2, 3))},
        [(-1.0, lambda move: move.teacher["mean"].mean()), (0.0, lambda move: move.student["mean"].mean())],
        batch=8,
        warm_up=warm_up,
        student_steps=student_steps,
    )
    return game, weight


def test_moves_reach_the_generator_alone() -> None:
    game, weight = linear_game()
    first = game.move()
    for _ in range(40):
        last = game.move()
    assert weight.grad is None
    assert float(last.teacher["mean"].detach().mean()) > float(first.teacher["mean"].detach().mean()) + 0.2


def test_the_student_gets_detached_images_and_the_values_that_are_known() -> None:
    game, _ = linear_game()
    batch = game(0)
    assert not batch.inputs["x"].requires_grad and not batch.teacher["mean"].requires_grad
    torch.testing.assert_close(batch.teacher["mean"], batch.inputs["x"][:, :, 4:].mean((1, 2, 3)))


def test_the_generator_moves_once_in_several_steps() -> None:
    game, _ = linear_game(student_steps=3, warm_up=4)
    moves = []
    game.move = (lambda move: lambda: moves.append(1) or move())(game.move)  # type: ignore[method-assign, func-returns-value]
    images = [game(step).inputs["x"] for step in range(7)]
    assert len(moves) == 4 + 3
    assert all(not torch.equal(images[0], other) for other in images[1:])


# --- AdaDFQ


def test_agreement_is_that_of_the_softmax_of_the_difference() -> None:
    difference = torch.cat([torch.full((1, 10), 3.0), 5 * normal(7, 10)])
    found = agreement(difference)
    assert float(found.min()) == 0 and float(found[0]) == pytest.approx(1) and bool((found <= 1).all())
    assert float(entropy(difference)[0]) == pytest.approx(math.log(10))


def move_of(teacher: Tensor, student: Tensor) -> Move:
    labels = torch.arange(len(teacher)) % teacher.shape[1]
    return Move(torch.zeros(len(teacher), 1, 4, 4), labels, {"y": teacher}, {"y": student})


def test_the_band_pushes_from_outside_only() -> None:
    teacher = torch.zeros(4, 10)
    scale = torch.tensor([30.0, 4.0, 1.5, 0.1])[:, None].requires_grad_(True)
    difference = scale * normal(1, 10).expand(4, 10)
    term = Band("y", 0.1, 0.8)(move_of(teacher, -difference))
    (gradient,) = torch.autograd.grad(term, scale)
    found = agreement(difference.detach())
    inside = (found > 0.1) & (found < 0.8)
    assert bool(inside.any()) and float(found[0]) == 0 and float(found[3]) > 0.8
    assert gradient[3] < 0  # more disagreement costs less
    assert float(Band("y", 0.0, 1.0)(move_of(teacher, -difference.detach()))) == pytest.approx(0, abs=1e-6)


def test_balance_asks_for_the_class_in_what_is_disagreed_or_agreed_about() -> None:
    teacher, student = normal(5, 4), normal(5, 4, seed=1)
    made = move_of(teacher, student)
    for sign in (-1, 1):
        wanted = functional.cross_entropy(teacher + sign * student, made.labels)
        torch.testing.assert_close(Balance("y", sign)(made), wanted)


def test_the_student_is_right_where_logits_differ_by_a_constant() -> None:
    teacher = normal(6, 10)
    least = -(20.0**2) * math.log(10)
    assert float(disagreement(teacher + 3, teacher, 20.0)) == pytest.approx(least)
    assert float(disagreement(normal(6, 10, seed=1), teacher, 20.0)) > least
    moved = normal(6, 10, seed=1)
    torch.testing.assert_close(disagreement(moved, teacher, 20.0), disagreement(moved + 7, teacher, 20.0))


# --- ZAQ


def test_channel_relations_know_nothing_of_ranges() -> None:
    feature = normal(3, 5, 4, 4)
    factors = torch.rand(5, generator=torch.Generator().manual_seed(1))[None, :, None, None] + 0.5
    torch.testing.assert_close(channel_relations(feature), channel_relations(feature * factors))
    assert float(relation_gap({"f": feature}, {"f": feature}, ["f"])) == 0
    assert float(relation_gap({"f": feature}, {"f": normal(3, 5, 4, 4, seed=1)}, ["f"])) > 0.1


def test_dead_channels_have_finite_gradients() -> None:
    """Behind straight-through rounding a channel is zero, but its gradient passes."""
    raw = (1e-9 * normal(2, 3, 4, 4)).requires_grad_(True)
    rounded = raw + (torch.zeros_like(raw) - raw).detach()
    relation_gap({"f": rounded}, {"f": normal(2, 3, 4, 4, seed=1)}, ["f"]).backward()
    assert raw.grad is not None and float(raw.grad.abs().max()) < 1e4


def test_the_generator_finds_where_networks_disagree(fashion: Network) -> None:
    """Thirty moves on the same codes raise the gap of a rounded network by a fifth at least."""
    weights = {name: value for name, value in fashion.model.graph.initializers.items() if len(value.shape or ()) == 4}
    rounded = {}
    for name in weights:
        tensor = fashion.graph.run({}, [name])[name]
        step = tensor.abs().max() / 3
        rounded[name] = (tensor / step).round() * step
    stages = stage_ends(fashion.model.graph)
    assert fashion.logits is not None
    wanted = [fashion.logits, *stages]
    player = Player(fashion.shape, 0, 0)  # type: ignore[arg-type]
    gaps = []
    for _ in range(30):
        images, _ = player.draw(16, 1)
        teacher = fashion.graph.run(fashion.given(images), wanted)
        student = fashion.graph.run({**fashion.given(images), **rounded}, wanted)
        gap = output_gap(student, teacher, wanted[:1]) + relation_gap(student, teacher, stages)
        gaps.append(float(gap.detach()))
        player.step(-gap)
    assert gaps[-1] > 1.2 * gaps[0]


STAGES = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,3,16,16] x) => (float[N,4,1,1] y)
{
    a = Conv <strides=[2,2], pads=[1,1,1,1]> (x, w1)
    b = Relu (a)
    c = Conv <pads=[1,1,1,1]> (b, w2)
    d = Add (c, b)
    e = MaxPool <kernel_shape=[2,2], strides=[2,2]> (d)
    f = Conv <pads=[1,1,1,1]> (e, w3)
    g = Relu (f)
    y = GlobalAveragePool (g)
}
"""


def test_stages_end_before_each_loss_of_resolution() -> None:
    model = add_weights(STAGES, {"w1": (4, 3, 3, 3), "w2": (4, 4, 3, 3), "w3": (4, 4, 3, 3)})
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)
    assert stage_ends(model.graph) == ["d", "g"]  # two losses of resolution, but no stage lies before the first
    assert residual_branches(model.graph) == ["c"]


# --- HAST


def test_hard_samples_keep_their_weight() -> None:
    logits = torch.tensor([[8.0, 0.0], [0.5, 0.0]], requires_grad=True)
    term = PredictClasses("y", torch.tensor([0, 0]), difficulty=2.0)
    (gradient,) = torch.autograd.grad(term(torch.zeros(2), {"y": logits}), logits)
    (plain,) = torch.autograd.grad(PredictClasses("y", torch.tensor([0, 0]))(torch.zeros(2), {"y": logits}), logits)
    ratio, usual = (float(item[1].norm() / item[0].norm()) for item in (gradient, plain))
    assert ratio > 100 * usual
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    PredictClasses("y", torch.tensor([0]), difficulty=0.5)(torch.zeros(1), {"y": sure}).backward()
    assert sure.grad is not None and bool(torch.isfinite(sure.grad).all())


def test_made_samples_are_harder_and_match_no_worse(monkeypatch: pytest.MonkeyPatch, fashion: Network) -> None:
    """With the difficulty in the loss, mean difficulty is at least twice that without; statistics stay within 2x.

    They stay near what is remembered, too: it is variances that outweigh the classes. Standard deviations end at 0.62.
    """
    from dataclasses import replace

    from onnxq.synthesis import methods

    hast = methods.METHODS["hast"]
    found = {}
    for difficulty in (0.0, 2.0):
        small = {"classes": 10.0, "difficulty": difficulty}
        monkeypatch.setitem(methods.METHODS, "hast", replace(hast, small=small))
        made = synthesise(models.load(FASHION), "hast", count=20, steps=150)
        images = torch.from_numpy(made.inputs)
        assert fashion.logits is not None
        logits = fashion.graph.run({fashion.input: images}, [fashion.logits])[fashion.logits]
        hardness = 1 - torch.softmax(logits, 1).max(1).values
        assert made.distance is not None
        found[difficulty] = (float(hardness.mean()), made.distance)
        assert torch.bincount(logits.argmax(1), minlength=10).min() >= 1  # two of each class were asked for
    assert found[2.0][0] > 2 * found[0.0][0]
    assert found[2.0][1] < min(0.5, 2 * found[0.0][1])


def test_channel_attention_has_norm_one_at_any_scale() -> None:
    feature = normal(3, 5, 4, 4)
    found = channel_attention(feature)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(channel_attention(3 * feature), found)
    assert float(attention_gap({"f": feature}, {"f": feature}, ["f"])) == 0


def test_a_perturbation_is_as_large_as_it_says_and_raises_the_loss() -> None:
    value = normal(64, 10).requires_grad_(True)
    weight = normal(10, 3, seed=1)

    def loss(tensor: Tensor) -> Tensor:
        return functional.cross_entropy(tensor @ weight, torch.zeros(64, dtype=torch.int64))

    moved = steepest({"x": value}, loss(value), 0.02)["x"]
    radius = 0.02 * float(value.detach().std())
    torch.testing.assert_close((moved - value.detach()).abs(), torch.full((64, 10), radius))
    assert float(loss(moved)) > float(loss(value))
    assert torch.equal(steepest({"x": value}, loss(value), 0.0)["x"], value.detach())


def test_crops_keep_size_and_range() -> None:
    images = torch.arange(64.0).reshape(1, 1, 8, 8).expand(20, 1, 8, 8)
    found = random_crops(images, 0.5, torch.Generator().manual_seed(0))
    assert found.shape == images.shape and float(found.min()) >= 0 and float(found.max()) <= 63
    falls = found[:, 0, :, -1] < found[:, 0, :, 0]
    assert 3 < int(falls.all(1).sum()) < 17  # about half are flipped
    whole = random_crops(images, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole.sort(3).values, images)


# --- TexQ


def test_texture_masks_answer_to_texture_alone() -> None:
    masks = laws_masks()
    assert masks.shape == (9, 3, 3)
    torch.testing.assert_close(masks[1:].sum((1, 2)), torch.zeros(8))
    images = normal(4, 3, 16, 16)
    share = texture_energy(images)
    torch.testing.assert_close(share.sum(1), torch.ones(4))
    torch.testing.assert_close(texture_energy(3 * images + 5), share, atol=1e-5, rtol=1e-4)


def test_the_texture_term_evens_out_the_elements() -> None:
    """Stripes are one element; downhill its share falls to what is allowed."""
    stripes = torch.sin(torch.arange(16.0))[None, None, None].expand(2, 3, 16, 16) + 0.01 * normal(2, 3, 16, 16)
    images, term = stripes.clone().requires_grad_(True), TextureEnergy()
    first = float(term(images, {}))
    optimizer = torch.optim.Adam([images], 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        term(images, {}).backward()
        optimizer.step()
    assert first > 0.05 and float(term(images, {})) < first / 10
    assert float(term(torch.zeros(2, 3), {})) == 0


def test_deep_layers_count_more() -> None:
    weights = layer_weights(8, 0.2, 1.1)
    assert weights == [0.2 / 8] * 3 + [1.1 / 8] * 5 and deep_from(8) == 3


def test_centers_are_those_of_single_images_by_class(fashion: Network) -> None:
    images, labels = normal(6, *fashion.shape), torch.tensor([0, 1, 1, 4, 4, 4])
    taps = fashion.graph.run(fashion.given(images), [layer.value for layer in fashion.layers])
    centers = Centers(fashion.layers, 10)
    for rows in (slice(0, 2), slice(2, 6)):  # in batches as well as at once
        centers.add({name: value[rows] for name, value in taps.items()}, labels[rows])
    for index, layer in enumerate(fashion.layers):
        for kind, found in zip(centers.of(index), moments(taps[layer.value], per_sample=True), strict=True):
            torch.testing.assert_close(kind[4], found[3:].mean(0))
            assert float(kind[7].abs().max()) == 0
    # Total variance: statistics of a batch follow from those of its samples.
    mean, deviation = moments(taps[fashion.layers[0].value], per_sample=True)
    whole = moments(taps[fashion.layers[0].value], per_sample=False)
    pooled = (deviation.square() + mean.square()).mean(0) - mean.mean(0).square()
    torch.testing.assert_close(pooled.sqrt(), whole[1], atol=1e-5, rtol=1e-5)


def test_centers_together_say_what_a_whole_batch_has(fashion: Network) -> None:
    """One image of each class, as TexQ has them: statistics pooled over centers are those of all images at once."""
    images = normal(10, *fashion.shape)
    taps = fashion.graph.run(fashion.given(images), [layer.value for layer in fashion.layers])
    centers = Centers(fashion.layers, 10)
    centers.add(taps, torch.randperm(10, generator=torch.Generator().manual_seed(0)))
    for index, layer in enumerate(fashion.layers):
        mean, deviation = centers.of(index)
        wanted_mean, wanted_deviation = moments(taps[layer.value], per_sample=False)
        torch.testing.assert_close(mean.mean(0), wanted_mean, atol=1e-5, rtol=1e-5)
        variance = deviation.square().mean(0) + mean.var(0, correction=0)  # the law of total variance
        torch.testing.assert_close(variance.sqrt(), wanted_deviation, atol=1e-5, rtol=1e-5)


def test_deep_layers_end_nearer_where_they_count_more(monkeypatch: pytest.MonkeyPatch, fashion: Network) -> None:
    """After as many steps, against layers that all weigh the same, and without the terms of classes and texture.

    Beside them, classes weighing 5, little is left of it: deep layers are 0.27 times as far as shallow ones, not 0.30.
    """
    from dataclasses import replace

    from onnxq.synthesis import methods

    texq, far = methods.METHODS["texq"], dict[str, tuple[float, float]]()
    for name, layers in (("by depth", texq.layers), ("alike", (1.0, 1.0))):
        monkeypatch.setitem(methods.METHODS, "texq", replace(texq, layers=layers, classes=0.0, texture=0.0))
        made = torch.from_numpy(synthesise(models.load(FASHION), "texq", count=10, steps=60).inputs)
        taps = fashion.graph.run({fashion.input: made}, [layer.value for layer in fashion.layers])
        losses = [float(MatchStatistics([layer], False, True)(made, taps)) for layer in fashion.layers]
        first = deep_from(len(losses))
        far[name] = sum(losses[:first]), sum(losses[first:])
    assert far["by depth"][1] < far["alike"][1] and far["by depth"][0] > far["alike"][0]


def test_samples_are_drawn_to_the_center_of_their_class(fashion: Network) -> None:
    made = synthesise(models.load(FASHION), "texq", count=10, steps=150)
    images = torch.from_numpy(made.inputs)
    assert fashion.logits is not None
    wanted = [fashion.logits, *[layer.value for layer in fashion.layers]]
    taps = fashion.graph.run({fashion.input: images}, wanted)
    found = taps[fashion.logits].argmax(1)
    assert sorted(found.tolist()) == list(range(10))  # each is of its class, all of which have come in turn
    centers = Centers(fashion.layers, 10)
    centers.add(taps, found)
    first = deep_from(len(fashion.layers))
    term = MatchCenters(centers, first)
    player = Player(fashion.shape, 10, 0, rate=3e-3)  # type: ignore[arg-type]
    for number in range(60):
        inner, labels = player.draw(20, number)
        values = fashion.graph.run(fashion.given(inner), wanted)
        player.step(term(Move(inner, labels, values, {})))
    with torch.no_grad():
        inner, labels = player.draw(50, 999)
        values = fashion.graph.run(fashion.given(inner), wanted)
    far = torch.zeros(50, 10)
    for index, layer in enumerate(fashion.layers[first:], first):
        for kind, value in zip(centers.of(index), moments(values[layer.value], per_sample=True), strict=True):
            far += ((value[:, None] - kind[None]) / layer.unit).square().mean(-1)
    assert float((far.argmin(1) == labels).float().mean()) >= 0.8


def test_mixtures_are_of_inputs_and_the_teacher_says_what_they_are() -> None:
    value, partner = normal(4, 3), torch.tensor([1, 0, 3, 2])
    assert torch.equal(mixture(value, partner, 1.0), torch.cat([value, value]))
    torch.testing.assert_close(mixture(value, partner, 0.25)[4], 0.25 * value[0] + 0.75 * value[1])
    batch = mixed(lambda step: Batch({"x": value}, {"y": value}), 0)(0)
    assert len(batch.inputs["x"]) == 8 and not batch.teacher


# --- recipes


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few moves before the first step, and checkpoints often."""
    from onnxq.learning import zero_shot

    monkeypatch.setattr(zero_shot, "WARM_UP", {"quick": 3})
    monkeypatch.setattr(zero_shot, "SAVE_EVERY", 3)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("short")
def test_recipes_run_from_a_float_file(recipe: str, tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    made = {"hast": {"hard_images": 10}, "texq": {"class_images": 10}}.get(recipe, {})
    knobs = {"steps": 6, "batch": 8, "images": 10, **made}
    numbers = onnxq.quantize(FASHION, output=output, recipe=recipe, budget="quick", knobs=knobs, target="cpu").numbers
    assert output.is_file() and numbers["sqnr_db"] > 20
    first, least = numbers["held_out_loss"]
    assert least <= first and (least < first) == (numbers["best_step"] > 0)
    assert bool(numbers["warnings"]) == (numbers["best_step"] == 0)  # six steps may well not help


def test_hard_images_teach_a_student_what_real_ones_are(tmp_path: Path) -> None:
    """Two bits of weights, three of activations: images that nothing here has seen are told apart better."""
    with np.load(MODELS / "fashion_test.npz") as file:
        images, labels = file["x"][:1000], file["labels"][:1000]

    def correct(**knobs: float) -> float:
        onnxq.quantize(
            FASHION, output=tmp_path / "student.onnx", recipe="hast", budget="quick",
            knobs={"images": 16, "hard_images": 16, **knobs}, weights="int2", activations="int3",
        )  # fmt: skip
        found = Session(tmp_path / "student.onnx", optimize=False).run({"x": images})[0]
        return float((found.argmax(1) == labels).mean())

    assert correct(steps=40) > correct(steps=1, weight_rate=1e-12, step_rate=0.0) + 0.03


def test_the_best_state_is_kept() -> None:
    class Learner:
        value = 0.0

        def learned(self) -> dict[str, Tensor]:
            return {"w": torch.tensor([self.value])}

    learner = Learner()
    losses = iter([3.0, 1.0, 2.0])
    best = KeepBest(learner, lambda: next(losses), 5)  # type: ignore[arg-type]
    for step in range(1, 11):
        learner.value = float(step)
        best(step)
    assert (best.first, best.least, best.step) == (3.0, 1.0, 5) and best.learned()["w"].tolist() == [5.0]
    losses = iter([9.0])
    other = KeepBest(learner, lambda: next(losses), 5)  # type: ignore[arg-type]
    other.restore(best.state())
    assert (other.first, other.least, other.step) == (3.0, 1.0, 5) and other.learned()["w"].tolist() == [5.0]


@pytest.mark.parametrize("recipe", ["adadfq", "zaq"])
@pytest.mark.usefixtures("short")
def test_an_interrupted_game_ends_with_the_same_bytes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"steps": 8, "batch": 8, "images": 10}
    settings = {"recipe": recipe, "budget": "quick", "knobs": knobs, "weights": "int4"}
    onnxq.quantize(FASHION, output=tmp_path / "whole.onnx", **settings)  # type: ignore[arg-type]
    original = Game.__call__

    def stops(self: Game, step: int) -> Batch:
        if step == 5:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Game, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        onnxq.quantize(FASHION, output=tmp_path / "resumed.onnx", **settings)  # type: ignore[arg-type]
    steps: list[int] = []

    def counts(self: Game, step: int) -> Batch:
        steps.append(step)
        return original(self, step)

    monkeypatch.setattr(Game, "__call__", counts)
    onnxq.quantize(FASHION, output=tmp_path / "resumed.onnx", **settings)  # type: ignore[arg-type]
    assert steps == [3, 4, 5, 6, 7]
    assert (tmp_path / "whole.onnx").read_bytes() == (tmp_path / "resumed.onnx").read_bytes()


@pytest.mark.parametrize("recipe", ["gdfq", "adadfq", "texq", "hast"])
def test_what_a_recipe_lacks_is_said(recipe: str, tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    network (float[N,3,16,16] x) => (float[N,4,16,16] y)
    {
        y = Conv <pads=[1,1,1,1]> (x, w1)
    }
    """
    ir.save(add_weights(text, {"w1": (4, 3, 3, 3)}), tmp_path / "float.onnx")
    data = {"x": np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)}
    with pytest.raises(OnnxqError, match=r"expected (BatchNormalization|a classifier)"):
        onnxq.quantize(tmp_path / "float.onnx", [data], recipe=recipe)
