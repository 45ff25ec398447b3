"""Mixed precision: the front and the integer program against brute force, sensitivities, and what the file holds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DATA, MODELS

import onnxq
from onnxq import OnnxqError
from onnxq.cli import app
from onnxq.learning import mixed_precision
from onnxq.learning.mixed_precision import Choice, allocate, pareto_front
from onnxq.learning.outputs import Compared, difference

FASHION = (MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz")
QUICK = {"sensitivity_samples": 8, "weight_bits": "2,4,8"}


def random_layers(count: int, seed: int = 0, widths: tuple[int, ...] = (2, 4, 8)) -> list[list[Choice]]:
    """Layers of random sizes whose losses fall with the width, as those of real ones do."""
    generator = np.random.default_rng(seed)
    layers = []
    for _ in range(count):
        size, first = float(generator.integers(10, 1000)), generator.exponential()
        losses = first * np.sort(generator.random(len(widths)))[::-1]
        layers.append(
            [
                Choice(
                    f"int{bits}", float(loss), {"bits": size * bits, "bops": size * bits * float(generator.random())}
                )
                for bits, loss in zip(widths, losses, strict=True)
            ]
        )
    return layers


def brute_force(layers: list[list[Choice]], budgets: dict[str, float]) -> float:
    return min(
        sum(choice.loss for choice in chosen)
        for chosen in itertools.product(*layers)
        if all(sum(choice.costs[name] for choice in chosen) <= most for name, most in budgets.items())
    )


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_front_and_the_program_are_as_good_as_brute_force(count: int) -> None:
    layers = random_layers(count, seed=count)
    front = pareto_front(layers, "bits")
    for share in (0.4, 0.55, 0.8, 1.0):
        most = share * sum(layer[-1].costs["bits"] for layer in layers)
        best = brute_force(layers, {"bits": most})
        chosen = allocate(layers, {"bits": most})
        assert chosen.loss == pytest.approx(best) and chosen.cost <= most * (1 + 1e-9)
        assert min(point.loss for point in front if point.cost <= most) == pytest.approx(best)


def test_the_front_falls_from_all_narrow_to_all_wide() -> None:
    layers = random_layers(6)
    front = pareto_front(layers, "bits")
    assert front[0].labels == ("int2",) * 6 and front[-1].labels == ("int8",) * 6
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(front))


def test_a_thinned_front_stays_close_to_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = random_layers(40, widths=(2, 3, 4, 5, 6, 8))
    monkeypatch.setattr(mixed_precision, "MOST_STATES", 2000)
    most = 0.5 * sum(layer[-1].costs["bits"] for layer in layers)
    point = [point for point in pareto_front(layers, "bits") if point.cost <= most][-1]
    assert point.loss <= 1.01 * allocate(layers, {"bits": most}).loss
    labels = dict(enumerate(point.labels))
    chosen = [next(choice for choice in layer if choice.label == labels[index]) for index, layer in enumerate(layers)]
    assert sum(choice.loss for choice in chosen) == pytest.approx(point.loss)  # labels belong to their point
    assert sum(choice.costs["bits"] for choice in chosen) == pytest.approx(point.cost)


def test_several_budgets_hold_at_once() -> None:
    layers = random_layers(5)
    wide = {name: sum(layer[-1].costs[name] for layer in layers) for name in ("bits", "bops")}
    budgets = {"bits": 0.6 * wide["bits"], "bops": 0.5 * wide["bops"]}
    assert allocate(layers, budgets).loss == pytest.approx(brute_force(layers, budgets))


def test_a_budget_below_the_least_is_named() -> None:
    with pytest.raises(OnnxqError, match=r"expected a bits budget of at least .*, found 1"):
        allocate(random_layers(3), {"bits": 1.0})


def test_divergence_is_the_same_from_logits_and_from_probabilities() -> None:
    generator = np.random.default_rng(0)
    expected, found = generator.standard_normal((2, 5, 7))

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits)
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))

    of_logits = difference(Compared("y", "y", "kl"), expected, found)
    of_probabilities = difference(Compared("p", "y", "kl", "Softmax"), softmax(expected), softmax(found))
    assert of_logits == pytest.approx(of_probabilities) and of_logits > 0
    assert difference(Compared("y", "y", "kl"), expected, expected + 3) == pytest.approx(0, abs=1e-12)
    assert difference(Compared("y", "y", "mse"), expected, 1.1 * expected) == pytest.approx(0.01)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_the_same_mean_width_loses_less_than_one_width_for_all(loss: str) -> None:
    knobs = {"sensitivity_samples": 32, "budget_bits": 4.0, "loss": loss}
    found = {
        widths: onnxq.quantize(*FASHION, samples=32, recipe="mixed", knobs=knobs | {"weight_bits": widths}).numbers
        for widths in ("4", "3,4,5,6")
    }
    mixed, one_width = found["3,4,5,6"], found["4"]
    assert mixed["mean_weight_bits"] <= 4.0 + 1e-9 and len(set(mixed["layer_formats"].values())) > 1
    assert mixed["measured_loss"] < one_width["measured_loss"]


def test_weights_only_are_stored_narrow_within_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    knobs = QUICK | {"weight_bits": "4,8", "budget_mib": 0.14}
    numbers = onnxq.quantize(
        *FASHION, recipe="mixed", activations="float", samples=16, knobs=knobs, output=path
    ).numbers
    stored = [value for value in ir.load(path).graph.initializers.values() if value.name.endswith("_quantized")]
    assert {value.dtype for value in stored} == {ir.DataType.INT4, ir.DataType.INT8}
    bytes_of_weights = sum(value.const_value.nbytes for value in ir.load(path).graph.initializers.values())
    assert bytes_of_weights / 2**20 <= 0.14 * 1.02
    assert numbers["weights_mib"] <= 0.14


def test_widths_of_activations_are_chosen_too() -> None:
    knobs = QUICK | {"activation_bits": "4,8", "budget_bops": 0.2}
    numbers = onnxq.quantize(*FASHION, recipe="mixed", samples=16, knobs=knobs).numbers
    assert numbers["giga_bit_operations"] <= 0.2
    assert {label.partition("/")[2] for label in numbers["layer_formats"].values()} == {"int4", "int8"}


@pytest.mark.parametrize(
    ("knobs", "options", "message"),
    [
        ({"weight_bits": "4;8"}, {}, "expected widths of 2 to 8 bits with commas between them, found '4;8'"),
        ({"weight_bits": "9"}, {}, "expected widths of 2 to 8 bits"),
        ({"rounding": "up"}, {}, "expected rounding of nearest, adaround, brecq, qdrop, found 'up'"),
        ({"budget_bits": -1.0}, {}, "expected a positive budget_bits, found -1.0"),
        ({"budget_mib": 0.001}, {}, "expected budget_mib above .* MiB, which stays float, found 0.001"),
        ({"solver": "pareto", "budget_bits": 4.0, "budget_mib": 1.0}, {}, "expected one budget for solver=pareto"),
        ({"activation_bits": "4,8"}, {"activations": "float"}, "expected quantized activations for activation_bits"),
        ({}, {"weights": "fp8"}, "expected weights of an integer format for mixed widths, found fp8"),
    ],
)
def test_bad_knobs_are_named(knobs: dict[str, object], options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match=message):
        onnxq.quantize(*FASHION, recipe="mixed", knobs=QUICK | knobs, samples=8, output=tmp_path / "q.onnx", **options)
    assert not (tmp_path / "q.onnx").exists()


def test_sensitivity_falls_with_the_width_on_a_real_network() -> None:
    path = DATA / "models" / "resnet20_cifar10.onnx"
    if not path.is_file():
        pytest.skip("the real models are not here (../shared/data)")
    value = next(value for value in ir.load(path).graph.inputs if not value.is_initializer())
    x = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    losses = {}
    for bits in ("2", "4", "8"):
        knobs = {"weight_bits": bits, "sensitivity_samples": 16, "budget_bits": 8.0}
        losses[bits] = onnxq.quantize(path, [{value.name: x}], recipe="mixed", knobs=knobs).numbers["predicted_loss"]
    assert losses["2"] > 10 * losses["4"] > 100 * losses["8"]


def test_the_narrowest_widths_that_lose_no_more_than_allowed() -> None:
    found = {}
    for drop in (0.5, 8.0):
        knobs = QUICK | {"max_drop": drop, "judging_samples": 128}
        found[drop] = onnxq.quantize(*FASHION, recipe="mixed", knobs=knobs).numbers
        assert found[drop]["points_lost"] <= drop
    assert found[8.0]["mean_weight_bits"] < found[0.5]["mean_weight_bits"] < 8
    with pytest.raises(OnnxqError, match="lost by the widest"):
        onnxq.quantize(*FASHION, recipe="mixed", knobs=QUICK | {"max_drop": 0.5, "weight_bits": "2"})


def test_options_of_the_command_line_are_the_goals_of_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    command = ["quantize", str(FASHION[0]), "--data", str(FASHION[1]), "--set", "sensitivity_samples=8", "-q"]
    for mib in (0.09, 0.15):
        output, numbers = tmp_path / f"{mib}.onnx", tmp_path / f"{mib}.json"
        app([*command, "--activations", "float", "--budget-mib", str(mib), "-o", str(output), "--json", str(numbers)],
            standalone_mode=False)  # fmt: skip
        found = json.loads(numbers.read_text())
        assert found["recipe"] == "mixed" and found["weights_mib"] <= mib
        sizes[mib] = output.stat().st_size
    assert sizes[0.09] < sizes[0.15]
    with pytest.raises(OnnxqError, match="knob of recipe 'gptq'"):
        app([*command, "--recipe", "gptq", "--max-drop", "1", "-o", str(tmp_path / "x.onnx")], standalone_mode=False)
