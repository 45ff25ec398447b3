"""Power grids: their algebra, what the searches find, how they are stored, and widths for a target size."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DATA, add_weights

import onnxq
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration.weight_ranges import least_error
from onnxq.errors import OnnxqError
from onnxq.formats import parse_format
from onnxq.weights.tables import fit, least_exponent, power_table, row_errors, widest_scale
from onnxq.weights.thresholds import under, widths

CLIPS = tuple(np.linspace(1.0, 0.4, 13))
CURVES = tuple(np.arange(1.0, 2.51, 0.125))


def drawn(kind: str, rows: int = 8, elements: int = 4096) -> np.ndarray:
    generator = np.random.default_rng(0)
    shape = (rows, elements)
    draws = {
        "gaussian": lambda: generator.standard_normal(shape),
        "laplace": lambda: generator.laplace(size=shape),
        "uniform": lambda: generator.uniform(-1, 1, shape),
        "t5": lambda: generator.standard_t(5, shape),
    }
    return draws[kind]().astype(np.float32)


def squared(rows: np.ndarray, bits: int, exponent: float, *, nearest: bool) -> float:
    table = power_table(bits, 1 / exponent, nearest=nearest)
    return float(row_errors(rows, table, widest_scale(rows, bits), 2).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_exponent_one_is_the_uniform_grid_to_the_bit(bits: int) -> None:
    rows = drawn("gaussian", elements=512)
    number_format, _ = parse_format(f"int{bits}")
    scale, zero_point = scale_and_zero_point(-np.abs(rows).max(1), np.abs(rows).max(1), number_format, symmetric=True)
    uniform = fake_quantize(rows, scale, zero_point, number_format, axis=0)
    np.testing.assert_array_equal(power_table(bits, 1.0).rounded(rows, scale), uniform)


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("curve", [1.0, 1.5, 1.8, 2.5])
def test_levels_are_fixed_points_and_rounding_is_what_it_says(curve: float, nearest: bool) -> None:
    table = power_table(4, curve, nearest=nearest)
    scale = np.full(1, 0.3, np.float32)
    codes = np.arange(16, dtype=np.uint8)[None]
    np.testing.assert_array_equal(table.codes(table.values(codes, scale), scale), codes)
    rows = drawn("t5", 1, 1000)
    found = np.abs(table.rounded(rows, scale) - rows)
    best = np.abs(rows[..., None] - table.levels * scale).min(axis=-1)
    if nearest:
        np.testing.assert_allclose(found, best, atol=1e-6)
    else:
        power = np.sign(rows) * (np.abs(rows) / (7 * scale)) ** (1 / curve)
        np.testing.assert_array_equal(table.codes(rows, scale), np.clip(np.rint(7 * power), -8, 7) + 8)
        assert curve == 1.0 or found.sum() > best.sum()


@pytest.mark.parametrize(("kind", "expected"), [("gaussian", 0.70), ("laplace", 0.57), ("t5", 0.52), ("uniform", 1.0)])
def test_the_exponent_follows_the_tail(kind: str, expected: float) -> None:
    rows = drawn(kind)
    found = least_exponent([rows], 4)
    assert abs(found - expected) < 0.05
    grid = [squared(rows, 4, exponent, nearest=False) for exponent in np.linspace(0.3, 1.1, 101)]
    assert abs(found - np.linspace(0.3, 1.1, 101)[int(np.argmin(grid))]) <= 0.03
    if kind != "uniform":
        assert squared(rows, 4, found, nearest=False) < 0.8 * squared(rows, 4, 1.0, nearest=False)
    assert squared(rows, 4, found, nearest=True) <= squared(rows, 4, found, nearest=False)


def test_sums_of_powers_are_no_product_of_sums() -> None:
    """Why no integer kernel may multiply these codes: single products fit, their sum does not."""
    generator = np.random.default_rng(0)
    x, w = np.abs(generator.standard_normal((2, 500, 256)))
    power = (x**0.55 * w**0.55).sum(axis=1) ** (1 / 0.55)
    ratio = power / (x * w).sum(axis=1)
    assert np.median(ratio) > 5 and np.std(ratio / ratio.mean()) > 0.02
    np.testing.assert_allclose((x**0.55 * w**0.55) ** (1 / 0.55), x * w)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "t5"])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_curve_and_a_clip_beat_either_alone(kind: str, bits: int) -> None:
    rows = drawn(kind, elements=2048)
    both = fit(rows, bits, CURVES, CLIPS, 2).error
    assert both <= fit(rows, bits, (1.0,), CLIPS, 2).error
    assert both <= fit(rows, bits, CURVES, (1.0,), 2).error
    number_format, _ = parse_format(f"int{bits}")
    low, high = least_error(rows, number_format, True, 2.0)
    scale, zero_point = scale_and_zero_point(low, high, number_format, symmetric=True)
    clipped = np.square(fake_quantize(rows, scale, zero_point, number_format, axis=0) - rows).sum()
    assert both < clipped * (0.99 if kind == "gaussian" else 0.92)
    assert fit(rows, bits, CURVES, CLIPS, 4).error <= fit(rows, bits, (1.0,), (1.0,), 4).error


def test_the_threshold_is_the_least_that_any_assignment_reaches() -> None:
    generator = np.random.default_rng(5)
    names, options = ["a", "b", "c", "d"], [2, 3, 4, 8]
    sizes = {name: int(generator.integers(100, 1000)) for name in names}
    losses = {name: dict(zip(options, np.sort(generator.random(4))[::-1], strict=True)) for name in names}
    bits = {name: {width: sizes[name] * width for width in options} for name in names}
    total = sum(sizes.values())
    previous = np.inf
    for compression in (4.5, 6, 8, 10, 14):
        budget = int(32 * total / compression)
        chosen = widths(losses, bits, budget)
        used = sum(bits[name][width] for name, width in chosen.items())
        worst = max(losses[name][width] for name, width in chosen.items())
        assert used <= budget
        fitting = [
            max(losses[name][width] for name, width in zip(names, tried, strict=True))
            for tried in itertools.product(options, repeat=4)
            if sum(bits[name][width] for name, width in zip(names, tried, strict=True)) <= budget
        ]
        assert worst == min(fitting)
        assert used <= previous  # more compression never takes more
        previous = used
    assert under(losses, -1.0) is None
    with pytest.raises(OnnxqError, match="compression"):
        widths(losses, bits, total)


def test_stored_tables_mean_the_levels(network: Path, calibration: Path, tmp_path: Path) -> None:
    """The file holds codes and levels; what it computes is what the levels say, and int8 storage is close to it."""
    numbers = {}
    for storage in ("table", "int8"):
        output = tmp_path / f"{storage}.onnx"
        result = onnxq.quantize(
            network, calibration, output=output, recipe="powerquant", weights="int4",
            knobs={"storage": storage, "bias_correction": False},
            target="cpu",  # which reads tables of 4-bit codes; TensorRT's take a byte
        )  # fmt: skip
        numbers[storage] = result.numbers
        assert result.numbers["quantized_nodes"] == 3
        found = onnxq.compare(network, output, calibration, latency=False, layers=False)
        assert found.sqnr_db is not None and found.sqnr_db == pytest.approx(result.numbers["sqnr_db"], abs=0.5)
    assert numbers["table"]["sqnr_db"] == pytest.approx(numbers["int8"]["sqnr_db"], abs=0.5)
    assert numbers["table"]["quantized_bytes"] < numbers["int8"]["quantized_bytes"] < numbers["table"]["float_bytes"]


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_quantized_activations_get_integer_kernels_or_the_power_domain(
    network: Path, calibration: Path, target: str
) -> None:
    usual = "uint8" if target == "cpu" else "int8"
    plain = onnxq.quantize(network, calibration, recipe="powerquant", weights="int4", activations=usual, target=target)
    power = onnxq.quantize(
        network, calibration, recipe="powerquant", weights="int4", activations="int4", target=target,
        knobs={"power_activations": True, "storage": "table"},
    )  # fmt: skip
    if target == "cpu":
        assert plain.numbers["integer_kernels"] >= 3 and power.numbers["optimized_nodes"]["Pow"] > 0
    assert power.numbers["sqnr_db"] > 5


@pytest.mark.parametrize("recipe", ["powerquant", "pnmq"])
@pytest.mark.parametrize("storage", ["table", "int8"])
def test_biases_take_back_the_mean_shift_of_the_levels(
    network: Path, calibration: Path, recipe: str, storage: str
) -> None:
    alone, corrected = (
        onnxq.quantize(
            network, calibration, recipe=recipe, weights="int3", activations="float",
            knobs={"bias_correction": corrects, "storage": storage},
        ).numbers["sqnr_db"]
        for corrects in (False, True)
    )  # fmt: skip
    assert corrected > alone + 1


def test_compression_is_reached_and_mixed(network: Path, tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="compression"):
        onnxq.quantize(network, recipe="pnmq", knobs={"compression": 40.0})
    with pytest.raises(OnnxqError, match="per channel or tensor"):
        onnxq.quantize(network, recipe="pnmq", weights="int4:16")
    knobs = {"candidates": [2, 4, 8]}
    mild, strong = (
        onnxq.quantize(network, recipe="pnmq", knobs={**knobs, "compression": wanted}).numbers["sqnr_db"]
        for wanted in (4.5, 9.0)
    )
    assert mild > strong + 3


def test_an_exponent_beats_the_extremes_on_a_real_network(shared_data: Path) -> None:
    model = DATA / "models" / "resnet20_cifar10.onnx"
    options = {"weights": "int4", "activations": "float", "synthesis": "noise"}
    uniform = onnxq.quantize(model, knobs={"bias_correction": False}, **options)
    power = onnxq.quantize(model, recipe="powerquant", knobs={"bias_correction": False}, **options)
    assert power.numbers["sqnr_db"] > uniform.numbers["sqnr_db"] + 0.5


@pytest.mark.parametrize("taken", ["w_codes", "w_levels", "w_steps", "w_indexd", "w_scaled"])
def test_names_of_the_model_are_left_to_it(taken: str, tmp_path: Path) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[2,64] x) => (float[2,64] y) {{
      [square] {taken} = Mul (x, x)  [product] p = MatMul ({taken}, w)  [sum] y = Add (p, {taken})
    }}
    """
    ir.save(add_weights(text, {"w": (64, 64)}), tmp_path / "model.onnx")
    feed = {"x": np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)}
    for target in ("cpu", "tensorrt"):
        result = onnxq.quantize(tmp_path / "model.onnx", [feed], recipe="powerquant", target=target)
        assert result.numbers["quantized_nodes"] == 1 and result.numbers["sqnr_db"] > 15
