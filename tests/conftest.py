"""Fixtures that several test files share: a small float network and its calibration data."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything reads it: files of tests share the cores out, and what is learned depends on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, settings

# Time says nothing about an example on a machine that others use.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
MODELS = Path(__file__).resolve().parent.parent / "models"
ONNXRUNTIME = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])

NETWORK = """
<ir_version: 10, opset_import: ["" : 17]>
network (float[N,3,16,16] x) => (float[N,10] logits)
<float six = {6.0}, float zero = {0.0}>
{
    [conv1] c1 = Conv <pads=[1,1,1,1]> (x, w1)
    [norm1] n1 = BatchNormalization (c1, g1, b1, m1, v1)
    [relu1] r1 = Relu (n1)
    [conv2] c2 = Conv <pads=[1,1,1,1]> (r1, w2)
    [norm2] n2 = BatchNormalization (c2, g2, b2, m2, v2)
    [add] s = Add (n2, r1)
    [relu2] r2 = Clip (s, zero, six)
    [pool] p = GlobalAveragePool (r2)
    [flat] f = Flatten (p)
    [fc] logits = Gemm <transB=1> (f, w3, b3)
}
"""

SHAPES = {
    "w1": (32, 3, 3, 3), "w2": (32, 32, 3, 3), "w3": (10, 32), "b3": (10,),
    **{f"{name}{index}": (32,) for name in "gbmv" for index in (1, 2)},
}  # fmt: skip


def sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal over error in dB."""
    return float(10 * np.log10(np.sum(expected**2) / max(np.sum((expected - found) ** 2), 1e-30)))


def add_weights(text: str, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> ir.Model:
    """A model from ONNX text whose undefined values become random initializers (variances positive)."""
    header, arrow, rest = text.partition(") =>")
    extra = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    model = ir.from_onnx_text(header + extra + arrow + rest)
    generator = np.random.default_rng(seed)
    for value in [value for value in model.graph.inputs if value.name in shapes]:
        model.graph.inputs.remove(value)
        shape = shapes[value.name]
        array = generator.standard_normal(shape) * (0.3 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5)
        if value.name.startswith(("v", "g")):
            array = np.abs(array) + 0.5
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    return model


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A residual classifier with BatchNormalization, as a file."""
    path = tmp_path / "network.onnx"
    ir.save(add_weights(NETWORK, SHAPES), path)
    return path


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    """Sixteen samples for it."""
    path = tmp_path / "calibration.npz"
    x = np.random.default_rng(1).standard_normal((16, 3, 16, 16)).astype(np.float32)
    np.savez(path, x=x, labels=np.arange(16) % 10)
    return path


@pytest.fixture
def shared_data() -> Path:
    """The folder of real models; tests that need it skip where it is not."""
    if not DATA.is_dir():
        pytest.skip("the real models are not here (../shared/data)")
    return DATA
