"""Every TensorRT rule on a graph that breaks it and on its neighbour that does not, some against the compiler."""

import importlib.util

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from lint_graphs import IMAGE, MATRIX, build, pair, small_network

from onnxq import model as models
from onnxq import targets
from onnxq.calibration import calibrate
from onnxq.errors import OnnxqError
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.targets.tensorrt_lint import lint

X = pair("x", "xd")
W = "wd = DequantizeLinear<axis = 0>(w, w_scale, w_zero)"
CONV = "[c] y = Conv<pads = [1, 1, 1, 1]>(xd, wd)"
GOOD = f"{X} {W} {CONV}"
M = "md = DequantizeLinear<axis = 1>(m, m_scale, m_zero)"
TWO = ("float[1,32,8,8] x, float[1,32,8,8] v", IMAGE[1])
HALVES = ("float[1,16,8,8] a, float[1,16,8,8] b", IMAGE[1])
HALF = ("float16[1,32,8,8] x", "float16[1,32,A,B] y")
HALF_ARRAYS = {"hs": np.float16(0.05), "hw": np.full(32, 0.01, np.float16)}
HALF_GOOD = f"{pair('x', 'xd', 'hs')} wd = DequantizeLinear<axis = 0>(w, hw, w_zero) {CONV}"
HEADS = ("float16[2,64,64] q, float16[2,64,64] k, float16[2,64,64] v", "float16[2,64,64] y")
LONG_HEADS = ("float16[2,64,320] q, float16[2,320,64] k, float16[2,64,64] v", "float16[2,64,64] y")


def attention(softmax_pair: str, q: str = "qd", after: str = "") -> str:
    """Attention in float16, its q, k and v quantized, with what stands on the softmax output given."""
    pairs = " ".join(pair(name, f"{name}d", "hs") for name in "qkv")
    return f"{pairs} s0 = MatMul({q}, kd) [softmax] p = Softmax(s0) {softmax_pair} [ctx] o = MatMul(pd, vd) {after}"


END = f"{pair('o', 'od', 'hs')} y = Identity(od)"
FP8 = {"z": np.zeros((), ml_dtypes.float8_e4m3fn)}

# rule, broken, its neighbour, interface, arrays
CASES = {
    "E1 graph input": (
        "E1", GOOD.replace(", s,", ", q,"), GOOD, ("float[1,32,8,8] x, float q", IMAGE[1]), {},
    ),
    "E1 computed": (
        "E1",
        f"q = ReduceMax<keepdims = 0>(x) {GOOD.replace(', s,', ', q,')}",
        f"half = Div(s, t) k = Identity(half) {GOOD.replace(', s,', ', k,')}",
        IMAGE,
        {},
    ),
    "E2 zero": ("E2", GOOD.replace(", s,", ", q,"), GOOD, IMAGE, {"q": np.float32(0)}),
    "E2 infinite": ("E2", GOOD.replace(", s,", ", q,"), GOOD, IMAGE, {"q": np.float32(np.inf)}),
    "E2 weight": ("E2", GOOD.replace("w_scale", "q"), GOOD, IMAGE, {"q": np.arange(32, dtype=np.float32)}),
    "E2 float16": (
        "E2", HALF_GOOD.replace("hs", "tiny"), HALF_GOOD, HALF, HALF_ARRAYS | {"tiny": np.float16(1e-5)},
    ),
    "E3 asymmetric": ("E3", GOOD.replace(", z)", ", q)"), GOOD, IMAGE, {"q": np.int8(3)}),
    "E3 uint8": ("E3", GOOD.replace(", z)", ", u0)"), GOOD, IMAGE, {}),
    "E3 silent": (
        "E3",
        GOOD.replace(", s, z)", ", s)"),
        GOOD.replace("xd_codes = QuantizeLinear(x, s, z)", "xd_codes = QuantizeLinear<output_dtype = 3>(x, s)"),
        IMAGE,
        {},
    ),
    "E4 int32": (
        "E4",
        f"{X} {W} bd = DequantizeLinear<axis = 0>(b, w_scale) {CONV.replace('wd)', 'wd, bd)')}",
        f"{X} {W} {CONV.replace('wd)', 'wd, w_scale)')}",
        IMAGE,
        {"b": np.ones(32, np.int32)},
    ),
    "E4 int8": (
        "E4",
        f"{X} {W} bd = DequantizeLinear<axis = 0>(w_zero, w_scale) {CONV.replace('wd)', 'wd, bd)')}",
        f"{X} {W} {CONV.replace('wd)', 'wd, w_scale)')}",
        IMAGE,
        {},
    ),
    "E5 one element": ("E5", GOOD.replace(", s, z)", ", s1, z1)"), GOOD, IMAGE, {"z1": np.zeros(1, np.int8)}),
    "E5 per channel": (
        "E5", GOOD.replace(X, pair("x", "xd", "w_scale", "w_zero", "<axis = 1>")), GOOD, IMAGE, {},
    ),
    "E6 Conv": ("E6", GOOD.replace("<axis = 0>(w,", "<axis = 1>(w,"), GOOD, IMAGE, {}),
    "E6 Conv, default axis": ("E6", GOOD.replace("<axis = 0>(w,", "(w,"), GOOD, IMAGE, {}),
    "E6 MatMul": (
        "E6",
        f"{X} md = DequantizeLinear<axis = 0>(m, w_scale, w_zero) y = MatMul(xd, md)",
        f"{X} {M} y = MatMul(xd, md)",
        MATRIX,
        {},
    ),
    "E6 Transpose": (
        "E6",
        f"{X} d = DequantizeLinear<axis = 1>(m_turned, w_scale) md = Transpose(d) y = MatMul(xd, md)",
        f"{X} d = DequantizeLinear<axis = 0>(m_turned, m_scale) md = Transpose(d) y = MatMul(xd, md)",
        MATRIX,
        {},
    ),
    "E6 Gemm": (
        "E6",
        f"{X} md = DequantizeLinear<axis = 1>(m_turned, w_scale) y = Gemm<transB = 1>(xd, md)",
        f"{X} md = DequantizeLinear<axis = 0>(m_turned, m_scale) y = Gemm<transB = 1>(xd, md)",
        MATRIX,
        {},
    ),
    "E7": (
        "E7",
        GOOD.replace(", z)", ", f8)"),
        f"{pair('x', 'xd', 's', 'f8')} wd = DequantizeLinear<axis = 0>(w_fp8, w_scale) {CONV}",
        IMAGE,
        {},
    ),
    "E8 QuantizeLinear": ("E8", HALF_GOOD.replace("(x, hs,", "(x, s,"), HALF_GOOD, HALF, HALF_ARRAYS),
    "E8 DequantizeLinear": (
        "E8",
        HALF_GOOD.replace("xd = DequantizeLinear(xd_codes, hs,", "xf = DequantizeLinear(xd_codes, s,").replace(
            "wd =", "xd = Cast<to = 10>(xf) wd ="
        ),
        HALF_GOOD,
        HALF,
        HALF_ARRAYS,
    ),
    "E9 QLinearConv": (
        "E9",
        "xq = QuantizeLinear(x, s, z) yq = QLinearConv(xq, s, z, w, w_scale, w_zero, s, z) "
        "y = DequantizeLinear(yq, s, z)",
        GOOD,
        IMAGE,
        {},
    ),
    "E9 dynamic": (
        "E9", "xq, k, o = DynamicQuantizeLinear(x) y = Cast<to = 1>(xq)", GOOD, IMAGE, {},
    ),
    "E9 int16": ("E9", f"{pair('x', 'y', 's', 'q')}", GOOD, IMAGE, {"q": np.int16(0)}),
    "E9 e5m2": ("E9", f"{pair('x', 'y', 's', 'q')}", GOOD, IMAGE, {"q": np.zeros((), ml_dtypes.float8_e5m2)}),
    "E11": (
        "E11", GOOD.replace("Conv<", "ConvTranspose<"), f"{W} y = ConvTranspose(x, wd)", IMAGE, {},
    ),
    "E12": ("E12", "y = Add(x, h)", "y = Add(x, x)", (f"{IMAGE[0]}, bfloat16[N,32,8,8] h", IMAGE[1]), {}),
    "P1": ("P1", f"{X} {W} c = Conv(xd, wd) {pair('c', 'y')}", f"{X} {W} y = Conv(xd, wd)", IMAGE, {}),
    "P2": (
        "P2",
        f"{X} {W} c = Conv(xd, wd) {pair('c', 'cd')} y = Relu(cd)",
        f"{X} {W} c = Conv(xd, wd) y = Relu(c)",
        IMAGE,
        {},
    ),
    "P3 Relu": (
        "P3",
        f"{X} r = Relu(xd) {W} y = Conv(r, wd)",
        f"{X} r = MaxPool<kernel_shape = [2, 2]>(xd) {W} y = Conv(r, wd)",
        IMAGE,
        {},
    ),
    "P3 Mul": (
        "P3",
        f"{X} r = Mul(xd, q) {W} y = Conv(r, wd)",
        f"{X} r = Mul(xd, s) {W} y = Conv(r, wd)",
        IMAGE,
        {"q": np.ones((1, 32, 1, 1), np.float32)},
    ),
    "P4 scales": (
        "P4",
        f"{pair('a', 'ad')} {pair('b', 'bd', 't')} xd = Concat<axis = 1>(ad, bd) {W} {CONV}",
        f"{pair('a', 'ad')} {pair('b', 'bd')} xd = Concat<axis = 1>(ad, bd) {W} {CONV}",
        HALVES,
        {},
    ),
    "P4 float": (
        "P4",
        f"{pair('a', 'ad')} xd = Concat<axis = 1>(ad, b) {W} {CONV}",
        f"x = Concat<axis = 1>(a, b) {X} {W} {CONV}",
        HALVES,
        {},
    ),
    "P5": (
        "P5",
        f"{X} {W} c = Conv<pads = [1, 1, 1, 1]>(xd, wd) {pair('c', 'cd')} {pair('v', 'vd')} y = Add(cd, vd)",
        f"{X} {W} c = Conv<pads = [1, 1, 1, 1]>(xd, wd) {pair('v', 'vd')} y = Add(c, vd)",
        TWO,
        {},
    ),
    "P6": (
        "P6",
        f"{X} {W} c = Conv<pads = [1, 1, 1, 1]>(xd, wd) n = InstanceNormalization(xd, w_scale, w_scale) y = Add(c, n)",
        f"{X} {W} c = Conv<pads = [1, 1, 1, 1]>(xd, wd) n = InstanceNormalization(x, w_scale, w_scale) y = Add(c, n)",
        IMAGE,
        {},
    ),
    "P7": (
        "P7",
        attention("pd = Identity(p)", after=END),
        attention(pair("p", "pd", "hp"), after=END),
        HEADS,
        HALF_ARRAYS | {"hp": np.float16(1 / 127)},
    ),
    "P7 head": (
        "P7",
        attention(pair("p", "pd", "hp"), after=END),
        None,
        LONG_HEADS,
        FP8 | {"hs": np.float16(0.05), "hp": np.float16(1 / 448)},
    ),
    "P8 output": (
        "P8",
        attention(pair("p", "pd", "hp"), after="y = Identity(o)"),
        attention(pair("p", "pd", "hp"), after=END),
        HEADS,
        HALF_ARRAYS | {"hp": np.float16(1 / 127)},
    ),
    "P8 head": (
        "P8",
        attention(pair("p", "pd", "hp"), after=END),
        None,
        LONG_HEADS,
        HALF_ARRAYS | {"hp": np.float16(1 / 127)},
    ),
    "P9": (
        "P9",
        attention(pair("p", "pd", "hs"), after=END),
        attention(pair("p", "pd", "hp"), after=END),
        HEADS,
        HALF_ARRAYS | {"hp": np.float16(1 / 127)},
    ),
    "P10": (
        "P10",
        f"{X} nd = DequantizeLinear(n, s, z) y = Conv(xd, nd)",
        f"{X} nd = DequantizeLinear<axis = 0>(w, w_scale) y = Conv(xd, nd)",
        ("float[1,32,8,8] x", "float[1,C,A,B] y"),
        {"n": np.ones((8, 32, 3, 3), np.int8)},
    ),
    "P11": ("P11", f"{X} y = Conv(xd, w_float)", f"{X} {W} y = Conv(xd, wd)", IMAGE, {}),
}  # fmt: skip

# What else these break: a Cast before the product, and a product of codes and floats.
ALSO = {"E8 DequantizeLinear": {"P3"}, "P7": {"P11"}}


def rules(model, sm=None):
    return {finding.rule for finding in lint(model, sm)}


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    rule, broken, fine, interface, arrays = CASES[name]
    findings = lint(build(broken, interface, **arrays))
    assert {finding.rule for finding in findings} == {rule} | ALSO.get(name, set())
    assert all(finding.message.startswith("expected ") and ", found " in finding.message for finding in findings)
    assert all(finding.node for finding in findings)
    for finding in findings:
        assert finding.severity == ("error" if finding.rule.startswith("E") else "warning")
    if fine is not None:
        assert rules(build(fine, interface, **arrays)) == set()


def test_fp8_attention_in_float32():
    body = attention(pair("p", "pd", "hp"), after=END)
    interface = tuple(text.replace("float16", "float") for text in HEADS)
    (finding,) = lint(build(body, interface, **FP8, hs=np.float32(0.05), hp=np.float32(1 / 448)))
    assert (finding.rule, finding.node) == ("P7", "softmax")
    assert "float32" in finding.message


@pytest.mark.parametrize(
    ("body", "oldest"),
    [
        (GOOD, 80),
        (f"{pair('x', 'xd', 's', 'f8')} wd = DequantizeLinear<axis = 0>(w_fp8, w_scale) {CONV}", 89),
        ("wd = DequantizeLinear<axis = 0>(w4, w_scale) y = Conv(x, wd)", 80),
        ("wd = DequantizeLinear<axis = 0>(wf4, w_scale) y = Conv(x, wd)", 100),
    ],
)
def test_formats_need_hardware(body, oldest):
    ones = np.ones((32, 32, 1, 1), np.float32)
    model = build(body, w4=ones.astype(ml_dtypes.int4), wf4=ones.astype(ml_dtypes.float4_e2m1fn))
    assert rules(model, sm=oldest - 1) == {"E10"}
    assert rules(model, sm=oldest) == set()
    assert rules(model, sm=None) == set()


@pytest.mark.parametrize(
    "scale",
    [
        "k = Constant<value_float = 0.05>()",
        "k = Identity(s)",
        "k = Squeeze(s1)",
        "e = Constant<value_ints = [0]>() h = Gather(s1, e) k = Squeeze(h)",
        "k = Cast<to = 1>(half)",
        "k = Mul(s, t)",
    ],
)
def test_folding_scales_are_fine(scale):
    body = f"{scale} {GOOD.replace(', s,', ', k,')}"
    assert rules(build(body, half=np.float16(0.05))) == set()


def test_folded_scales_are_looked_into():
    body = f"k = Mul(s, n) {GOOD.replace(', s,', ', k,')}"
    assert rules(build(body, n=np.float32(-1))) == {"E2"}


def test_float_weights_behind_pairs_are_read():
    weights = pair("w_float", "wd", "w_scale", "w_zero", "<axis = 0>")
    assert rules(build(f"{X} {weights} {CONV}")) == set()
    assert rules(build(f"{X} {weights.replace('axis = 0', 'axis = 1')} {CONV}")) == {"E6"}


def test_subgraphs_are_read():
    branch = (
        "{name} () => (float[1,32,A,B] {out}) {{ {x} [{name}_conv] {out} = Conv<pads = [1, 1, 1, 1]>({out}_d, wd) }}"
    )
    first = branch.format(name="warm", out="a", x=pair("x", "a_d"))
    second = branch.format(name="cold", out="b", x=pair("x", "b_d", "s1", "z1"))
    body = f"{W} y = If (early) <then_branch = {first}, else_branch = {second}>"
    model = build(body, ("float[1,32,8,8] x, bool early", IMAGE[1]), z1=np.zeros(1, np.int8))
    assert [(finding.rule, finding.node) for finding in lint(model)] == [("E5", "b_d_Q")]


def test_local_functions_are_read():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[1,32,8,8] x) => (float[1,32,8,8] y) <float[1] s = {0.05}, int8[1] z = {0}> { y = local.pair(x, s, z) }
        <domain: "local", opset_import: ["" : 21]>
        pair (x, s, z) => (d) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) }""")
    assert rules(model) == {"E5"}


def test_initializers_listed_as_inputs_are_constants():
    model = build(GOOD)
    model.graph.inputs.append(model.graph.initializers["s"])
    assert rules(model) == set()


def test_a_graph_with_a_dangling_value_is_an_error():
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    model = ir.from_onnx_text(f"{head} g (float[2] x) => (float[M] y) {{ h = Relu(x) y = Add(h, v) }}")
    with pytest.raises(OnnxqError, match="expected a valid graph"):
        lint(model)


def test_the_model_is_not_changed():
    model = build(GOOD)
    before = ir.to_proto(model).SerializeToString()
    lint(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_nameless_nodes_are_named_by_their_output():
    body = GOOD.replace("[xd_Q] ", "").replace(", s, z)", ", s1, z1)")
    (finding,) = lint(build(body, z1=np.zeros(1, np.int8)))
    assert finding.node == "node_of_xd_codes"


@pytest.mark.parametrize("formats", [("int8", "int8"), ("fp8", "fp8"), ("int4:32", None)])
def test_own_graphs_break_no_rule(formats, tmp_path):
    model = small_network()
    models.normalise(model)
    target = targets.get("tensorrt")
    target.prepare(model)
    InsertQDQ(target.place(model.graph, target.scheme(*formats)).sites)(model)
    calibrate.set_weight_scales(model)
    target.lower(model)
    assert lint(model, sm=89) == []
    assert lint(models.read(models.save(model, tmp_path / "m.onnx")), sm=89) == []


@pytest.mark.parametrize("signed", [False, True])
def test_defaults_of_onnxruntime_are_refused(signed, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    models.save(small_network(), tmp_path / "float.onnx")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            generator = np.random.default_rng(0)
            self.feeds = iter([{"x": generator.normal(size=(1, 32, 8, 8)).astype(np.float32)} for _ in range(4)])

        def get_next(self):
            return next(self.feeds, None)

    kind = quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8
    quantization.quantize_static(tmp_path / "float.onnx", tmp_path / "q.onnx", Reader(), activation_type=kind)
    found = rules(models.read(tmp_path / "q.onnx"))
    assert {"E3", "E4"} <= found


# What the compiler makes of it: refused, float (in spite of Q/DQ), or integer arithmetic.
PROOFS = {
    "good": (GOOD, "integer"),
    "E1": (CASES["E1 graph input"][1], "refused"),
    "E3": (CASES["E3 asymmetric"][1], "refused"),
    "E4": (CASES["E4 int32"][1], "refused"),
    "E5": (CASES["E5 one element"][1], "float"),
    "E6": (CASES["E6 Conv, default axis"][1], "float"),
    "E7": (CASES["E7"][1], "refused"),
    "E11": (CASES["E11"][1], "float"),
    "E12": (CASES["E12"][1], "refused"),
    "P3": (CASES["P3 Relu"][1], "float"),
    "P4": (CASES["P4 scales"][1], "float"),
}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the tensorrt extra: a compiler")
@pytest.mark.parametrize("rule", PROOFS)
def test_compiler_agrees(rule, tmp_path):
    from onnxq import engines

    body, expected = PROOFS[rule]
    case = next((case for case in CASES.values() if case[1] == body), (None, None, None, IMAGE, {}))
    path = models.save(build(body, case[3], opset=21, **case[4]), tmp_path / "m.onnx")
    assert rules(models.read(path)) == (set() if rule == "good" else {rule})
    try:
        engine = engines.build(path, tmp_path / "m.engine", runtime="tensorrt-rtx", sm=("89",))
    except OnnxqError:
        assert expected == "refused"
    else:
        assert expected == ("integer" if engine.low_precision_nodes else "float")
