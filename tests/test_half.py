"""float16 between the codes: the function stays, and so do the types outside and what would overflow."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
import torch
from conftest import MODELS, ONNXRUNTIME, add_weights

import onnxq
from onnxq import model as models
from onnxq.arithmetic import storable_scale
from onnxq.autograd.interpreter import TorchGraph
from onnxq.errors import OnnxqError
from onnxq.half import to_half
from onnxq.learning.student import Student
from onnxq.passes.change_precision import ChangePrecision
from onnxq.runtime import Session

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
ROUNDS_TWICE = "onnxruntime before 1.30 rounds the quotient of float16 to float16 before it makes a code of it"

# A square that leaves float16, the sine of a position, and a Resize, whose scales are float32 whatever it resizes.
NETWORK = f"""{HEAD}
network (float[N,16] x, int64[N] position) => (float[N,24] y, float[N,1] angle)
<float two = {{2.0}}, float rate = {{3.0}}, float[2] scales = {{1.0, 1.5}},
 int64[1] last = {{-1}}, float tiny = {{1e-12}}>
{{
    [layer] h = MatMul (x, w)
    [square] s = Pow (h, two)
    [mean] m = ReduceMean (s, last)
    [floor] f = Max (m, tiny)
    [root] r = Sqrt (f)
    [norm] n = Div (h, r)
    [resize] y = Resize (n, , scales)
    [cast] p = Cast <to=1> (position)
    [turn] t = Mul (p, rate)
    [sine] z = Sin (t)
    [column] angle = Unsqueeze (z, last)
}}
"""


def network() -> ir.Model:
    model = add_weights(NETWORK, {"w": (16, 16)})
    common_passes.ShapeInferencePass()(model)
    return model


def feed(size: float = 1.0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    return {"x": size * x, "position": np.asarray([3, 5000, 6001, 70001])}


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {node.name or "": node.outputs[0].dtype for node in model.graph}


def test_inside_is_float16_and_outside_stays() -> None:
    model = network()
    wanted = Session(model).run(feed())
    assert ChangePrecision(FLOAT, FLOAT16, keep=["cast", "turn", "sine"])(model).modified
    common_passes.CheckerPass()(model)
    found = Session(model).run(feed())
    for before, after in zip(wanted, found, strict=True):
        assert after.dtype == np.float32
        np.testing.assert_allclose(after, before, rtol=4e-3, atol=2e-3)
    inside = types(model)
    assert inside["norm"] == inside["resize"] == FLOAT16 and inside["sine"] == FLOAT
    assert model.graph.initializers["scales"].dtype == FLOAT  # of a Resize
    assert model.graph.initializers["tiny"].const_value.numpy() > 0  # others divide by it


def test_and_back_again() -> None:
    model = network()
    ChangePrecision(FLOAT, FLOAT16)(model)
    ChangePrecision(FLOAT16, FLOAT)(model)
    assert FLOAT16 not in types(model).values()
    np.testing.assert_allclose(Session(model).run(feed())[0], Session(network()).run(feed())[0], rtol=1e-2, atol=1e-2)


def test_what_overflows_and_what_makes_angles_stays_float32() -> None:
    model = network()
    wanted = Session(model).run(feed(100.0))  # squares of thousands
    to_half(model, ir.DataType.FLOAT16, [feed(100.0)])
    inside = types(model)
    assert {name for name in inside if inside[name] == FLOAT} >= {"square", "mean", "cast", "turn", "sine"}
    assert inside["norm"] == FLOAT16
    for before, after in zip(wanted, Session(model).run(feed(100.0)), strict=True):
        np.testing.assert_allclose(after, before, rtol=4e-3, atol=2e-3)


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_a_base_of_float16_costs_next_to_nothing(recipe: str, network: Path, calibration: Path, tmp_path: Path) -> None:
    if recipe == "int8" and ONNXRUNTIME < (1, 30):
        pytest.skip(ROUNDS_TWICE)
    results = {
        base: onnxq.quantize(network, calibration, recipe=recipe, base=base, output=tmp_path / f"{base}.onnx")
        for base in ("float32", "float16")
    }
    half = results["float16"]
    assert min(50, results["float32"].numbers["sqnr_db"]) - 2 < half.numbers["sqnr_db"]  # float16 itself: 52 dB here
    made = Counter(node.outputs[0].dtype for node in half.model.graph if node.op_type == "DequantizeLinear")
    assert set(made) == {FLOAT16}
    assert [value.dtype for value in (*half.model.graph.inputs, *half.model.graph.outputs)] == [FLOAT, FLOAT]


def test_a_float16_model_has_integer_kernels_on_the_cpu(network: Path, calibration: Path, tmp_path: Path) -> None:
    model = ir.load(network)
    common_passes.ShapeInferencePass()(model)
    ChangePrecision(FLOAT, FLOAT16)(model)
    path = tmp_path / "half.onnx"
    ir.save(model, path)
    found, wanted = (onnxq.quantize(file, calibration, target="cpu").numbers for file in (path, network))
    assert found["integer_kernels"] >= wanted["integer_kernels"] > 0
    assert found["sqnr_db"] > wanted["sqnr_db"] - 3


def test_a_base_of_float16_is_refused_where_kernels_read_float32(network: Path, calibration: Path) -> None:
    with pytest.raises(OnnxqError, match="--base float32 for cpu") as caught:
        onnxq.quantize(network, calibration, target="cpu", base="float16")
    assert "--target tensorrt" in str(caught.value.hint)


@pytest.fixture(scope="module")
def in_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier that computes in float16, as many exports do."""
    model = models.load(MODELS / "fashion_resnet.onnx")
    ChangePrecision(FLOAT, FLOAT16, set())(model)
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    ir.save(model, path)
    return path


@pytest.mark.skipif(ONNXRUNTIME < (1, 30), reason=ROUNDS_TWICE)
@pytest.mark.parametrize(
    ("recipe", "knobs"),
    [
        ("gptq", {}),
        ("adaround", {"iterations": 10}),
        ("qdrop", {"iterations": 40}),  # with 10, biases that are corrected on 64 images differ by 2 dB
        ("lsq", {"steps": 5}),
        ("lsq", {"steps": 5, "start": "gptq"}),
        ("multiquant", {"steps": 5}),
    ],
)
def test_models_in_float16_learn_as_well_as_those_in_float32(in_half: Path, recipe: str, knobs: dict[str, Any]) -> None:
    """Torch computes them in float32; nodes met halves and floats together, and scales were too small to store."""
    found = [
        onnxq.quantize(path, MODELS / "fashion_calibration.npz", recipe=recipe, knobs=knobs, samples=64).numbers
        for path in (MODELS / "fashion_resnet.onnx", in_half)
    ]
    assert found[0]["quantized_nodes"] == found[1]["quantized_nodes"]
    assert found[1]["sqnr_db"] > found[0]["sqnr_db"] - 1.5


def test_halves_are_widened_in_torch_unless_asked_not_to() -> None:
    model = ir.from_onnx_text(f"{HEAD} net (float16[N,2] x) => (float16[N,2] y) {{ y = Mul (x, x) }}")
    x = torch.tensor([[1e-4, 2.0]], dtype=torch.float16)
    assert TorchGraph(model).run({"x": x}, ["y"])["y"].dtype == torch.float32
    assert TorchGraph(model, in_half=True).run({"x": x}, ["y"])["y"].dtype == torch.float16


def test_biases_of_models_in_float16_learn_in_float32(in_half: Path) -> None:
    """They were left out of what learns, and where they should have started was lost."""
    model = models.load(in_half)
    biases = [node.inputs[2].name or "" for node in model.graph if node.op_type == "Gemm"]
    starts = {biases[0]: torch.full((model.graph.initializers[biases[0]].shape[0],), 0.5, dtype=torch.float16)}
    masters = Student(TorchGraph(model), [], starts=starts).masters
    assert set(biases) <= set(masters)
    assert {master.dtype for master in masters.values()} == {torch.float32}
    assert bool((masters[biases[0]] == 0.5).all())


def test_no_stored_scale_rounds_to_nothing() -> None:
    small = np.asarray([1e-9, 1.0], np.float32)
    assert storable_scale(small, FLOAT16).astype(np.float16).min() == np.finfo(np.float16).tiny
    assert storable_scale(small, FLOAT) is small


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_the_input_of_a_quantized_layer_stays_float32(tmp_path: Path, recipe: str) -> None:
    """The pair in front of the first layer has the input's own type, which is not to change with it."""
    text = (
        f"{HEAD} network (float[N,16] x) => (float[N,16] y) {{ h = MatMul (x, w)   r = Relu (h)   y = MatMul (r, v) }}"
    )
    ir.save(add_weights(text, {"w": (16, 16), "v": (16, 16)}), tmp_path / "network.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32))
    output = tmp_path / "half.onnx"
    onnxq.quantize(tmp_path / "network.onnx", tmp_path / "data.npz", recipe=recipe, base="float16", output=output)
    written = ir.load(output)
    assert written.graph.inputs[0].dtype == written.graph.outputs[0].dtype == FLOAT
    assert onnxq.compare(tmp_path / "network.onnx", output, tmp_path / "data.npz").sqnr_db > 18
