"""Models of one op of onnxruntime's own each, in the forms that its optimizers write."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]
BATCH, TOKENS, HEADS, SIZE, EARLIER = 2, 5, 4, 16, 3
WIDTH = HEADS * SIZE


@dataclass(frozen=True)
class Fused:
    """One node: its inputs in order, where names that start with ``w_`` are initializers and ``""`` is left out."""

    op_type: str
    inputs: Mapping[str, Array | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    named: str = ""
    domain: str = "com.microsoft"

    @property
    def name(self) -> str:
        return f"{self.op_type}_{self.named}" if self.named else self.op_type

    def feeds(self) -> dict[str, Array]:
        """Inputs that are no initializers."""
        return {name: a for name, a in self.inputs.items() if a is not None and not name.startswith("w_")}

    def model(self, read: Collection[int] | None = None) -> ir.Model:
        """The model; of the outputs, those numbered in ``read`` are its own (all)."""
        values = {name: self._value(name, a) for name, a in self.inputs.items() if a is not None}
        read = range(self.outputs) if read is None else read
        results = [ir.Value(name=f"y{index}" if index in read else "") for index in range(self.outputs)]
        node = ir.node(
            self.op_type, [values.get(name) for name in self.inputs], self.attributes, domain=self.domain,
            outputs=results, name="fused",
        )  # fmt: skip
        graph = ir.Graph(
            [value for value in values.values() if value.const_value is None],
            [result for result in results if result.name],
            nodes=[node],
            initializers=[value for value in values.values() if value.const_value is not None],
            opset_imports={"": 21, "com.microsoft": 1},
            name="fused",
        )
        return ir.Model(graph, ir_version=10)

    @staticmethod
    def _value(name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        if name.startswith("w_"):
            value.const_value = tensor
        return value


_random = np.random.default_rng(0)


def _float(*shape: int) -> Array:
    return _random.normal(size=shape).astype(np.float32)


X, SCALE, BIAS = _float(BATCH, TOKENS, WIDTH), _float(WIDTH), _float(WIDTH)
PADDED = np.asarray([[1] * 5, [1, 1, 1, 0, 0]], np.int32)
QKV = {"q": X, "k": _float(BATCH, TOKENS, WIDTH), "v": _float(BATCH, TOKENS, WIDTH)}
PAST = {"past_k": _float(BATCH, HEADS, EARLIER, SIZE), "past_v": _float(BATCH, HEADS, EARLIER, SIZE)}
NO_MASKS = {"w_no_bias": None, "no_mask": None, "no_added": None}
ANGLES = _float(16, SIZE // 2)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
TOTAL = np.asarray(TOKENS + EARLIER, np.int32)
SHARED = 2
GROUPED = {
    "q": _float(1, TOKENS, WIDTH), "k": _float(1, TOKENS, SHARED * SIZE), "v": _float(1, TOKENS, SHARED * SIZE),
    "past_k": _float(1, SHARED, EARLIER, SIZE), "past_v": _float(1, SHARED, EARLIER, SIZE),
    "lengths": np.full(1, TOKENS + EARLIER - 1, np.int32), "total": TOTAL,
}  # fmt: skip
GROUPS = {"num_heads": HEADS, "kv_num_heads": SHARED}
TABLES = {"w_cos": COS, "w_sin": SIN}
PACKED = GROUPED | {"q": _float(1, TOKENS, (HEADS + 2 * SHARED) * SIZE), "k": None, "v": None}
NO_PAST = np.zeros((BATCH, SHARED, 0, SIZE), np.float32)
PROMPT = {
    "q": X, "k": _float(BATCH, TOKENS, SHARED * SIZE), "v": _float(BATCH, TOKENS, SHARED * SIZE), "past_k": NO_PAST,
    "past_v": NO_PAST, "lengths": np.full(BATCH, TOKENS - 1, np.int32), "total": np.asarray(TOKENS, np.int32),
}  # fmt: skip
STEP = {
    "q": _float(BATCH, 1, WIDTH), "k": _float(BATCH, 1, SHARED * SIZE), "v": _float(BATCH, 1, SHARED * SIZE),
    "past_k": _float(BATCH, SHARED, EARLIER, SIZE), "past_v": _float(BATCH, SHARED, EARLIER, SIZE),
    "lengths": np.full((BATCH, 1), EARLIER, np.int32), "total": np.asarray(EARLIER + 1, np.int32),
}  # fmt: skip
IDS = _random.integers(0, 20, (BATCH, TOKENS)).astype(np.int32)
EMBEDDED = {
    "ids": IDS, "segments": (IDS > 9).astype(np.int32), "w_words": _float(20, WIDTH), "w_positions": _float(12, WIDTH),
    "w_kinds": _float(2, WIDTH), "w_scale": SCALE, "w_bias": BIAS,
}  # fmt: skip
PROJECTED = {"x": X, "w_qkv": _float(WIDTH, 3 * WIDTH) / 4, "w_b": _float(3 * WIDTH)}
MAP = _float(2, 3, 8, 8)
KERNEL = {"x": MAP, "w_kernel": _float(4, 3, 3, 3), "w_kernel_bias": _float(4)}
FUSED = [
    Fused("Gelu", {"x": X}),
    Fused("FastGelu", {"x": X, "w_bias": BIAS}),
    Fused("FastGelu", {"x": X}, named="alone"),
    Fused("BiasGelu", {"x": X, "w_bias": BIAS}),
    Fused("QuickGelu", {"x": X}, {"alpha": 1.5}),
    Fused("SkipLayerNormalization", {"x": X, "skip": X[::-1].copy(), "w_s": SCALE, "w_b": BIAS}, {"epsilon": 1e-3}),
    Fused(
        "SkipLayerNormalization", {"x": X, "skip": X[0], "w_s": SCALE, "w_b": None, "w_sum": _float(WIDTH)}, {}, 4,
        "sum",
    ),
    Fused("SkipSimplifiedLayerNormalization", {"x": X, "skip": X[::-1].copy(), "w_s": SCALE}, {"epsilon": 1e-5}, 4),
    Fused("SimplifiedLayerNormalization", {"x": X, "w_s": SCALE}, {"axis": -1, "epsilon": 1e-2}, domain=""),
    Fused("EmbedLayerNormalization", EMBEDDED | {"mask": PADDED}, {"epsilon": 1e-5}, 3),
    Fused(
        "EmbedLayerNormalization",
        EMBEDDED | {"segments": None, "w_kinds": None, "mask": PADDED, "places": IDS % 12}, {"epsilon": 1e-5}, 2,
        "places",
    ),
    Fused("FusedMatMul", {"a": X, "b": _float(BATCH, TOKENS, WIDTH)}, {"transB": 1, "alpha": 0.25}),
    Fused("FusedMatMul", {"a": X, "w_b": _float(TOKENS, 7)}, {"transA": 1}, named="transA"),
    Fused("FusedConv", KERNEL, {"activation": "Relu", "strides": [2, 2]}),
    Fused("FusedConv", KERNEL | {"z": _float(2, 4, 6, 6)}, {"activation": "Relu"}, named="sum"),
    Fused("FusedConv", KERNEL, {"activation": "Clip", "activation_params": [0.0, 6.0]}, named="clip"),
    Fused("FusedConv", KERNEL, {"activation": "HardSigmoid", "activation_params": [0.1, 0.4]}, named="sigmoid"),
    Fused(
        "FusedGemm", {"x": X[0], "w": _float(6, WIDTH), "w_c": _float(6)},
        {"transB": 1, "activation": "LeakyRelu", "activation_alpha": 0.3},
    ),
    Fused("Attention", PROJECTED, {"num_heads": HEADS}),
    Fused("Attention", PROJECTED | {"mask": PADDED}, {"num_heads": HEADS}, named="mask"),
    Fused(
        "Attention", PROJECTED | {"mask": None, "past": _float(2, BATCH, HEADS, EARLIER, SIZE)},
        {"num_heads": HEADS, "unidirectional": 1}, 2, "cache",
    ),
    Fused(
        "Attention", {"x": X, "w_qkv": _float(WIDTH, 2 * WIDTH + 16) / 4, "w_b": _float(2 * WIDTH + 16)},
        {"num_heads": HEADS, "qkv_hidden_sizes": [WIDTH, WIDTH, 16], "scale": 0.2}, named="sizes",
    ),
    Fused("MultiHeadAttention", QKV, {"num_heads": HEADS}),
    Fused("MultiHeadAttention", QKV | {"w_b": _float(3 * WIDTH), "mask": PADDED}, {"num_heads": HEADS}, named="mask"),
    Fused(
        "MultiHeadAttention", QKV | {"no_bias": None, "lengths": np.asarray([5, 2], np.int32)}, {"num_heads": HEADS},
        named="lengths",
    ),
    Fused(
        "MultiHeadAttention",
        QKV | {"no_bias": None, "no_mask": None, "added": _float(1, HEADS, TOKENS, TOKENS)},
        {"num_heads": HEADS, "scale": 0.3}, named="added",
    ),
    Fused(
        "MultiHeadAttention", QKV | NO_MASKS | PAST, {"num_heads": HEADS, "unidirectional": 1}, 3, "cache",
    ),
    Fused(
        "MultiHeadAttention", {"q": X, "k": _float(BATCH, HEADS, 7, SIZE), "v": _float(BATCH, HEADS, 7, SIZE)},
        {"num_heads": HEADS}, named="crossed",
    ),
    Fused("GroupQueryAttention", GROUPED, GROUPS, 3),
    Fused("GroupQueryAttention", GROUPED | TABLES, GROUPS | {"do_rotary": 1}, 3, "rotary"),
    Fused(
        "GroupQueryAttention", GROUPED | TABLES, GROUPS | {"do_rotary": 1, "rotary_interleaved": 1}, 3, "interleaved",
    ),
    Fused("GroupQueryAttention", PACKED | TABLES, GROUPS | {"do_rotary": 1}, 3, "packed"),
    Fused("GroupQueryAttention", PROMPT, GROUPS | {"local_window_size": 2, "scale": 0.2}, 3, "window"),
    Fused("GroupQueryAttention", GROUPED, GROUPS | {"softcap": 2.0}, 3, "softcap"),
    Fused("GroupQueryAttention", STEP | TABLES, GROUPS | {"do_rotary": 1, "local_window_size": 3}, 3, "step"),
    Fused(
        "RotaryEmbedding", {"x": X, "places": np.asarray([2], np.int64)} | TABLES, {"num_heads": HEADS},
    ),
    Fused(
        "RotaryEmbedding", {"x": _float(BATCH, HEADS, TOKENS, SIZE), "places": IDS.astype(np.int64) % 16} | TABLES,
        {"interleaved": 1}, named="heads",
    ),
    Fused(
        "RotaryEmbedding",
        {"x": X, "places": IDS.astype(np.int64) % 16, "w_cos": COS[:, :2].copy(), "w_sin": SIN[:, :2].copy()},
        {"num_heads": HEADS, "rotary_embedding_dim": 4}, named="partly",
    ),
]  # fmt: skip
