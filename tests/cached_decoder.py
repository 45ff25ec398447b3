"""A small llama-style decoder that reads and returns its cache of keys and values, as exports of chat models do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

LAYER_NAMES = ("q", "k", "v", "o", "gate", "up", "down")


class _RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class _Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, shared_heads: int) -> None:
        super().__init__()
        self.heads, self.shared_heads, self.size = heads, shared_heads, width // heads
        self.attention_norm, self.feed_norm = _RootMeanSquare(width), _RootMeanSquare(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, shared_heads * self.size, bias=False)
        self.v = nn.Linear(width, shared_heads * self.size, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], bias: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.attention_norm(x)
        batch, length, _ = x.shape
        query = _turned(self.q(normed).view(batch, length, self.heads, self.size).transpose(1, 2), turn)
        new_key = _turned(self.k(normed).view(batch, length, self.shared_heads, self.size).transpose(1, 2), turn)
        new_value = self.v(normed).view(batch, length, self.shared_heads, self.size).transpose(1, 2)
        key, value = torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)
        times = self.heads // self.shared_heads
        scores = query @ key.repeat_interleave(times, 1).transpose(2, 3) / self.size**0.5 + bias
        mixed = scores.softmax(-1) @ value.repeat_interleave(times, 1)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, -1))
        normed = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed)), key, value


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of neighbouring pairs."""
    cosine, sine = turn
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)


class CachedDecoder(nn.Module):
    """Tokens, mask, positions and the cache to logits and the longer cache."""

    def __init__(
        self,
        vocabulary: int = 300,
        width: int = 32,
        hidden: int = 48,
        heads: int = 4,
        shared_heads: int = 2,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Layer(width, hidden, heads, shared_heads) for _ in range(layers))
        self.norm = _RootMeanSquare(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        size = width // heads
        self.register_buffer("rates", 10000.0 ** (-torch.arange(0, size, 2).float() / size))

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        angles = positions[:, None, :, None].float() * self.rates
        turn = angles.cos(), angles.sin()
        ahead = torch.arange(mask.shape[1])[None, None, None, :] > positions[:, None, :, None]
        bias = -1e9 * (ahead | (mask[:, None, None, :] == 0)).float()
        x, present = self.tokens(tokens), []
        for index, layer in enumerate(self.layers):
            x, key, value = layer(x, turn, bias, cache[2 * index], cache[2 * index + 1])
            present += [key, value]
        return (self.head(self.norm(x)), *present)


def export(module: CachedDecoder, path: Path) -> Path:
    """Write it with the names and free axes that are usual: past_key_values.0.key … to present.0.key …"""
    kinds = [f"{index}.{kind}" for index in range(len(module.layers)) for kind in ("key", "value")]
    past, present = [f"past_key_values.{kind}" for kind in kinds], [f"present.{kind}" for kind in kinds]
    layer = module.layers[0]
    cache = [torch.randn(2, layer.shared_heads, 3, layer.size) for _ in kinds]
    inputs = (torch.ones(2, 4, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), torch.arange(3, 7).repeat(2, 1))
    names = ["input_ids", "attention_mask", "position_ids"]
    axes = {
        "input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "past + sequence"},
        "position_ids": {0: "batch", 1: "sequence"}, "logits": {0: "batch", 1: "sequence"},
        **{name: {0: "batch", 2: "past"} for name in past}, **{name: {0: "batch", 2: "total"} for name in present},
    }  # fmt: skip
    torch.onnx.export(
        module.eval(), (*inputs, *cache), path, dynamo=False, opset_version=18, input_names=[*names, *past],
        output_names=["logits", *present], dynamic_axes=axes,
    )  # fmt: skip
    return path


def with_weights_of(path: Path) -> CachedDecoder:
    """The same network with the weights of ``stories260k.onnx``, which was exported without a cache."""
    tensors = {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
    module = CachedDecoder(512, 64, 172, 8, 4, 5)
    matrices = iter([array for array in tensors.values() if array.ndim == 2 and array.shape[0] in (64, 172)])
    _fill(module.tokens.weight, tensors["tok.weight"])
    for index, layer in enumerate(module.layers):
        _fill(layer.attention_norm.weight, tensors[f"layers.{index}.an.weight"])
        _fill(layer.feed_norm.weight, tensors[f"layers.{index}.fn.weight"])
        for name in LAYER_NAMES:
            _fill(getattr(layer, name).weight, next(matrices).T)
    _fill(module.norm.weight, tensors["norm.weight"])
    _fill(module.head.weight, next(matrices).T)
    return module


def _fill(parameter: nn.Parameter, array: np.ndarray | Sequence[float]) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(np.asarray(array)))
