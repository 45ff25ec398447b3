"""bfloat16: onnxruntime runs it as rounded float32, results stay bfloat16 for TensorRT, and a CPU gets integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS, add_weights, sqnr_db
from test_cli_errors import assert_two_lines, run

import onnxq
from onnxq import graph as graphs
from onnxq import model as models
from onnxq import serialized
from onnxq.half import to_half
from onnxq.passes.change_precision import ChangePrecision
from onnxq.passes.emulate_bfloat16 import EmulateBfloat16
from onnxq.passes.fold_batchnorm import FoldBatchNorm
from onnxq.runtime import Session

FLOAT, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
STEPS = f"""{HEAD}
steps (bfloat16[N,8] x) => (bfloat16[N,4] y, int64[2] size)
{{
    [sum] s = Add (x, b)
    [product] p = Mul (s, s)
    [half] h, g = Split <axis = 1, num_outputs = 2> (p)
    [difference] y = Sub (h, g)
    [shape] size = Shape (y)
}}
"""


def rounded(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def in_bfloat16(text: str, **arrays: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(text)
    for name, array in arrays.items():
        value = next(value for node in model.graph for value in node.inputs if value is not None and value.name == name)
        value.const_value = ir.Tensor(array.astype(ml_dtypes.bfloat16), name=name)
        value.type, value.shape = ir.TensorType(BFLOAT16), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    return model


def test_every_number_in_between_is_one_of_bfloat16(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, b = random.normal(size=(3, 8)).astype(np.float32), random.normal(size=8)
    models.save(in_bfloat16(STEPS, b=b), tmp_path / "steps.onnx")
    model = models.load(tmp_path / "steps.onnx")
    total = rounded(rounded(x) + rounded(b.astype(np.float32)))
    product = rounded(total * total)
    wanted = rounded(product[:, :4] - product[:, 4:])
    for session in (Session(model, taps=["p"]), Session(model, taps=["p"], optimize=False)):
        y, size, tapped = session.run({"x": x})
        np.testing.assert_array_equal(y, wanted)
        np.testing.assert_array_equal(tapped, product)
        assert y.dtype == np.float32 and size.tolist() == [3, 4]
    opened = Session(tmp_path / "steps.onnx")
    assert opened.emulates_bfloat16 and opened.output_names == ["y", "size"]
    np.testing.assert_array_equal(opened.run({"x": x})[0], wanted)
    assert graphs.is_bfloat16(model)  # it is what it was


def test_bodies_are_emulated_too() -> None:
    text = f"""{HEAD}
    branches (bfloat16[4] x, bool first) => (bfloat16[4] y)
    {{
        y = If (first) <
            then_branch = t () => (bfloat16[4] a) {{ a = Add (x, x) }},
            else_branch = e () => (bfloat16[4] c)
                {{ w = Constant <value = bfloat16[1] {{1.5}}> () c = Mul (x, w) }}
        >
    }}
    """
    model = ir.from_onnx_text(text.replace("bfloat16[1] {1.5}", "float[1] {1.5}"))
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                value.type = ir.TensorType(BFLOAT16)
            if node.op_type == "Constant":
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array([1.5], ml_dtypes.bfloat16)))
    x = np.asarray([1.003, -2.5, 0.1, 7.77], np.float32)
    for first, factor in ((True, 2.0), (False, 1.5)):
        (y,) = Session(model).run({"x": x, "first": np.asarray(first)})
        np.testing.assert_array_equal(y, rounded(factor * rounded(x)))


def test_a_float32_model_is_left_alone() -> None:
    model = models.load(MODELS / "fashion_resnet.onnx")
    assert not graphs.is_bfloat16(model) and not EmulateBfloat16()(model).modified


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier in bfloat16, its input too."""
    model = models.load(MODELS / "fashion_resnet.onnx")
    ChangePrecision(FLOAT, BFLOAT16, outside=True)(model)
    return models.save(model, tmp_path_factory.mktemp("bfloat16") / "model.onnx")


@pytest.mark.parametrize(
    ("recipe", "knobs", "target"),
    [
        ("int8", {}, "tensorrt"),
        ("fp8", {}, "tensorrt"),
        ("int8", {}, "cpu"),
        ("gptq", {}, "tensorrt"),
        ("qdrop", {"iterations": 40}, "tensorrt"),
        ("lsq", {"steps": 5, "start": "gptq"}, "tensorrt"),
        ("multiquant", {"steps": 5}, "tensorrt"),
        ("hast", {"steps": 5, "images": 8}, "tensorrt"),
    ],
)
def test_recipes_take_it_as_they_take_float32(
    classifier: Path, recipe: str, knobs: dict[str, Any], target: str, tmp_path: Path
) -> None:
    found = {}
    for name, path in (("float32", MODELS / "fashion_resnet.onnx"), ("bfloat16", classifier)):
        found[name] = onnxq.quantize(
            path,
            MODELS / "fashion_calibration.npz",
            recipe=recipe,
            knobs=knobs,
            samples=64,
            budget="quick",
            target=target,
            output=tmp_path / f"{name}.onnx",
        )
    ours, theirs = found["bfloat16"].numbers, found["float32"].numbers
    assert ours["quantized_nodes"] == theirs["quantized_nodes"]
    assert ours["sqnr_db"] > min(theirs["sqnr_db"], 36) - 3  # bfloat16 itself: 39 dB here
    assert "latency_ms_float" not in ours and "float_inference_seconds" not in ours  # of an emulation
    written = ir.load(tmp_path / "bfloat16.onnx")
    outside = FLOAT if target == "cpu" else BFLOAT16  # numpy, which feeds a CPU, has no bfloat16
    assert written.graph.inputs[0].dtype == written.graph.outputs[0].dtype == outside
    if target == "cpu":
        assert ours["integer_kernels"] == theirs["integer_kernels"] > 0
    else:
        made = Counter(node.outputs[0].dtype for node in written.graph if node.op_type == "DequantizeLinear")
        assert set(made) == {BFLOAT16}
    compared = onnxq.compare(classifier, tmp_path / "bfloat16.onnx", MODELS / "fashion_test.npz", samples=200)
    assert compared.sqnr_db > ours["sqnr_db"] - 6
    assert compared.latency_ms_float is None and any("bfloat16" in line for line in compared.warnings)


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_a_base_of_bfloat16(recipe: str, tmp_path: Path) -> None:
    result = onnxq.quantize(
        MODELS / "fashion_resnet.onnx",
        MODELS / "fashion_calibration.npz",
        recipe=recipe,
        base="bfloat16",
        samples=64,
        output=tmp_path / "o.onnx",
    )
    plain = onnxq.quantize(
        MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz", recipe=recipe, samples=64
    )
    assert result.numbers["sqnr_db"] > min(plain.numbers["sqnr_db"], 36) - 3
    assert result.model.graph.inputs[0].dtype == result.model.graph.outputs[0].dtype == FLOAT
    types = Counter(node.outputs[0].dtype for node in result.model.graph if node.op_type in ("Conv", "Gemm"))
    assert set(types) == {BFLOAT16}


def test_large_numbers_become_bfloat16_and_angles_do_not() -> None:
    text = f"""{HEAD}
    net (float[N,16] x, int64[N] position) => (float[N,16] y, float[N] z)
    {{
        [layer] h = MatMul (x, w)
        [square] y = Mul (h, h)
        [cast] p = Cast <to=1> (position)
        [turn] a = Add (p, p)
        [sine] z = Sin (a)
    }}
    """
    model = add_weights(text, {"w": (16, 16)})
    ir.passes.common.ShapeInferencePass()(model)
    feed = {"x": np.full((2, 16), 1e6, np.float32), "position": np.asarray([3, 70001])}
    wanted = Session(model).run(feed)
    to_half(model, BFLOAT16, [feed])
    made = {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}
    assert made["Mul"] == made["MatMul"] == BFLOAT16 and made["Add"] == made["Sin"] == FLOAT
    found = Session(model).run(feed)
    assert sqnr_db(wanted[0], found[0]) > 35  # squares of 10¹², which float16 does not hold
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [BFLOAT16, ir.DataType.FLOAT16])
def test_batch_norms_of_narrow_models_are_folded_in_float32(dtype: ir.DataType) -> None:
    """In bfloat16 the mean times its factor lost what the bias is made of."""
    model = models.load(MODELS / "fashion_resnet.onnx")
    ChangePrecision(FLOAT, dtype)(model)
    exact = model.clone()
    ChangePrecision(dtype, FLOAT)(exact)  # of the same numbers
    name = model.graph.inputs[0].name or ""
    x = np.load(MODELS / "fashion_test.npz")[name][:64]
    (wanted,) = Session(exact).run({name: x})
    FoldBatchNorm()(model)
    assert not any(node.op_type == "BatchNormalization" for node in model.graph)
    assert {value.dtype for value in model.graph.initializers.values()} <= {dtype, ir.DataType.INT64}
    ChangePrecision(dtype, FLOAT)(model)
    (found,) = Session(model).run({name: x})
    noise = np.square(found - wanted).mean() / np.square(wanted).mean()
    assert -10 * np.log10(noise) > (44 if dtype == BFLOAT16 else 62)


def test_statistics_of_a_batch_norm_may_be_float32(tmp_path: Path) -> None:
    """As ONNX allows from opset 15 on; and what no layer is before keeps its numbers."""
    text = f"""{HEAD}
    net (float16[N,8,4,4] x) => (float16[N,8,4,4] y)
    {{
        r = Relu (x)
        [norm] y = BatchNormalization (r, scale, shift, mean, variance)
    }}
    """
    arrays = {"scale": np.ones(8), "shift": np.full(8, 0.1), "mean": np.full(8, 3e-9), "variance": np.full(8, 1e6)}
    model = ir.from_onnx_text(text)
    norm = next(node for node in model.graph if node.name == "norm")
    for value in norm.inputs[1:]:
        assert value is not None
        dtype = FLOAT if value.name in ("mean", "variance") else ir.DataType.FLOAT16
        value.const_value = ir.Tensor(arrays[value.name or ""].astype(dtype.numpy()), name=value.name)
        value.type, value.shape = ir.TensorType(dtype), ir.Shape([8])
        model.graph.register_initializer(value)
    loaded = models.load(models.save(model, tmp_path / "net.onnx"))
    FoldBatchNorm()(loaded)
    for name, value in loaded.graph.initializers.items():
        held = value.const_value.numpy()
        assert held.dtype == (np.float32 if name in ("mean", "variance") else np.float16)
        np.testing.assert_array_equal(held, arrays[name].astype(held.dtype))


def test_a_cpu_refuses_what_stays_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"""{HEAD}
    net (bfloat16[4,64] x, bool first) => (bfloat16[4,64] y)
    {{
        a = MatMul (x, w)
        y = If (first) <
            then_branch = t () => (bfloat16[4,64] b) {{ b = Relu (a) }},
            else_branch = e () => (bfloat16[4,64] c) {{ c = Neg (a) }}
        >
    }}
    """
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    path = models.save(in_bfloat16(text, w=weight), tmp_path / "net.onnx")
    np.savez(tmp_path / "d.npz", x=np.ones((4, 64), np.float32), first=np.asarray(True))
    options = ["--data", tmp_path / "d.npz", "-o", tmp_path / "o.onnx"]
    assert_two_lines(*run(capsys, "quantize", path, "--target", "cpu", *options), "without If", "float32")
    assert run(capsys, "quantize", path, *options)[0] == 0


def test_a_bfloat16_input_alone_becomes_float32(tmp_path: Path) -> None:
    text = f"{HEAD} net (bfloat16[N,64] x) => (float[N,64] y) {{ f = Cast <to=1> (x) y = MatMul (f, w) }}"
    path = models.save(add_weights(text, {"w": (64, 64)}), tmp_path / "net.onnx")
    onnxq.quantize(path, [{"x": np.ones((4, 64), np.float32)}], target="cpu", output=tmp_path / "o.onnx")
    assert ir.load(tmp_path / "o.onnx").graph.inputs[0].dtype == FLOAT


def test_tables_of_a_denoiser_are_bfloat16_too(tmp_path: Path) -> None:
    """They are recorded in float32, and an Add of both was refused by the compiler alone."""
    model = models.load(MODELS / "fashion_unet_guided.onnx")
    ChangePrecision(FLOAT, BFLOAT16, outside=True)(model)
    path = models.save(model, tmp_path / "unet.onnx")
    knobs = {"groups": 2, "lowering": "rescale"}
    schedule = str(MODELS / "fashion_unet_guided.scheduler.json")
    options = {"recipe": "apq-dm", "knobs": knobs, "steps": 4, "samples": 8, "scheduler": schedule}
    result = onnxq.quantize(path, output=tmp_path / "o.onnx", **options)
    tables = [value for value in result.model.graph.initializers.values() if (value.name or "").endswith("_table")]
    assert tables and {value.dtype for value in tables} == {BFLOAT16}
    assert result.numbers["sqnr_db"] > 35
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX compiles without a GPU")
    engine = onnxq.build(tmp_path / "o.onnx", tmp_path / "o.engine", runtime="tensorrt-rtx", sm=["89"])
    assert not engine.promised_but_float


def test_float32_weights_between_bfloat16_are_rounded(classifier: Path, tmp_path: Path) -> None:
    """torch's exporter folds BatchNormalizations so, and nothing runs the file."""
    model = ir.load(classifier)
    convolution = next(node for node in model.graph if node.op_type == "Conv")
    weight = convolution.inputs[1]
    assert weight is not None and weight.const_value is not None and weight.dtype == BFLOAT16
    weight.const_value = ir.Tensor(weight.const_value.numpy().astype(np.float32), name=weight.name)
    weight.type = ir.TensorType(FLOAT)
    ir.save(model, tmp_path / "mixed.onnx")
    assert models.load(tmp_path / "mixed.onnx").graph.initializers[weight.name or ""].dtype == BFLOAT16
    data = MODELS / "fashion_calibration.npz"
    found = [
        onnxq.quantize(path, data, samples=16, output=tmp_path / "o.onnx")
        for path in (classifier, tmp_path / "mixed.onnx")
    ]
    assert found[0].numbers["sqnr_db"] == found[1].numbers["sqnr_db"]
    assert np.isfinite(onnxq.compare(tmp_path / "mixed.onnx", tmp_path / "o.onnx", data).sqnr_db)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
def test_large_weights_of_types_that_numpy_lacks_run(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime takes no such arrays from numpy; a model over 512 MiB in FP8 could not be checked."""
    monkeypatch.setattr(serialized, "IN_MEMORY_LIMIT_BYTES", 1000)
    monkeypatch.setattr(serialized, "LARGE_TENSOR_BYTES", 1000)
    numbers = np.random.default_rng(0).normal(size=(64, 64)).astype(getattr(ml_dtypes, dtype))
    number = int(ir.DataType.from_numpy(numbers.dtype))
    model = ir.from_onnx_text(
        f"{HEAD} net (float[N,64] x) => (float[N,64] y) {{ f = Cast <to=1> (w) y = MatMul (x, f) }}"
    )
    value = model.graph[0].inputs[0]
    value.const_value, value.shape = ir.Tensor(numbers, name="w"), ir.Shape(numbers.shape)
    value.type = ir.TensorType(ir.DataType(number))
    model.graph.register_initializer(value)
    ir.passes.common.ShapeInferencePass()(model)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    session = Session(model, optimize=False)
    assert session.in_parts
    np.testing.assert_allclose(session.run({"x": x})[0], x @ numbers.astype(np.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_an_engine_multiplies_codes_between_bfloat16(recipe: str, classifier: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX compiles without a GPU")
    data, output = MODELS / "fashion_calibration.npz", tmp_path / "o.onnx"
    result = onnxq.quantize(classifier, data, recipe=recipe, samples=16, output=output)
    shapes = {result.model.graph.inputs[0].name or "": ((1, 1, 28, 28), (8, 1, 28, 28), (8, 1, 28, 28))}
    engine = onnxq.build(output, tmp_path / "o.engine", runtime="tensorrt-rtx", sm=["89"], shapes=shapes)
    assert len(engine.low_precision_nodes) == result.numbers["quantized_nodes"] > 5
    assert not engine.promised_but_float
