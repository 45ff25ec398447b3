"""Q/DQ models of other tools and targets: taken apart, and put together as a target wants them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS, add_weights
from typer.testing import CliRunner

import onnxq
from onnxq import OnnxqError, retarget, targets
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.cli import app
from onnxq.comparison import compare
from onnxq.passes.strip_qdq import StripQDQ
from onnxq.runtime import Session

FLOAT, CALIBRATION, TEST = (
    MODELS / name for name in ("fashion_resnet.onnx", "fashion_calibration.npz", "fashion_test.npz")
)


class Reader:
    """What onnxruntime's quantizer reads calibration data from."""

    def __init__(self) -> None:
        with np.load(CALIBRATION) as arrays:
            self.rows = iter(arrays["x"][:32])

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.rows, None)
        return None if row is None else {"x": row[None]}


@pytest.fixture(scope="module")
def by_onnxruntime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped classifier, quantized by onnxruntime with its defaults: uint8, zero points, int32 biases."""
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder = tmp_path_factory.mktemp("onnxruntime")
    quant_pre_process(str(FLOAT), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    quantize_static(str(folder / "prepared.onnx"), str(folder / "model.onnx"), Reader(), per_channel=True)
    return folder / "model.onnx"


def sqnr_db(path: Path) -> float:
    return compare(FLOAT, path, TEST, samples=200, layers=False, latency=False).sqnr_db


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_what_onnxruntime_made_becomes_legal_and_no_worse(by_onnxruntime: Path, target: str, tmp_path: Path) -> None:
    def errors(model: ir.Model) -> set[str]:
        return {item.rule for item in targets.get(target).lint(model) if item.severity == "error"}

    if target == "tensorrt":
        assert {"E3", "E4"} <= errors(models.read(by_onnxruntime))
    fixed = retarget.retarget(by_onnxruntime, target)
    assert not errors(fixed.model)
    assert len(fixed.quantized_nodes) >= 12
    models.save(fixed.model, tmp_path / "fixed.onnx")
    assert sqnr_db(tmp_path / "fixed.onnx") > sqnr_db(by_onnxruntime) - 1


def test_what_the_compiler_refused_compiles(by_onnxruntime: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT-RTX: pip install 'onnxq[tensorrt]'")
    with pytest.raises(OnnxqError):
        onnxq.build(by_onnxruntime, tmp_path / "before.engine", sm=["89"])
    done = CliRunner().invoke(app, ["lint", str(by_onnxruntime), "--fix", str(tmp_path / "fixed.onnx")])
    assert done.exit_code == 0, done.output
    built = onnxq.build(tmp_path / "fixed.onnx", tmp_path / "after.engine", sm=["89"])
    assert built.low_precision_nodes and not built.promised_but_float


@pytest.mark.parametrize(("made_for", "target"), [("cpu", "tensorrt"), ("tensorrt", "cpu"), ("cpu", "cpu")])
def test_our_own_models_change_targets(made_for: str, target: str, tmp_path: Path) -> None:
    onnxq.quantize(FLOAT, CALIBRATION, target=made_for, output=tmp_path / "one.onnx", samples=64)
    models.save(retarget.retarget(tmp_path / "one.onnx", target).model, tmp_path / "two.onnx")
    assert sqnr_db(tmp_path / "two.onnx") > sqnr_db(tmp_path / "one.onnx") - 2


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_codes_survive_where_they_are_legal(target: str, tmp_path: Path) -> None:
    first = onnxq.quantize(FLOAT, CALIBRATION, target=target, output=tmp_path / "one.onnx", samples=64).model
    again = retarget.retarget(tmp_path / "one.onnx", target).model

    def codes(model: ir.Model) -> list[bytes]:
        constants = [node.inputs[0] for node in model.graph if graphs.is_dequantize(node)]
        return sorted(
            value.const_value.numpy().tobytes()
            for value in constants
            if value is not None and graphs.is_constant(value) and value.const_value is not None
        )

    assert codes(first) == codes(again)


def test_stripping_gives_the_float_function_back(by_onnxruntime: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["strip", str(by_onnxruntime), "-o", str(tmp_path / "float.onnx")])
    assert done.exit_code == 0, done.output
    stripped = models.read(tmp_path / "float.onnx")
    assert not any(graphs.is_quantize(node) or graphs.is_dequantize(node) for node in stripped.graph)
    assert sqnr_db(tmp_path / "float.onnx") > sqnr_db(by_onnxruntime) + 5  # what is left is that of the weights


def test_float_weights_behind_quantizelinear_come_back_whole() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    kept (float[N,4] x) => (float[N,3] y)
    <float s = {0.1}, uint8 z = {0}, float t = {0.02}, int8 zero = {0}>
    {
        [a] h = Neg (x)
        [xq] q = QuantizeLinear (h, s, z)
        [xd] d = DequantizeLinear (q, s, z)
        [wq] v = QuantizeLinear (w, t, zero)
        [wd] u = DequantizeLinear (v, t, zero)
        [m] y = MatMul (d, u)
    }
    """
    model = add_weights(text, {"w": (4, 3)})
    from onnxq.passes.strip_qdq import StripQDQ

    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    strip = StripQDQ()
    assert strip(model).modified and not StripQDQ()(model).modified
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    found = Session(model).run({"x": x})[0]
    np.testing.assert_allclose(found, np.maximum(-x, 0) @ weight.numpy(), rtol=1e-5, atol=1e-6)  # the Relu was implied
    assert strip.ranges == {"h_rectified": (0.0, pytest.approx(25.5))}


def test_what_has_no_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="expected a model with QuantizeLinear"):
        retarget.retarget(FLOAT, "tensorrt")
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        integer (uint8[N,4] x, uint8[4,3] w) => (int32[N,3] y) { [m] y = MatMulInteger (x, w) }
        """
    )
    ir.save(model, tmp_path / "integer.onnx")
    with pytest.raises(OnnxqError, match="found MatMulInteger"):
        retarget.strip(tmp_path / "integer.onnx")


def test_a_zero_point_that_is_no_code_is_refused() -> None:
    model = ir.from_onnx_text("""
    <ir_version: 10, opset_import: ["" : 21]>
    damaged (float[1,4] x) => (float[1,4] y) <float scale = {0.1}, float zero = {0.0}>
    { q = QuantizeLinear (x, scale, zero)
      y = DequantizeLinear (q, scale, zero) }""")
    with pytest.raises(OnnxqError, match="zero point of type FLOAT"):
        StripQDQ()(model)


def test_pairs_of_onnxruntimes_own_domain_are_read(tmp_path: Path) -> None:
    """Its quantizer writes them where ONNX had no 16 or 4 bits yet."""
    text = """
    <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    wide (float[N,32] x) => (float[N,48] y)
    <float sx = {0.0001}, uint16 zx = {32768}, float sw = {0.01}, int8 zw = {0}>
    {
        q = com.microsoft.QuantizeLinear (x, sx, zx)
        d = com.microsoft.DequantizeLinear (q, sx, zx)
        c = com.microsoft.QuantizeLinear (w, sw, zw)
        v = com.microsoft.DequantizeLinear (c, sw, zw)
        [product] y = MatMul (d, v)
    }
    """
    path = models.save(add_weights(text, {"w": (32, 48)}), tmp_path / "wide.onnx")
    stripped = StripQDQ()
    assert stripped(models.load(path)).modified
    assert stripped.ranges["x"] == pytest.approx((-3.2768, 3.2767))
    assert [node.op_type for node in retarget.strip(path).graph] == ["MatMul"]
    assert retarget.retarget(path, "cpu").quantized_nodes == ["product"]
    with pytest.raises(OnnxqError, match="quantized already"):
        onnxq.quantize(path)
