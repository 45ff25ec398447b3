"""Every rule of onnxruntime's CPU provider, each against what onnxruntime makes of the graph."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import ONNXRUNTIME, sqnr_db
from lint_graphs import ARRAYS, GENERATOR, IMAGE, MATRIX, build, pair, small_network

from onnxq import model as models
from onnxq import targets
from onnxq.calibration import calibrate
from onnxq.errors import OnnxqError
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.runtime import Session, optimized_nodes
from onnxq.targets.cpu_lint import lint

X = pair("x", "xd", zero="u")
W = "wd = DequantizeLinear<axis = 0>(w, w_scale, w_zero)"
C = "[c] c = Conv<pads = [1, 1, 1, 1]>(xd, wd)"
Y = pair("c", "y", "t", "u")
GOOD = f"{X} {W} {C} {Y}"
M = "md = DequantizeLinear<axis = 1>(m, m_scale, m_zero)"
G = "md = DequantizeLinear<axis = 0>(m_turned, m_scale, m_zero)"
GEMM = f"{X} {G} c = Gemm<transB = 1>(xd, md, m_scale) {Y}"
TWO = ("float[1,32,8,8] x, float[1,32,8,8] v", IMAGE[1])
V = pair("v", "vd", "t", "u")
MATRICES = ("float[64,32] x, float[32,48] v", MATRIX[1])


def fp8(body: str) -> str:
    return body.replace(", u)", ", f8)").replace("(w, w_scale, w_zero)", "(w_fp8, w_scale)")


# rule, broken, its neighbour, interface, arrays
CASES = {
    "C1 no output": ("C1", f"{X} {W} y = Conv(xd, wd)", GOOD, IMAGE, {}),
    "C1 second reader": ("C1", f"{X} {W} {C} {pair('c', 'cd', 't', 'u')} y = Sub(c, cd)", GOOD, IMAGE, {}),
    "C1 Relu": (
        "C1",
        f"{X} {W} {C} r = Relu(c) {pair('r', 'y', 't', 'u')}",
        f"{X} {W} {C} r = Relu(c) {pair('r', 'y', 't', 'u0')}",
        IMAGE,
        {},
    ),
    "C1 Clip": (
        "C1",
        f"{X} {W} {C} r = Clip(c, zero, six) {pair('r', 'y', 't', 'u0')}",
        f"{X} {W} {C} r = Clip(c, zero, six) {pair('r', 'y', 'narrow', 'u0')}",
        IMAGE,
        {"zero": np.float32(0), "six": np.float32(6), "narrow": np.float32(6 / 256)},
    ),
    "C1 formats": ("C1", GOOD.replace("t, u)", "t, z)"), GOOD, IMAGE, {}),
    "C4 Add": (
        "C4",
        f"{X} {V} c = Add(xd, vd) y = Conv(c, w_float)",
        f"{X} {V} c = Add(xd, vd) {Y.replace('] y =', '] cd =')} y = Conv(cd, w_float)",
        TWO,
        {},
    ),
    "C4 MaxPool": (
        "C4",
        f"{X} c = MaxPool<kernel_shape = [3, 3]>(xd) {Y}",
        f"{X} c = MaxPool<kernel_shape = [3, 3]>(xd) {Y.replace(', t,', ', s,')}",
        IMAGE,
        {},
    ),
    "C6 zero point": ("C6", GEMM.replace(", m_scale, m_zero)", ", m_scale)"), GEMM, MATRIX, {}),
    "C6 beta": ("C6", GEMM.replace("<transB = 1", "<transB = 1, beta = 0.5"), GEMM, MATRIX, {}),
    "C6 bias": (
        "C6",
        f"{X} {G} y = Gemm<transB = 1>(xd, md, m_scale)",
        f"{X} {G} y = Gemm<transB = 1>(xd, md)",
        MATRIX,
        {},
    ),
    "C6 axis": (
        "C6",
        GEMM.replace("<axis = 0>(m_turned, m_scale, m_zero)", "<axis = 1>(m_turned, w_scale, w_zero)"),
        GEMM,
        MATRIX,
        {},
    ),
    "C9 ConvTranspose": ("C9", GOOD.replace("= Conv<", "= ConvTranspose<"), GOOD, IMAGE, {}),
    "C9 left weight": (
        "C9",
        f"{X} md = DequantizeLinear<axis = 0>(m_turned, m_scale) y = MatMul(md, xd)",
        f"{X} md = DequantizeLinear<axis = 1>(m, m_scale) y = MatMul(xd, md)",
        ("float[32,32] x", "float[A,B] y"),
        {},
    ),
    "C9 per channel": ("C9", f"{pair('x', 'xd', 'w_scale', 'w_zero', '<axis = 1>')} {W} {C} {Y}", GOOD, IMAGE, {}),
    "C9 int4": (
        "C9",
        f"{X} wd = DequantizeLinear<axis = 0>(w4, w_scale) c = Conv(xd, wd) {Y}",
        f"{X} wd = DequantizeLinear<axis = 0>(w, w_scale) c = Conv(xd, wd) {Y}",
        IMAGE,
        {"w4": np.ones((32, 32, 3, 3), ml_dtypes.int4)},
    ),
    "C9 computed scale": (
        "C9",
        GOOD.replace(", s,", ", q,").replace("wd)", "wd, w_scale)"),
        GOOD.replace(", s,", ", q,"),
        ("float[1,32,8,8] x, float q", IMAGE[1]),
        {},
    ),
    "C10 int16": ("C10", GOOD.replace(", u)", ", i16)"), GOOD, IMAGE, {"i16": np.int16(0)}),
    "C10 fp8": ("C10", fp8(f"{X} {W} y = Conv(xd, wd)"), GOOD, IMAGE, {}),
    "C11": ("C11", f"{X} {M} c = MatMul(xd, md) y = Add(c, m_scale)", f"{X} {M} c = MatMul(xd, md) y = Add(c, row)",
            ("float[2,7,32] x", "float[2,7,48] y"), {"row": ARRAYS["m_scale"][None]}),
}  # fmt: skip

ALSO = {"C10 fp8": {"C1"}}
INTEGER = ("QLinear", "QGemm", "MatMulInteger")


def rules(model):
    return {finding.rule for finding in lint(model)}


def kernels(model):
    """How many integer kernels the optimised graph has; MaxPool counts where it reads codes."""
    nodes = optimized_nodes(model)
    integer = sum(count for op, count in nodes.items() if op.startswith(INTEGER))
    return integer + ("MaxPool" in nodes and nodes["DequantizeLinear"] == 1)


@pytest.mark.parametrize("name", CASES)
def test_rule_that_costs_speed(name):
    rule, broken, fine, interface, arrays = CASES[name]
    model, neighbour = (build(body, interface, opset=21, **arrays) for body in (broken, fine))
    findings = lint(model)
    assert {finding.rule for finding in findings} == {rule} | ALSO.get(name, set())
    assert {finding.severity for finding in findings} == {"warning"}
    assert all(finding.message.startswith("expected ") and ", found " in finding.message for finding in findings)
    assert rules(neighbour) == set()
    if ONNXRUNTIME < (1, 30) and name in ("C6 zero point", "C9 computed scale"):
        pytest.skip("onnxruntime before 1.30 fuses neither of the two graphs")
    # onnxruntime agrees: the broken graph lacks a kernel that its neighbour has
    assert kernels(model) < kernels(neighbour)


@pytest.mark.parametrize("value", [0.0, -0.05, np.inf, np.nan])
def test_scales_are_finite_and_positive(value):
    (finding,) = lint(build(GOOD.replace(", s,", ", q,"), q=np.float32(value)))
    assert (finding.rule, finding.severity, finding.node) == ("C2", "error", "xd_Q")


@pytest.mark.parametrize(
    ("body", "interface", "arrays"),
    [
        (fp8(GOOD), IMAGE, {}),
        (fp8(f"{X} {V} c = Add(xd, vd) {Y}"), TWO, {}),
        (fp8(f"{X} {pair('v', 'vd', 't', 'u')} y = MatMul(xd, vd)"), MATRICES, {}),
        (GOOD.replace(", u)", ", i4)"), IMAGE, {"i4": np.zeros((), ml_dtypes.int4)}),
        ("wd = DequantizeLinear<axis = 0>(w4, w_scale) y = Conv(x, wd)", IMAGE, {"w4": np.ones((32, 32, 1, 1))}),
    ],
)
def test_refused_formats(body, interface, arrays):
    if "w4" in arrays:
        arrays = {"w4": arrays["w4"].astype(ml_dtypes.float4_e2m1fn)}
    opset = 23 if "w4" in arrays else 21  # the first with FP4
    model = build(body, interface, opset, **arrays)
    assert "C3" in {finding.rule for finding in lint(model) if finding.severity == "error"}
    if ONNXRUNTIME >= (1, 32) and "f8" in body:
        pytest.skip("onnxruntime runs FP8 on a CPU from 1.32 on, as floats")
    with pytest.raises(Exception, match="ONNXRuntimeError"):  # a session of ours would have FP8 in place of FP4
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())


def error_db(model, feed):
    """Distance of the optimised session from the literal one."""
    literal, optimized = (Session(model, optimize=flag).run(feed)[0] for flag in (False, True))
    return sqnr_db(literal, optimized)


def test_bias_of_another_scale_is_computed_wrongly():
    body = f"{X} {G} bd = DequantizeLinear<axis = 0>(b, b_scale) c = Gemm<transB = 1>(xd, md, bd) {Y}"
    right = ARRAYS["s"] * ARRAYS["m_scale"]
    feed = {"x": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)}
    bias = np.full(48, 1000, np.int32)
    good, bad = (build(body, MATRIX, 21, b=bias, b_scale=scale) for scale in (right, right * np.float32(20)))
    assert rules(good) == set()
    assert [(finding.rule, finding.severity) for finding in lint(bad)] == [("C5", "error")]
    assert error_db(good, feed) > 40
    assert error_db(bad, feed) < 20


def test_weight_axis_is_ignored_by_the_kernel():
    feed = {"x": np.random.default_rng(0).normal(size=(1, 32, 8, 8)).astype(np.float32)}
    good, bad = build(GOOD, opset=21), build(GOOD.replace("<axis = 0>(w,", "<axis = 1>(w,"), opset=21)
    assert [(finding.rule, finding.severity) for finding in lint(bad)] == [("C8", "error")]
    assert rules(good) == set()
    assert error_db(good, feed) > 40
    assert error_db(bad, feed) < 20


def test_scales_of_several_matrices_are_refused():
    weight = GENERATOR.integers(-127, 127, (3, 32, 48)).astype(np.int8)
    interface = ("float[3,7,32] x", "float[3,7,48] y")
    body = f"{X} wd = DequantizeLinear<axis = 2>(several, m_scale, m_zero) c = MatMul(xd, wd) y = Softmax(c)"
    (finding,) = lint(build(body, interface, 21, several=weight))
    assert (finding.rule, finding.severity) == ("C8", "error")
    feed = {"x": np.zeros((3, 7, 32), np.float32)}
    with pytest.raises(OnnxqError):
        Session(build(body, interface, 21, several=weight)).run(feed)
    one = build(body.replace("<axis = 2>(several, m_scale, m_zero)", "(several, s, z)"), interface, 21, several=weight)
    assert lint(one) == []
    Session(one).run(feed)


def test_signed_activations_are_said_once():
    convolutions = " ".join(f"{name} = Conv(xd, wd) {pair(name, f'{name}d', 't', 'u')}" for name in "cd")
    two = f"{X} {W} {convolutions} e = Add(cd, dd) {pair('e', 'y', zero='u')}"
    assert rules(build(two)) == set()
    assert [finding.rule for finding in lint(build(two.replace(", u)", ", z)")))] == ["C7"]
    assert rules(build(GOOD.replace(", u)", ", z)"))) == set()


@pytest.mark.parametrize("formats", [(None, None), ("int4:32", None), ("int8", "float")])
def test_own_graphs_break_no_rule(formats, tmp_path):
    model = small_network()
    models.normalise(model)
    target = targets.get("cpu")
    target.prepare(model)
    InsertQDQ(target.place(model.graph, target.scheme(*formats)).sites)(model)
    calibrate.set_weight_scales(model)
    target.lower(model)
    assert lint(model) == []
    assert lint(models.read(models.save(model, tmp_path / "m.onnx"))) == []


def test_the_model_is_not_changed():
    model = build(GOOD)
    before = ir.to_proto(model).SerializeToString()
    lint(model)
    assert ir.to_proto(model).SerializeToString() == before
