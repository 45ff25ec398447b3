"""Engines: what compiles, what the proof says of it, and what a user is told when it does not compile."""

import importlib.util
import json
import signal

import numpy as np
import onnx_ir as ir
import psutil
import pytest

from onnxq.engines import build, parse_layers, parse_shapes, prove, runtimes, shapes, wishes
from onnxq.engines.groups import build_groups
from onnxq.engines.other_tools import command_lines
from onnxq.errors import OnnxqError

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
CODES = np.random.default_rng(0).integers(-7, 8, 4096)


def constant(kind, name, *dimensions):
    values = ", ".join(str(code) for code in np.resize(CODES, dimensions).ravel())
    return f"{kind}[{', '.join(map(str, dimensions))}] {name} = {{{values}}}"


SCALES = f"float s = {{0.05}}, int8 z = {{0}}, float[16] ws = {{{', '.join(['0.01'] * 16)}}}"
CONV_WEIGHT = constant("int8", "w", 16, 16, 1, 1)
QUANTIZED_CONV = f"""{HEAD} g (float[1, 16, 8, 8] x) => (float[1, 16, 8, 8] y) <{SCALES}, {CONV_WEIGHT}> {{
  xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wd = DequantizeLinear<axis = 0>(w, ws)
  [conv] y = Conv(xd, wd)
}}"""
BATCHED_CONV = QUANTIZED_CONV.replace("[1, 16, 8, 8]", "[N, 16, 8, 8]")
VECTOR_SCALE = QUANTIZED_CONV.replace("float s =", "float[1] s =")
COMPUTED_SCALE = QUANTIZED_CONV.replace("(float[1, 16, 8, 8] x)", "(float[1, 16, 8, 8] x, float s)").replace(
    "float s = {0.05}, ", ""
)
UNSIGNED = QUANTIZED_CONV.replace("int8 z = {0}", "uint8 z = {128}").replace("xq =", "[codes] xq =")
FP8_CONV = f"""{HEAD} g (float[1, 16, 8, 8] x) => (float[1, 16, 8, 8] y)
  <float s = {{0.05}}, {constant("float", "w", 16, 16, 3, 3)}> {{
  xq = QuantizeLinear<output_dtype = 17>(x, s) xd = DequantizeLinear(xq, s)
  wq = QuantizeLinear<output_dtype = 17>(w, s) wd = DequantizeLinear(wq, s)
  [conv] y = Conv<pads = [1, 1, 1, 1]>(xd, wd)
}}"""
NETWORK = f"""{HEAD} g (float[1, 16, 8, 8] x) => (float[1, 16] y)
  <{SCALES}, {CONV_WEIGHT}, {constant("float", "v", 16, 16, 3, 3)}, {constant("int8", "u", 16, 16)}> {{
  xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wd = DequantizeLinear<axis = 0>(w, ws)
  [first] a = Conv(xd, wd)
  [act] b = Relu(a)
  [second] c = Conv<pads = [1, 1, 1, 1]>(b, v)
  [pool] d = GlobalAveragePool(c)
  dq = QuantizeLinear(d, s, z) dd = DequantizeLinear(dq, s, z)
  [flat] e = Flatten(dd)
  ud = DequantizeLinear<axis = 0>(u, ws)
  [last] y = Gemm<transB = 1>(e, ud)
}}"""
INT4_MATMUL = f"""{HEAD} g (float[4, 128] x) => (float[4, 16] y)
  <{constant("int4", "w", 128, 16)}, {constant("float", "s", 2, 16)}> {{
  wd = DequantizeLinear<axis = 0, block_size = 64>(w, s)
  [matmul] y = MatMul(x, wd)
}}"""


@pytest.fixture
def compiled(tmp_path):
    """Compile ONNX text; nothing but the model and the engine may be left."""

    def compile_text(text, **options):
        model = ir.from_onnx_text(text)
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(
                value.const_value.numpy()
            )  # int4 text is unpacked; TensorRT reads packed bytes only
        ir.save(model, tmp_path / "model.onnx")
        try:
            return build(tmp_path / "model.onnx", tmp_path / "model.engine", **{"runtime": "tensorrt-rtx", **options})
        finally:
            left = {file.name for file in tmp_path.iterdir()}
            assert left <= {"model.onnx", "model.engine"}
            assert psutil.Process().children() == []

    return compile_text


@needs_compiler
def test_every_weighted_node_is_proven(compiled):
    engine = compiled(NETWORK)
    assert engine.low_precision_nodes == ("first", "last")
    assert engine.float_nodes == ("second",)
    assert engine.promised_but_float == engine.weight_only_nodes == ()
    first = next(layer for layer in engine.layers if "first" in layer.nodes and layer.is_product)
    assert (first.input_types, first.weight_types[0]) == (("int8",), "int8")


@needs_compiler
def test_json_has_the_documented_keys(compiled, tmp_path):
    found = json.loads(json.dumps(compiled(QUANTIZED_CONV, sm=("8.9",)).to_json()))
    assert found["engine_bytes"] == (tmp_path / "model.engine").stat().st_size
    assert (found["runtime"], found["sm"]) == ("tensorrt-rtx", ["89"])
    assert (found["low_precision_nodes"], found["promised_but_float"], found["proven"]) == (["conv"], [], True)


@needs_compiler
def test_the_same_graph_gives_the_same_bytes(compiled, tmp_path):
    compiled(NETWORK)
    first = (tmp_path / "model.engine").read_bytes()
    compiled(NETWORK)
    assert (tmp_path / "model.engine").read_bytes() == first


@needs_compiler
def test_nameless_nodes_are_proven_under_the_compilers_names(compiled):
    assert compiled(QUANTIZED_CONV.replace("[conv]", "")).low_precision_nodes == ("node_of_y",)


@needs_compiler
def test_fp8(compiled):
    assert compiled(FP8_CONV).low_precision_nodes == ("conv",)


@needs_compiler
def test_fp8_on_a_gpu_without_it_is_an_error(compiled):
    with pytest.raises(OnnxqError, match=r"compiles for SM 86, found: .*fp8") as caught:
        compiled(FP8_CONV, sm=("86",))
    assert "onnxq lint" in caught.value.hint


@needs_compiler
@pytest.mark.parametrize("text", [INT4_MATMUL, QUANTIZED_CONV.replace("Conv(xd", "Conv(x")])
def test_weight_only_counts_apart(compiled, text):
    engine = compiled(text)
    assert len(engine.weight_only_nodes) == 1
    assert engine.low_precision_nodes == engine.promised_but_float == ()


@needs_compiler
@pytest.mark.parametrize("text", [VECTOR_SCALE, QUANTIZED_CONV.replace("Conv(", "ConvTranspose(")])
def test_a_promise_that_silently_stays_float_is_reported(compiled, text):
    engine = compiled(text)
    assert engine.promised_but_float == engine.float_nodes == ("conv",)


@needs_compiler
def test_the_oldest_of_several_gpus_decides(compiled):
    assert compiled(QUANTIZED_CONV, sm=("89", "120")).low_precision_nodes == ("conv",)
    assert compiled(QUANTIZED_CONV, sm=("75", "89")).promised_but_float == ("conv",)


@needs_compiler
@pytest.mark.parametrize("given", [None, "x:1x16x8x8,4x16x8x8,64x16x8x8"])
def test_dynamic_batch(compiled, given):
    engine = compiled(BATCHED_CONV, shapes=parse_shapes(given) if given else None)
    assert engine.low_precision_nodes == ("conv",)


@needs_compiler
def test_other_dynamic_dimensions_need_shapes(compiled):
    text = QUANTIZED_CONV.replace("[1, 16, 8, 8]", "[N, 16, H, W]")
    with pytest.raises(OnnxqError, match=r"dynamic input 'x' of shape \?x16x\?x\?") as caught:
        compiled(text)
    example = caught.value.hint.split("--shapes ")[1]
    assert compiled(text, shapes=parse_shapes(example)).low_precision_nodes == ("conv",)


@needs_compiler
def test_external_data(tmp_path):
    ir.save(ir.from_onnx_text(QUANTIZED_CONV), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    engine = build(tmp_path / "m.onnx", tmp_path / "m.engine", runtime="tensorrt-rtx")
    assert engine.low_precision_nodes == ("conv",)


@needs_compiler
def test_a_graph_that_does_not_parse_names_the_node(compiled):
    with pytest.raises(OnnxqError, match=r"invalid node 'codes' \(QuantizeLinear\)") as caught:
        compiled(UNSIGNED)
    assert "\n" not in caught.value.message
    assert "onnxq lint" in caught.value.hint


@needs_compiler
def test_a_crash_of_the_compiler_is_an_error_and_keeps_the_old_engine(compiled, tmp_path):
    (tmp_path / "model.engine").write_text("old")
    with pytest.raises(OnnxqError, match="crashed") as caught:
        compiled(COMPUTED_SCALE)
    assert "onnxq lint" in caught.value.hint
    assert (tmp_path / "model.engine").read_text() == "old"


def test_a_hang_is_ended(compiled):
    with pytest.raises(OnnxqError, match=r"in 0\.05 seconds"):
        compiled(QUANTIZED_CONV, timeout_seconds=0.05)


def test_an_interrupt_ends_the_compiler(compiled):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            compiled(QUANTIZED_CONV)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_output_that_cannot_be_written(tmp_path):
    ir.save(ir.from_onnx_text(QUANTIZED_CONV), tmp_path / "model.onnx")
    with pytest.raises(OnnxqError, match="expected a folder"):
        build(tmp_path / "model.onnx", tmp_path / "nowhere" / "model.engine")


@needs_compiler
def test_unknown_compute_capability_lists_the_legal_ones(compiled):
    with pytest.raises(OnnxqError, match="'90'") as caught:
        compiled(QUANTIZED_CONV, sm=("89", "90"))
    assert "75, 80, 86, 89, 120" in caught.value.hint


def test_unknown_runtime(compiled):
    with pytest.raises(OnnxqError, match="'openvino'"):
        compiled(QUANTIZED_CONV, runtime="openvino")


@pytest.mark.parametrize("name", ["auto", "tensorrt-rtx"])
def test_a_missing_runtime_says_what_to_install(monkeypatch, name):
    monkeypatch.setattr(runtimes, "_installed", lambda name: False)
    with pytest.raises(OnnxqError, match="not installed") as caught:
        runtimes.select(name, None)
    assert caught.value.hint == "pip install 'onnxq[tensorrt]'"


@pytest.mark.parametrize(
    ("installed", "gpu", "sm", "expected"),
    [
        ({"tensorrt", "tensorrt-rtx"}, "90", None, "tensorrt"),
        ({"tensorrt", "tensorrt-rtx"}, "90", ("89",), "tensorrt-rtx"),
        ({"tensorrt", "tensorrt-rtx"}, None, None, "tensorrt-rtx"),
        ({"tensorrt"}, None, None, "tensorrt"),
    ],
)
def test_auto_takes_full_tensorrt_where_it_can_build(installed, gpu, sm, expected, monkeypatch):
    monkeypatch.setattr(runtimes, "_installed", installed.__contains__)
    assert runtimes.choose("auto", sm, gpu) == expected


def test_shapes_are_read_like_trtexec_writes_them():
    assert parse_shapes("x:1x3") == {"x": ((1, 3), (1, 3), (1, 3))}
    assert parse_shapes(["a:0:1,2,4", "t:7"]) == {"a:0": ((1,), (2,), (4,)), "t": ((7,), (7,), (7,))}


@pytest.mark.parametrize("text", ["x", "x:", ":1x3", "x:1x3,2x3", "x:1xa", "x:0x3", "x:1 x:2"])
def test_shapes_that_are_none(text):
    with pytest.raises(OnnxqError, match="expected shapes"):
        parse_shapes(text)


def test_profiles():
    inputs = {"x": (-1, 3, 8, 8), "t": (-1,), "c": (1, 2)}
    profiles = shapes.resolve(inputs, {"c": ((1, 2),) * 3, "t": ((1,), (2,), (4,))})
    assert set(profiles) == {"x", "t"}
    assert (profiles["x"].minimum, profiles["x"].maximum) == ((1, 3, 8, 8), (32, 3, 8, 8))
    assert profiles["t"].usual == (2,)


def test_dimensions_of_one_name_have_one_size() -> None:
    inputs, symbols = {"x": (-1, 3, -1), "t": (-1,), "y": (-1, -1)}, {"x": ["n", "", "s"], "t": ["n"], "y": ["m", "s"]}
    profiles = shapes.resolve(inputs, {"x": ((1, 3, 8), (4, 3, 8), (6, 3, 16))}, symbols)
    assert (profiles["t"].minimum, profiles["t"].usual, profiles["t"].maximum) == ((1,), (4,), (6,))
    assert (profiles["y"].minimum, profiles["y"].usual, profiles["y"].maximum) == ((1, 8), (8, 8), (32, 16))


@pytest.mark.parametrize("given", [{"y": ((1,),) * 3}, {"x": ((1,),) * 3}, {"x": ((2, 3), (1, 3), (4, 3))}])
def test_shapes_that_do_not_fit(given):
    with pytest.raises(OnnxqError):
        shapes.resolve({"x": (-1, 3)}, given)


def test_wishes_look_through_what_only_moves_codes():
    asked = wishes(ir.from_onnx_text(NETWORK))
    assert [(wish.node, wish.kind) for wish in asked] == [("first", "product"), ("second", "none"), ("last", "product")]


def test_the_list_of_layers_of_full_tensorrt_is_read():
    row = "Location: Device, Dimensions: [1,3,8,8], Format/Datatype:"
    log = (
        "Layers:\n"
        f"Name: x + xq, LayerType: Reformat, Inputs: [ {{ Name: x, {row} Row major linear FP32 }}], "
        f"Outputs: [ {{ Name: q, {row} Row major Int8 format }}], Origin: QDQ, Metadata: \n"
        f"Name: w + wq + conv, LayerType: CaskConvolution, Inputs: [ {{ Name: q, {row} Row major Int8 format }}], "
        f'Outputs: [ {{ Name: y, {row} Half }}], Kernel: [1,1], Weights: {{"Type": "Int8", "Count": 9}}, '
        "StreamId: 0, Metadata: [ONNX Layer: conv]\x1e[ONNX Layer: /act[0]/Relu]\n"
        "Bindings:\nx\n"
    )
    reformat, conv = parse_layers(log)
    assert reformat.nodes == ("x", "xq")
    assert conv.nodes == ("conv", "/act[0]/Relu")
    assert (conv.input_types, conv.weight_types, conv.output_types) == (("int8",), ("int8",), ("float16",))
    assert prove(wishes(ir.from_onnx_text(QUANTIZED_CONV)), [reformat, conv]).low_precision_nodes == ("conv",)


def test_nothing_listed_is_nothing_claimed():
    proof = prove(wishes(ir.from_onnx_text(QUANTIZED_CONV)), [])
    assert proof.promised_but_float == ("conv",)


@needs_compiler
def test_an_engine_for_each_group_of_steps(tmp_path):
    for number in (0, 1):
        ir.save(ir.from_onnx_text(QUANTIZED_CONV), tmp_path / f"unet.group{number}.onnx")
    entries = [{"file": f"unet.group{n}.onnx", "steps": [n], "timesteps": [9.0 - n]} for n in (0, 1)]
    (tmp_path / "unet.groups.json").write_text(json.dumps({"groups": entries}))
    for _ in range(2):  # a second time into the same folder
        built = build_groups(tmp_path / "unet.groups.json", tmp_path / "engines", runtime="tensorrt-rtx")
    assert [item.low_precision_nodes for item in built] == [("conv",), ("conv",)]
    listed = json.loads((tmp_path / "engines" / "unet.groups.json").read_text())["groups"]
    assert [entry["timesteps"] for entry in listed] == [[9.0], [8.0]]
    assert all((tmp_path / "engines" / entry["engine"]).is_file() for entry in listed)
    assert all((tmp_path / "engines" / entry["file"]).is_file() for entry in listed)
    assert {entry["runtime"] for entry in listed} == {"tensorrt-rtx"}
    with pytest.raises(OnnxqError, match="expected an index of subgraphs"):
        build_groups(tmp_path / "none.groups.json", tmp_path / "engines")


def test_command_lines_for_other_tools(tmp_path):
    model, path = ir.from_onnx_text(BATCHED_CONV), tmp_path / "my model.onnx"
    lines = command_lines(model, path, tmp_path / "m.engine", {"x": ((1, 16, 8, 8), (2, 16, 8, 8), (4, 16, 8, 8))})
    assert f"'--onnx={path}' --stronglyTyped" in lines["trtexec"]
    assert lines["trtexec"].endswith("--optShapes=x:2x16x8x8 --maxShapes=x:4x16x8x8")
    assert "--trt-min-shapes 'x:[1,16,8,8]'" in lines["polygraphy"]
    assert "Shapes" not in command_lines(ir.from_onnx_text(QUANTIZED_CONV), path, path)["trtexec"]
