"""Small graphs for the lint tests: ONNX text whose large constants are given as arrays."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

GENERATOR = np.random.default_rng(0)

# Every graph may name these; what it does not use is dropped.
ARRAYS = {
    "w": GENERATOR.integers(-127, 127, (32, 32, 3, 3)).astype(np.int8),
    "w_float": GENERATOR.normal(size=(32, 32, 3, 3)).astype(np.float32),
    "w_scale": np.linspace(0.002, 0.05, 32).astype(np.float32),
    "w_zero": np.zeros(32, np.int8),
    "m": GENERATOR.integers(-127, 127, (32, 48)).astype(np.int8),
    "m_turned": GENERATOR.integers(-127, 127, (48, 32)).astype(np.int8),
    "m_scale": np.linspace(0.002, 0.05, 48).astype(np.float32),
    "m_zero": np.zeros(48, np.int8),
    "s": np.float32(0.05),
    "t": np.float32(0.06),
    "s1": np.full(1, 0.05, np.float32),
    "z": np.int8(0),
    "u": np.uint8(128),
    "u0": np.uint8(0),
    "f8": np.zeros((), ml_dtypes.float8_e4m3fn),
    "w_fp8": GENERATOR.normal(size=(32, 32, 3, 3)).astype(ml_dtypes.float8_e4m3fn),
    "one": np.float32(1),
}

TYPES = {
    "float32": "float",
    "float8_e4m3fn": "float8e4m3fn",
    "float8_e5m2": "float8e5m2",
    "float4_e2m1fn": "float4e2m1",
}

IMAGE = ("float[1,32,8,8] x", "float[1,32,A,B] y")
MATRIX = ("float[64,32] x", "float[64,48] y")


def build(body: str, interface: tuple[str, str] = IMAGE, opset: int = 23, **arrays: object) -> ir.Model:
    """A model of ``body``, which may name every array of ``ARRAYS`` and those given."""
    constants = {name: np.asarray(array) for name, array in (ARRAYS | arrays).items()}
    inputs = [interface[0]]
    for name, array in constants.items():
        sizes = f"[{','.join(map(str, array.shape))}]" if array.ndim else ""
        inputs.append(f"{TYPES.get(array.dtype.name, array.dtype.name)}{sizes} {name}")
    head = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    model = ir.from_onnx_text(f"{head} g ({', '.join(inputs)}) => ({interface[1]}) {{ {body} }}")
    for value in list(model.graph.inputs):
        if value.name in constants:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(constants[value.name], dtype=value.dtype, name=value.name)
            model.graph.register_initializer(value)
    common_passes.RemoveUnusedNodesPass()(model)
    return model


def pair(value: str, result: str, scale: str = "s", zero: str = "z", attributes: str = "") -> str:
    """A Q/DQ pair on ``value``, as text."""
    return (
        f"[{result}_Q] {result}_codes = QuantizeLinear{attributes}({value}, {scale}, {zero}) "
        f"[{result}_DQ] {result} = DequantizeLinear{attributes}({result}_codes, {scale}, {zero})"
    )


def small_network() -> ir.Model:
    """A float network with a residual block, a pooling, a Concat and a classifier."""
    body = """
        c1 = Conv<pads = [1, 1, 1, 1]>(x, w_float) r1 = Relu(c1)
        c2 = Conv<pads = [1, 1, 1, 1]>(r1, w_float) a = Add(c2, r1) r2 = Relu(a)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r2)
        k = Concat<axis = 1>(p, p) c3 = Conv(k, w_wide) g = GlobalAveragePool(c3)
        f = Flatten(g) y = Gemm<transB = 1>(f, w_class, b_class)
    """
    return build(
        body,
        (IMAGE[0], "float[1,24] y"),
        21,
        w_wide=GENERATOR.normal(size=(32, 64, 1, 1)).astype(np.float32),
        w_class=GENERATOR.normal(size=(24, 32)).astype(np.float32),
        b_class=GENERATOR.normal(size=24).astype(np.float32),
    )
