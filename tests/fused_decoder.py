"""A small llama as onnxruntime-genai's builder writes it: grouped attention with a cache, norms fused with sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

FLOAT, INT64, INT32 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32
ROWS, PLACES = 2, 64


class _Writer:
    """Nodes and initializers of a graph under way."""

    def __init__(self, seed: int) -> None:
        self.tape, self.initializers = ir.tape.Tape(), list[ir.Value]()
        self._random = np.random.default_rng(seed)

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        shape = ir.Shape(array.shape)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.initializers.append(value)
        return value

    def weight(self, name: str, *shape: int) -> ir.Value:
        array = self._random.normal(size=shape) * shape[0] ** -0.5
        return self.constant(name, array.astype(np.float32))

    def scale(self, name: str, width: int) -> ir.Value:
        return self.constant(name, self._random.uniform(0.5, 1.5, width).astype(np.float32))

    def op(self, name: str, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        value = self.tape.op(op_type, inputs, attributes, domain=domain, name=name)
        value.name = f"{name}/output"
        return value

    def fused(
        self, name: str, op_type: str, inputs: Sequence[ir.Value | None], results: int, **attributes: Any
    ) -> list[ir.Value]:
        made = self.tape.op_multi_out(
            op_type, inputs, attributes, num_outputs=results, domain="com.microsoft", name=name
        )  # fmt: skip
        for index, value in enumerate(made):
            value.name = f"{name}/output_{index}"
        return list(made)


def fused_decoder(
    *, layers: int = 2, width: int = 64, heads: int = 4, shared_heads: int = 2, words: int = 128, seed: int = 0
) -> ir.Model:
    """A decoder with random weights: tokens, a mask and a cache to logits and the cache after them."""
    size, hidden, write = width // heads, 2 * width, _Writer(seed)
    batch, tokens = ir.SymbolicDim("batch"), ir.SymbolicDim("tokens")
    ids = _input("input_ids", INT64, [batch, tokens])
    mask = _input("attention_mask", INT64, [batch, ir.SymbolicDim("total")])
    counts = write.op("counts", "ReduceSum", mask, write.constant("one_axis", np.asarray([1])), keepdims=0)
    last = write.op("last", "Sub", counts, write.constant("one", np.asarray([1])))
    lengths = write.op("lengths", "Cast", last, to=INT32)
    total = write.op("total", "Gather", write.op("size", "Shape", mask), write.constant("second", np.asarray(1)))
    total = write.op("total_int32", "Cast", total, to=INT32)
    angles = np.arange(PLACES)[:, None] * 100.0 ** -(np.arange(size // 2) / (size // 2))
    cos, sin = (write.constant(f.__name__, f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    stream = write.op("embed", "Gather", write.weight("embed.weight", words, width), ids)
    normal = write.op(
        "first_norm", "SimplifiedLayerNormalization", stream, write.scale("first_norm.weight", width), epsilon=1e-5
    )
    inputs, presents = [ids, mask], []
    for layer in range(layers):
        stem = f"layers.{layer}"
        wide = [("q", width), ("k", shared_heads * size), ("v", shared_heads * size)]
        qkv = [
            write.op(f"{stem}.{name}", "MatMul", normal, write.weight(f"{stem}.{name}.weight", width, count))
            for name, count in wide
        ]
        past = [
            _input(f"past_key_values.{layer}.{kind}", FLOAT, [batch, shared_heads, ir.SymbolicDim("past"), size])
            for kind in ("key", "value")
        ]
        inputs += past
        mixed, *present = write.fused(
            f"{stem}.attention", "GroupQueryAttention", [*qkv, *past, lengths, total, cos, sin], 3, num_heads=heads,
            kv_num_heads=shared_heads, do_rotary=1,
        )  # fmt: skip
        for value, kind in zip(present, ("key", "value"), strict=True):
            value.name, value.type = f"present.{layer}.{kind}", ir.TensorType(FLOAT)
            value.shape = ir.Shape([batch, shared_heads, ir.SymbolicDim("total"), size])
            presents.append(value)
        projected = write.op(f"{stem}.o", "MatMul", mixed, write.weight(f"{stem}.o.weight", width, width))
        normal, _, _, stream = write.fused(
            f"{stem}.norm", "SkipSimplifiedLayerNormalization",
            [stream, projected, write.scale(f"{stem}.norm.weight", width)], 4, epsilon=1e-5,
        )  # fmt: skip
        gate, up = (
            write.op(f"{stem}.{name}", "MatMul", normal, write.weight(f"{stem}.{name}.weight", width, hidden))
            for name in ("gate", "up")
        )
        swish = write.op(f"{stem}.swish", "Mul", gate, write.op(f"{stem}.sigmoid", "Sigmoid", gate))
        down = write.op(
            f"{stem}.down", "MatMul", write.op(f"{stem}.gated", "Mul", swish, up),
            write.weight(f"{stem}.down.weight", hidden, width),
        )  # fmt: skip
        normal, _, _, stream = write.fused(
            f"{stem}.next_norm", "SkipSimplifiedLayerNormalization",
            [stream, down, write.scale(f"{stem}.next_norm.weight", width)], 4, epsilon=1e-5,
        )  # fmt: skip
    logits = write.op("head", "MatMul", normal, write.weight("head.weight", width, words))
    logits.name, logits.type = "logits", ir.TensorType(FLOAT)
    logits.shape = ir.Shape([batch, tokens, ir.SymbolicDim("words")])
    for node in write.tape.nodes:
        for value in node.outputs:
            if not value.uses() and value not in [logits, *presents]:
                value.name = ""  # results for training
    graph = ir.Graph(
        inputs, [logits, *presents], nodes=write.tape.nodes, initializers=write.initializers,
        opset_imports={"": 21, "com.microsoft": 1}, name="decoder",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def _input(name: str, dtype: ir.DataType, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
