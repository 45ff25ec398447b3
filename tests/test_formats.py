"""Number formats against onnxruntime's own kernels, bit for bit, and the algebra of quantization."""

from __future__ import annotations

import functools
import math
import time
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import onnxruntime
import pytest
from conftest import ONNXRUNTIME
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.arithmetic import dequantize, fake_quantize, quantize, scale_and_zero_point
from onnxq.errors import OnnxqError
from onnxq.formats import FORMATS, parse_format

deterministic = settings(derandomize=True, deadline=None, max_examples=60, database=None)

ONNX_NAMES = {
    "int8": "int8",
    "uint8": "uint8",
    "int16": "int16",
    "uint16": "uint16",
    "int4": "int4",
    "uint4": "uint4",
    "fp8": "float8e4m3fn",
    "fp8_e5m2": "float8e5m2",
}
# onnxruntime takes no 4-bit numpy arrays: they go in and out as 8-bit integers, with a Cast in the graph.
CARRIERS = {"int4": "int8", "uint4": "uint8"}
ELEMENT_TYPES = {"int8": 3, "uint8": 2, "int4": 22, "uint4": 21, "float8e4m3fn": 17, "float8e5m2": 19}
FLOATS = {"float": np.float32, "float16": np.float16}
INTEGERS = [name for name, number_format in FORMATS.items() if not (number_format.is_float or name == "float")]
NARROW = [f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 5, 6, 7)]
LAYOUTS = {
    "tensor": (None, None),
    "rows": (0, None),
    "columns": (1, None),
    "row blocks": (0, 2),
    "column blocks": (1, 3),
}


def session(text: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    model = onnx.parser.parse_model(text).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def kernel(operator: str, name: str, real: str, layout: str) -> Any:
    """A session with one QuantizeLinear or DequantizeLinear of dynamic shape."""
    axis, block_size = LAYOUTS[layout]
    attributes = "" if axis is None else f"<axis={axis}, block_size={block_size}>" if block_size else f"<axis={axis}>"
    shape = "" if axis is None else "[A,B]" if block_size else "[A]"
    code = ONNX_NAMES[name]
    carrier = CARRIERS.get(code, code)
    source, target = (real, carrier) if operator == "QuantizeLinear" else (carrier, real)

    def cast(to: str) -> str:
        return f"Cast<to={ELEMENT_TYPES[to]}>" if code in CARRIERS and to != real else "Identity"

    return session(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        graph ({source}[M,N] x, {real}{shape} scale, {carrier}{shape} zero) => ({target}[M,N] y) {{
            z = {cast(code)}(zero)
            i = {cast(real if source == real else code)}(x)
            q = {operator}{attributes}(i, scale, z)
            y = {cast(target)}(q)
        }}"""
    )


def bound(array: np.ndarray) -> onnxruntime.OrtValue:
    name = array.dtype.name.replace("float8_", "float8")
    if name.startswith("float8"):
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), ELEMENT_TYPES[name])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def run(
    operator: str,
    name: str,
    real: str,
    layout: str,
    x: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
) -> np.ndarray:
    """What onnxruntime makes of x; outputs are bound because it has no numpy type for fp8."""
    code, dtype = ONNX_NAMES[name], FORMATS[name].numpy_dtype
    carrier = np.dtype(CARRIERS[code]) if code in CARRIERS else dtype
    binding = kernel(operator, name, real, layout).io_binding()
    to_codes = operator == "QuantizeLinear"
    y = np.empty(x.shape, carrier if to_codes else FLOATS[real])
    x = np.ascontiguousarray(x if to_codes else x.astype(carrier))
    values = {"x": bound(x), "scale": bound(np.asarray(scale)), "zero": bound(zero.astype(carrier)), "y": bound(y)}
    for key in ("x", "scale", "zero"):
        binding.bind_ortvalue_input(key, values[key])
    binding.bind_ortvalue_output("y", values["y"])
    kernel(operator, name, real, layout).run_with_iobinding(binding)
    return y.astype(dtype) if to_codes else y


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same bytes, but for the payload of NaN: e5m2 has three of them."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    both_nan = np.zeros(ours.shape, bool)
    if ours.dtype.kind not in "iu" and "int" not in ours.dtype.name:
        both_nan = np.isnan(ours) & np.isnan(theirs)
    bits = f"u{ours.dtype.itemsize}"
    different = (ours.view(bits) != theirs.view(bits)) & ~both_nan
    assert not different.any(), (ours[different][:5], theirs[different][:5])


def parameter_shape(shape: tuple[int, int], layout: str) -> tuple[int, ...]:
    axis, block_size = LAYOUTS[layout]
    if axis is None:
        return ()
    if block_size is None:
        return (shape[axis],)
    return tuple(-(-n // block_size) if i == axis else n for i, n in enumerate(shape))


@st.composite
def cases(draw: st.DrawFn, name: str, real: str, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, scales and zero points: mostly on and around the ties of each code, some far out of range."""
    number_format, dtype = FORMATS[name], FLOATS[real]
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 70)))  # past the 16- and 64-wide vector loops, and tails
    exponents = draw(st.sampled_from([(-3, 3), (-6, -4)] + ([(-40, -30), (20, 36)] if real == "float" else [])))
    parameters = parameter_shape(shape, layout)
    with np.errstate(all="ignore"):
        scale = np.asarray(10.0 ** generator.uniform(*exponents, parameters), dtype)
        scale = np.maximum(scale, np.finfo(dtype).smallest_subnormal)
        zero = np.zeros(parameters)
        if not number_format.is_float:
            zero = generator.integers(int(number_format.low), int(number_format.high) + 1, parameters)
        wide = np.broadcast_to(spread(scale, shape, layout), shape).astype(np.float64)
        reach = 1.3 * max(-number_format.low, number_format.high)
        steps = generator.uniform(-reach, reach, shape)
        halves = np.rint(2 * steps) / 2  # ties
        steps = np.where(generator.random(shape) < 0.6, halves, steps)
        if number_format.is_float:  # all sizes of numbers, so that subnormal codes appear
            steps *= 10.0 ** generator.integers(-8, 1, shape)
        if draw(st.booleans()):
            steps *= 1000
        values = (steps * wide).astype(dtype)
    special = [0.0, -0.0, np.finfo(dtype).smallest_subnormal, -np.finfo(dtype).tiny]
    if saturates(name, real, layout):
        special += [np.inf, -np.inf, np.nan, np.finfo(dtype).max, np.finfo(dtype).min]
    else:
        # These kernels pass through int32 (see onnxq.arithmetic): only what fits is defined.
        fits = np.abs(values.astype(np.float64) / wide) < 2.0**30
        values = np.where(fits, values, dtype(0))
        special = special[:2]
    chosen = generator.random(shape) < 0.1
    values = np.where(chosen, generator.choice(np.array(special, dtype), shape), values)
    return values, scale, np.asarray(zero).astype(number_format.numpy_dtype)


def spread(parameter: np.ndarray, shape: tuple[int, int], layout: str) -> np.ndarray:
    """A scale or zero point per element."""
    axis, block_size = LAYOUTS[layout]
    if axis is None:
        return np.asarray(parameter)
    if block_size is None:
        return parameter.reshape((-1, 1) if axis == 0 else (1, -1))
    return np.repeat(parameter, block_size, axis)[: shape[0], : shape[1]]


def saturates(name: str, real: str, layout: str) -> bool:
    """Whether onnxruntime's kernel saturates infinities; the others wrap around, as the last test shows."""
    if FORMATS[name].is_float:
        return True
    return real == "float" and FORMATS[name].bits >= 8 and LAYOUTS[layout][1] is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("real", FLOATS)
@pytest.mark.parametrize("name", ONNX_NAMES)
def test_quantize_and_dequantize_equal_onnxruntime(name: str, real: str, layout: str) -> None:
    axis, block_size = LAYOUTS[layout]
    if real == "float16" and not FORMATS[name].is_float and block_size is None and ONNXRUNTIME < (1, 30):
        pytest.skip("onnxruntime before 1.30 rounds the quotient of float16 to float16 before it makes a code of it")

    @deterministic
    @given(cases(name, real, layout))
    def check(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        values, scale, zero = case
        codes = quantize(values, scale, zero, FORMATS[name], axis=axis, block_size=block_size)
        assert_same_bits(codes, run("QuantizeLinear", name, real, layout, values, scale, zero))
        back = dequantize(codes, scale, zero, axis=axis, block_size=block_size, dtype=FLOATS[real])
        assert_same_bits(back, run("DequantizeLinear", name, real, layout, codes, scale, zero))
        together = fake_quantize(values, scale, zero, FORMATS[name], axis=axis, block_size=block_size)
        assert_same_bits(together, back)

    check()


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_fp8_equals_onnxruntime_on_every_float16(name: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    one, zero = np.ones((), np.float32), np.zeros((), FORMATS[name].numpy_dtype)
    values = every.astype(np.float32)
    assert_same_bits(
        quantize(values, one, zero, FORMATS[name]), run("QuantizeLinear", name, "float", "tensor", values, one, zero)
    )


@pytest.mark.parametrize("name", NARROW)
@deterministic
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30))
def test_narrow_widths_equal_clip_and_an_8_bit_kernel(name: str, seed: int, exponent: int) -> None:
    number_format, generator = FORMATS[name], np.random.default_rng(seed)
    scale = np.array(10.0**exponent * generator.uniform(0.1, 1), np.float32)
    zero = generator.integers(int(number_format.low), int(number_format.high) + 1)
    low, high = (np.array((code - zero) * scale, np.float32) for code in (number_format.low, number_format.high))
    steps = np.rint(generator.uniform(-3, 3, 100) * number_format.high * 2) / 2
    steps = np.concatenate([steps, [math.inf, -math.inf, -0.0], generator.uniform(-1, 1, 50) * number_format.high])
    values = (steps * scale.astype(np.float64)).astype(np.float32)
    feeds = {"x": values, "low": low, "high": high, "scale": scale, "zero": np.array(zero, np.int8)}
    theirs, real = clip_kernel().run(None, feeds)
    assert_same_bits(quantize(values, scale, zero, number_format).astype(np.int8), theirs)
    assert_same_bits(fake_quantize(values, scale, zero, number_format), real)


@functools.cache
def clip_kernel() -> onnxruntime.InferenceSession:
    return session(
        """<ir_version: 10, opset_import: ["" : 21]>
        graph (float[N] x, float low, float high, float scale, int8 zero) => (int8[N] q, float[N] y) {
            c = Clip(x, low, high)
            q = QuantizeLinear(c, scale, zero)
            y = DequantizeLinear(q, scale, zero)
        }"""
    )


def test_fp4_rounds_half_to_even_and_saturates() -> None:
    """The table of OCP Microscaling e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6. onnxruntime has no fp4 kernel on the CPU."""
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 7.0, math.inf, -0.76, -math.inf]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0, -1.0, -6.0]
    codes = quantize(np.array(values, np.float32), 1.0, None, FORMATS["fp4"])
    assert codes.dtype == ml_dtypes.float4_e2m1fn
    assert codes.astype(np.float32).tolist() == expected
    assert dequantize(codes, 0.5).tolist() == [value / 2 for value in expected]


@pytest.mark.parametrize("name", ["int8", "int16", "uint8", "uint16"])
def test_nan_and_infinities_saturate_in_vectors_and_tails(name: str) -> None:
    values = np.tile(np.array([math.nan, math.inf, -math.inf, 3e38, -3e38], np.float32), (1, 15))
    scale = np.array(1e-30, np.float32)
    zero = np.array(1, FORMATS[name].numpy_dtype)
    low, high = int(FORMATS[name].low), int(FORMATS[name].high)
    codes = quantize(values, scale, zero, FORMATS[name])
    assert codes[0, :5].tolist() == [low, high, low, high, low]
    assert_same_bits(codes, run("QuantizeLinear", name, "float", "tensor", values, scale, zero))


def test_we_saturate_where_onnxruntime_wraps_around() -> None:
    """As its kernels do from 1.32 on."""
    values, zero = np.full((2, 2), np.inf, np.float16), np.zeros((), np.int8)
    scale = np.ones((), np.float16)
    theirs = -128 if ONNXRUNTIME < (1, 32) else 127
    assert (run("QuantizeLinear", "int8", "float16", "tensor", values, scale, zero) == theirs).all()
    assert (quantize(values, scale, zero, FORMATS["int8"]) == 127).all()


real_numbers = st.floats(-1e6, 1e6, width=32)
ranges = st.tuples(real_numbers, real_numbers).map(sorted)
all_formats = st.sampled_from([number_format for name, number_format in FORMATS.items() if name != "float"])


def chosen(number_format: Any, low: Any, high: Any, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    return scale_and_zero_point(low, high, number_format, symmetric=symmetric)


@deterministic
@given(all_formats, ranges, st.lists(real_numbers, min_size=1), st.booleans())
def test_quantizing_twice_changes_nothing(number_format: Any, ends: list[float], x: list[float], even: bool) -> None:
    scale, zero = chosen(number_format, *ends, even)
    once = fake_quantize(np.array(x, np.float32), scale, zero, number_format)
    assert_same_bits(fake_quantize(once, scale, zero, number_format), once)


@deterministic
@given(all_formats, ranges, st.lists(real_numbers, min_size=2), st.booleans())
def test_quantization_keeps_order(number_format: Any, ends: list[float], x: list[float], even: bool) -> None:
    scale, zero = chosen(number_format, *ends, even)
    values = fake_quantize(np.sort(np.array(x, np.float32)), scale, zero, number_format)
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("name", INTEGERS)
@deterministic
@given(ends=ranges, shares=st.lists(st.floats(0, 1), min_size=1), even=st.booleans())
def test_error_is_at_most_half_a_step_inside_the_range(
    name: str, ends: list[float], shares: list[float], even: bool
) -> None:
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if even and not FORMATS[name].signed:
        low = max(low, -high)  # the codes reach one step further down than up
    scale, zero = chosen(FORMATS[name], low, high, even)
    values = np.array([low + share * (high - low) for share in shares], np.float32)
    error = np.abs(fake_quantize(values, scale, zero, FORMATS[name]).astype(np.float64) - values)
    # Half a step, and the rounding of value / scale and of code * scale in float32.
    assert (error <= scale / 2 + 2 * np.abs(values) * np.finfo(np.float32).eps).all()


@deterministic
@given(all_formats, ranges, st.booleans())
def test_zero_is_exact_and_the_zero_point_is_a_code(number_format: Any, ends: list[float], even: bool) -> None:
    scale, zero = chosen(number_format, *ends, even)
    assert scale.dtype == np.float32
    assert zero.dtype == number_format.numpy_dtype
    assert number_format.low <= float(zero) <= number_format.high
    assert fake_quantize(np.float32(0), scale, zero, number_format) == 0
    if even and number_format.signed:
        assert zero == 0


extremes = st.sampled_from([0.0, -0.0, 1e-45, 1e-42, 1e-38, 1e-30, 3.4e38, 1e300])


@deterministic
@given(all_formats, extremes, extremes, st.booleans())
def test_degenerate_ranges_give_normal_scales(number_format: Any, down: float, up: float, even: bool) -> None:
    scale, zero = chosen(number_format, -down, up, even)
    assert np.finfo(np.float32).tiny <= scale <= np.finfo(np.float32).max
    assert np.isfinite(1 / scale)
    assert number_format.low <= float(zero) <= number_format.high


def test_scales_of_known_ranges() -> None:
    int8, uint8, fp8 = FORMATS["int8"], FORMATS["uint8"], FORMATS["fp8"]
    scale, zero = chosen(int8, [-1.27, 0.0], [0.5, 0.0], True)
    assert scale.tolist() == [np.float32(0.01), 1.0]
    assert zero.tolist() == [0, 0]
    scale, zero = chosen(uint8, [-1.0, 1.0], [1.55, 5.1], False)
    assert scale.tolist() == [np.float32(0.01), np.float32(0.02)]
    assert zero.tolist() == [100, 0]
    scale, zero = chosen(uint8, -1.27, 0.0, True)
    assert (scale, zero) == (np.float32(0.01), 128)
    scale, zero = chosen(fp8, -448.0, 2.0, False)
    assert (scale, zero) == (1.0, 0)
    with pytest.raises(OnnxqError, match="finite"):
        chosen(int8, [0.0, math.nan], [1.0, 1.0], True)


@deterministic
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40), all_formats)
def test_one_block_per_row_is_one_scale_per_row(seed: int, rows: int, columns: int, number_format: Any) -> None:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, columns), np.float32)
    scale, zero = chosen(number_format, values.min(axis=1), values.max(axis=1), False)
    by_row = quantize(values, scale, zero, number_format, axis=0)
    for block_size in (columns, columns + 3):
        blocks = {"axis": 1, "block_size": block_size}
        by_block = quantize(values, scale[:, None], zero[:, None], number_format, **blocks)
        assert_same_bits(by_block, by_row)
        assert_same_bits(
            dequantize(by_block, scale[:, None], zero[:, None], **blocks), dequantize(by_row, scale, zero, axis=0)
        )


@pytest.mark.parametrize("shape", [(3, 50_000), (1, 2, 70_000), (200_000,), (70_000, 3), (2, 40_000, 2, 2), (0, 3), ()])
@pytest.mark.parametrize("axis", [None, -1, 0])
def test_tiles_cover_every_element(shape: tuple[int, ...], axis: int | None) -> None:
    generator = np.random.default_rng(0)
    values = np.asarray(generator.standard_normal(shape), np.float32)
    axis = axis if shape else None
    count = () if axis is None else shape[axis]
    scale = np.asarray(generator.uniform(0.01, 0.1, count), np.float32)
    zero = np.asarray(generator.integers(-9, 9, count), np.int8)
    tail = (1,) * (len(shape) - 1) if axis == 0 else ()
    wide_scale, wide_zero = scale.reshape(scale.shape + tail), zero.reshape(zero.shape + tail)
    expected = np.asarray(np.clip(np.rint(values / wide_scale) + wide_zero, -128, 127)).astype(np.int8)
    codes = quantize(values, scale, zero, FORMATS["int8"], axis=axis)
    assert_same_bits(codes, expected)
    back = (codes.astype(np.float32) - wide_zero) * wide_scale
    assert_same_bits(dequantize(codes, scale, zero, axis=axis), np.asarray(back, np.float32))


def test_strided_values_are_read_in_place() -> None:
    values = np.random.default_rng(0).standard_normal((40, 60), np.float32)
    scale = np.linspace(0.01, 0.1, 60, dtype=np.float32)
    expected = quantize(np.ascontiguousarray(values.T), scale, 0, FORMATS["int8"], axis=0)
    assert_same_bits(quantize(values.T, scale, 0, FORMATS["int8"], axis=0), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_fake_quantize_keeps_the_data_type(dtype: Any) -> None:
    values = np.array([0.3, -0.7, 5.0], dtype)
    assert fake_quantize(values, np.float32(0.1), 0, FORMATS["int4"]).dtype == dtype


def test_float_leaves_values_alone() -> None:
    values, number_format = np.array([1.1, math.nan], np.float32), FORMATS["float"]
    scale, zero = chosen(number_format, -1.0, 2.0, True)
    assert fake_quantize(values, scale, zero, number_format) is values
    assert dequantize(quantize(values, scale, zero, number_format), scale, zero, number_format) is values


def test_formats_fit_their_containers() -> None:
    for name, number_format in FORMATS.items():
        assert number_format.name == name
        assert number_format.is_passthrough == (name == "float")
        assert number_format.fills_container == (name not in NARROW)
        assert number_format.signed == (not name.startswith("u"))
        if not number_format.is_passthrough:
            assert number_format.bits <= number_format.storage.bitwidth
            assert float(np.array(number_format.high).astype(number_format.numpy_dtype)) == number_format.high


def test_formats_are_read_as_users_spell_them() -> None:
    assert parse_format("int8") == (FORMATS["int8"], None)
    assert parse_format(" INT4:128 ") == (FORMATS["int4"], 128)


@pytest.mark.parametrize("text", ["int9", "", "int4:", "int4:0", "int4:-1", "int4:x", "float:32", "int4:128:2"])
def test_unknown_formats_are_explained(text: str) -> None:
    with pytest.raises(OnnxqError, match="expected") as raised:
        parse_format(text)
    assert "int4:128" in raised.value.hint


@pytest.mark.parametrize(
    ("scale_shape", "axis", "block_size"),
    [((3,), None, None), ((3,), 1, None), ((3,), 2, None), ((3, 3), 1, 3), ((3, 1), 0, None), ((3, 4), 1, 0)],
)
def test_scales_that_do_not_fit_are_explained(
    scale_shape: tuple[int, ...], axis: int | None, block_size: int | None
) -> None:
    with pytest.raises(OnnxqError, match="expected"):
        quantize(np.ones((3, 4)), np.ones(scale_shape), 0, FORMATS["int8"], axis=axis, block_size=block_size)


def test_a_large_weight_takes_milliseconds_and_no_second_copy() -> None:
    values = np.ones((1000, 1000, 3, 3), np.float32)
    scale = np.full(1000, 0.01, np.float32)
    tracemalloc.start()
    started = time.perf_counter()
    codes = quantize(values, scale, 0, FORMATS["int8"], axis=0)
    seconds, (_, peak_bytes) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < codes.nbytes + (1 << 20)
    assert seconds < 1  # about 0.02 on an idle core; the bound only catches a fall back to element-wise Python
