"""The searches of AWQ against brute force, and the recipe from end to end."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

from onnxq.calibration.channels import ChannelStatistics
from onnxq.calibration.data import Iterables
from onnxq.config import make_settings
from onnxq.job import Job
from onnxq.learning.channel_scales import as_rows, from_rows, least_output_error, round_matrix, salience
from onnxq.learning.clipping import clipped_for_outputs
from onnxq.passes.smooth_activations import groups
from onnxq.progress import Progress
from onnxq.recipes.awq import Awq
from onnxq.recipes.static import Static
from onnxq.runtime import Session
from onnxq.scheme import parse_weights
from onnxq.targets import get as get_target

NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,6,64] x) => (float[N,6,64] y)
{
    a = LayerNormalization <axis=-1> (x, g, b)
    [gate] h = MatMul (a, w1)
    s = Sigmoid (h)
    silu = Mul (h, s)
    [up] u = MatMul (a, w2)
    product = Mul (silu, u)
    [down] d = MatMul (product, w3)
    y = Add (x, d)
}
"""
SHAPES = {"g": (64,), "b": (64,), "w1": (64, 96), "w2": (64, 96), "w3": (96, 64)}


def network() -> ir.Model:
    """Gains between 1/16 and 16, so that a few channels carry most of the activation."""
    model = add_weights(NETWORK, SHAPES)
    gain = np.exp(np.random.default_rng(3).uniform(-2.8, 2.8, 64)).astype(np.float32)
    model.graph.initializers["g"].const_value = ir.tensor(gain, name="g")
    return model


def samples() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(4).standard_normal((24, 6, 64)).astype(np.float32)}


def quantized(recipe: Awq | Static, weights: str) -> tuple[ir.Model, float]:
    model, target = network(), get_target("cpu")
    expected = Session(model).run(samples())[0]
    scheme = target.scheme(weights, "float")
    job = Job(model, target, scheme, make_settings({}), Iterables([samples()]), Progress())
    recipe.run(job)
    # Without optimisations: onnxruntime's kernel for blocks rounds activations to 8 bits.
    found = Session(job.model, optimize=False).run(samples())[0]
    return job.model, float(np.square(found - expected).mean())


@pytest.mark.parametrize("weights", ["int4:32", "int4", "int3"])
def test_scales_and_clips_each_lower_the_error(weights: str) -> None:
    _, plain = quantized(Static(), weights)
    _, scaled = quantized(Awq(clip=False), weights)
    model, clipped = quantized(Awq(), weights)
    assert scaled < plain
    assert clipped < scaled
    assert {node.op_type for node in model.graph if node.op_type == "Mul"} == {"Mul"}
    assert [node.op_type for node in model.graph].count("Mul") == 2  # no node more
    assert [node.op_type for node in model.graph].count("DequantizeLinear") == 3


def test_the_ratio_is_the_best_of_all() -> None:
    model = network()
    x = samples()["x"]
    group = next(group for group in groups(model.graph) if group.name == "a")
    activation = Session(model, taps=["a"]).run({"x": x})[-1]
    statistics = ChannelStatistics()
    statistics.update(activation, -1)
    spec = parse_weights("int3")
    specs = {layer.node: spec for layer in group.layers}
    tried = [salience(statistics.mean_magnitude, step / 20) for step in range(20)]
    best = least_output_error(group, statistics, tried, specs, None)

    def error(scale: np.ndarray) -> float:
        rows = activation.reshape(-1, 64).astype(np.float64)
        total = 0.0
        for name in ("w1", "w2"):
            weight = model.graph.initializers[name].const_value.numpy()
            rounded = round_matrix((weight.T * scale).astype(np.float32), spec).T / scale[:, None]
            total += np.square(rows @ rounded - rows @ weight).sum()
        return total

    errors = [error(scale) for scale in tried]
    assert error(best) == min(errors)
    assert min(errors) < errors[0]


def test_salience_has_its_extremes_on_either_side_of_one() -> None:
    magnitudes = np.array([0.01, 1.0, 25.0, 0.0])
    np.testing.assert_array_equal(salience(magnitudes, 0.0), np.ones(4))
    scale = salience(magnitudes, 0.5)
    assert scale.max() * scale.min() == pytest.approx(1.0)
    assert scale[2] / scale[1] == pytest.approx(5.0)


@pytest.mark.parametrize("weights", ["int3", "int3:8", "uint4:8"])
def test_clips_are_the_best_of_their_grid(weights: str) -> None:
    generator = np.random.default_rng(6)
    matrix = generator.standard_t(3, (5, 20)).astype(np.float32)  # the last block of 8 is cut short
    inputs = (generator.standard_normal((100, 20)) * np.linspace(0.2, 3, 20)).astype(np.float32)
    spec = parse_weights(weights)
    clipped = clipped_for_outputs(matrix, inputs, spec)
    size = spec.block_size or 20
    for row, start in itertools.product(range(5), range(0, 20, size)):
        part = slice(start, start + size)
        own, x = matrix[row : row + 1, part], inputs[:, part].astype(np.float64)
        largest = np.abs(own).max()

        def error(limit: float, own: np.ndarray = own, x: np.ndarray = x) -> float:
            rounded = round_matrix(np.clip(own, -limit, limit), spec)
            return float(np.square(x @ (rounded - own).T).mean())

        least = min(error(np.float32(largest * np.float32(1 - step / 20))) for step in range(10))
        assert error(np.abs(clipped[row, part]).max()) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("weights", ["int4", "int4:8", "int4:7"])
def test_rows_and_back(weights: str) -> None:
    matrix = np.arange(60, dtype=np.float32).reshape(3, 20)
    np.testing.assert_array_equal(from_rows(as_rows(matrix, parse_weights(weights)), matrix.shape), matrix)


def test_the_same_data_give_the_same_bytes() -> None:
    first, second = (ir.to_proto(quantized(Awq(), "int4:32")[0]).SerializeToString() for _ in range(2))
    assert first == second
