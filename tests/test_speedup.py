"""Codes only where the clock needs them: times by layer, the choice among timed allocations, and what is said."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS, add_weights
from test_cli_errors import assert_two_lines, run

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.errors import OnnxqError
from onnxq.layer_times import layer_times_ms, owners_of
from onnxq.learning import speedup
from onnxq.learning.mixed_precision import Choice, Point
from onnxq.learning.speedup import FLOAT, Race, Timed, fastest_within
from onnxq.recipes import mixed
from onnxq.runtime import Session

FASHION = (MODELS / "fashion_resnet.onnx", "--data", MODELS / "fashion_calibration.npz", "-n", 16)
QUICK = ("--set", "sensitivity_samples=4", "-q")

NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N,8,32,32] x) => (float[N,8,32,32] y) {
  [before] b = Sigmoid (x)
  [small] s = Conv (b, v)  [act] r = Relu (s)
  [large] l = Conv <pads=[3,3,3,3]> (r, w)  [sum] a = Add (l, r)
  [after] y = Tanh (a)
}
"""


def network() -> ir.Model:
    return add_weights(NETWORK, {"v": (8, 8, 1, 1), "w": (8, 8, 7, 7)})


def test_what_stands_behind_a_layer_belongs_to_it() -> None:
    owners = owners_of(network().graph)
    assert {name: owners[name] for name in ("before", "act", "r", "sum", "a", "y")} == {
        "before": "", "act": "small", "r": "small", "sum": "large", "a": "large", "y": "large",
    }  # fmt: skip


def test_layers_take_what_their_kernels_take() -> None:
    model = network()
    feed = {"x": np.random.default_rng(0).standard_normal((1, 8, 32, 32)).astype(np.float32)}
    times = layer_times_ms(model, feed, owners_of(model.graph), seconds=0.2)
    assert times.keys() == {"", "small", "large"}
    assert times["large"] > 2 * times["small"] > 0  # 49 times the products
    assert Session(model).run(feed)[0].shape == (1, 8, 32, 32)  # a session without a profile leaves no file


class Imagined(Race):
    """A race in which a layer on codes next to a float one costs a conversion, and the clock is exact."""

    def __init__(self, milliseconds: list[dict[str, float]]) -> None:
        self.milliseconds, self.tried = milliseconds, {}

    def run(self, point: Point) -> Timed:
        self.tried[point.labels] = self.time(None, point)  # type: ignore[arg-type]
        return self.tried[point.labels]

    def time(self, model: ir.Model, point: Point) -> Timed:
        layers = sum(costs[label] for costs, label in zip(self.milliseconds, point.labels, strict=True))
        conversions = 0.2 * sum(a != b for a, b in itertools.pairwise(point.labels))
        return Timed(point, sum(costs[FLOAT] for costs in self.milliseconds), layers + conversions)

    def built(self, labels: object) -> ir.Model:
        return None  # type: ignore[return-value]


def imagined() -> tuple[Imagined, list[list[Choice]]]:
    generator = np.random.default_rng(0)
    times = [{FLOAT: 1 + float(generator.random()), "int8": 0.3 + float(generator.random()) / 2} for _ in range(8)]
    losses = generator.exponential(size=8).tolist()
    choices = [
        [Choice(FLOAT, 0.0, {"ms": item[FLOAT]}), Choice("int8", loss, {"ms": item["int8"]})]
        for item, loss in zip(times, losses, strict=True)
    ]
    return Imagined(times), choices


@pytest.mark.parametrize("wanted", [1.3, 1.6, 2.0])
def test_the_whole_is_fast_enough_and_loses_less_than_all_on_codes(wanted: float) -> None:
    race, choices = imagined()
    found = fastest_within(race, choices, wanted, lambda count: None)
    assert found.speedup >= wanted
    assert found.point.loss < sum(group[1].loss for group in choices)
    assert FLOAT in found.point.labels
    predicted_alone = sum(costs[label] for costs, label in zip(race.milliseconds, found.point.labels, strict=True))
    assert found.quantized_ms > predicted_alone  # what the sums leave out was timed


def test_the_best_that_can_be_reached_is_named() -> None:
    race, choices = imagined()
    best = max(
        race.time(None, Point(0, 0, labels)).speedup  # type: ignore[arg-type]
        for labels in itertools.product([FLOAT, "int8"], repeat=8)
    )
    with pytest.raises(OnnxqError, match=rf"at most {best:.2f} here, with 8 of 8 layers on codes") as caught:
        fastest_within(race, choices, 9, lambda count: None)
    assert f"--budget-speedup {0.95 * best:.2f}" in caught.value.hint


def test_a_real_network_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedup, "SECONDS", 0.05)
    output, numbers = tmp_path / "q.onnx", tmp_path / "q.json"
    command = ("quantize", *FASHION, "--target", "cpu", *QUICK, "-o", output, "--json", numbers)
    assert_two_lines(*run(capsys, *command, "--budget-speedup", 1000), "found at most", "--budget-speedup")
    assert not output.exists()
    assert run(capsys, *command, "--budget-speedup", 1.05)[0] == 0
    found = json.loads(numbers.read_text())
    chosen = set(found["layer_formats"].values())
    assert chosen <= {FLOAT, "int8/uint8"} and "int8/uint8" in chosen
    assert found["speedup"] == pytest.approx(found["speedup_ms"]["float"] / found["speedup_ms"]["quantized"])
    written = ir.load(output)
    on_codes = {
        item.node.name for item in layer_nodes.weighted_nodes(written.graph) if graphs.is_dequantized(item.weight)
    }
    assert on_codes == {name for name, label in found["layer_formats"].items() if label != FLOAT}
    assert all(min(times.values()) > 0 for times in found["layer_ms"].values())  # every kernel found its layer


def test_a_layer_that_its_neighbours_leave_in_float_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a depthwise layer alone between float ones is placed in float, whatever was chosen for it."""
    monkeypatch.setattr(speedup, "SECONDS", 0.05)

    def neighbours_float(race: Race, *_: object) -> Timed:
        around = {"node_conv2d_12", "node_conv2d_14"}
        labels = tuple(FLOAT if around & set(group.nodes) else "int8/uint8" for group in race.groups)
        assert labels.count(FLOAT) == 2
        return race.run(Point(0.0, 0.0, labels))

    monkeypatch.setattr(mixed, "fastest_within", neighbours_float)
    output, numbers = tmp_path / "q.onnx", tmp_path / "q.json"
    command = ("quantize", *FASHION, "--target", "cpu", *QUICK, "-o", output, "--json", numbers)
    assert run(capsys, *command, "--budget-speedup", 1.05)[0] == 0
    formats = json.loads(numbers.read_text())["layer_formats"]
    assert formats["node_conv2d_13"] == FLOAT and formats["node_conv2d_8"] == "int8/uint8"
    on_codes = {
        item.node.name
        for item in layer_nodes.weighted_nodes(ir.load(output).graph)
        if graphs.is_dequantized(item.weight)
    }
    assert on_codes == {name for name, label in formats.items() if label != FLOAT}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget-speedup", 2), "found --target tensorrt"),
        (("--budget-speedup", 2, "--target", "cpu", "--activations", "float"), "float activations"),
        (("--budget-speedup", 1, "--target", "cpu"), "above 1"),
        (("--budget-speedup", 2, "--max-drop", 1, "--target", "cpu"), "another goal"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    options: tuple[object, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_two_lines(*run(capsys, "quantize", *FASHION, *QUICK, *options, "-o", tmp_path / "q.onnx"), message)
