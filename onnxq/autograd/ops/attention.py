"""Attention and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxq.autograd.ops.operands import torch_type

DIRECT: dict[str, Callable[..., Any]] = {}


def Attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Scaled dot-product attention with grouped heads, masks and a cache of earlier keys and values.

    Heads are an axis of their own, or the last axis holds all of them. A query that may look nowhere gives zero.
    """
    flat = query.ndim == 3
    if flat:
        if q_num_heads is None or kv_num_heads is None:
            raise ValueError("Attention over three axes needs q_num_heads and kv_num_heads")
        query = _apart(query, q_num_heads)
        key, value = _apart(key, kv_num_heads), _apart(value, kv_num_heads)
    earlier = 0
    if past_key is not None and past_value is not None:
        earlier = past_key.shape[2]
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    windowed = left_window_size >= 0 or right_window_size >= 0
    grouped = query.shape[1] != key.shape[1]
    fused = not softcap and outputs < 4 and softmax_precision is None and nonpad_kv_seqlen is None and not windowed
    if fused and attn_mask is None and (not is_causal or not earlier):
        result = F.scaled_dot_product_attention(
            query, key, value, is_causal=bool(is_causal), scale=scale, enable_gqa=grouped
        )
        product = None
    else:
        bias = _bias(query, key, attn_mask, nonpad_kv_seqlen, earlier, is_causal, left_window_size, right_window_size)
        if grouped:
            repeats = query.shape[1] // key.shape[1]
            keys, values = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        else:
            keys, values = key, value
        root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        stages = [(query * root) @ (keys * root).mT]
        stages.append(torch.tanh(stages[0] / softcap) * softcap if softcap else stages[0])
        stages.append(stages[1] if bias is None else stages[1] + bias)
        logits = stages[2] if softmax_precision is None else stages[2].to(torch_type(softmax_precision))
        weights = logits.softmax(-1)
        if bias is not None:
            weights = torch.where((bias == -math.inf).all(-1, keepdim=True), 0, weights)
        stages.append(weights.to(query.dtype))
        result = stages[3] @ values
        product = stages[qk_matmul_output_mode]
    if flat:
        result = result.transpose(1, 2).flatten(2)
    if outputs == 1:
        return result
    everything = (result, key, value) if product is None else (result, key, value, product)
    return everything


def _apart(x: Tensor, heads: int) -> Tensor:
    """Heads as an axis of their own, before the positions."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _bias(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    earlier: int,
    is_causal: int,
    left: int,
    right: int,
) -> Tensor | None:
    """What is added to the logits: the mask, and minus infinity where a query must not look."""
    rows, columns = query.shape[2], key.shape[2]
    nowhere = torch.full((), -math.inf, dtype=query.dtype, device=query.device)
    bias = None
    if mask is not None:
        mask = torch.where(mask, 0, nowhere) if mask.dtype == torch.bool else mask
        short = columns - mask.shape[-1]
        bias = F.pad(mask, (0, short), value=-math.inf) if short > 0 else mask
    allowed = []
    places = torch.arange(columns, device=query.device)
    offset: Tensor | int = earlier
    if lengths is not None:
        lengths = lengths.to(query.device).reshape(-1, 1, 1, 1)
        offset = lengths - rows
        allowed.append(places < lengths)
    distance = torch.arange(rows, device=query.device)[:, None] + offset - places
    if is_causal:
        allowed.append(distance >= 0)
    if left >= 0:
        allowed.append(distance <= left)
    if right >= 0:
        allowed.append(-distance <= right)
    for where in allowed:
        bias = torch.where(where, 0 if bias is None else bias, nowhere)
    return bias


def RotaryEmbedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Pairs of features turned by an angle that depends on the position."""
    shape = x.shape
    heads = x.transpose(1, 2) if x.ndim == 4 else _apart(x, num_heads or 1).transpose(1, 2)
    size = rotary_embedding_dim or heads.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    if position_ids is not None:
        places = position_ids.to(x.device)
        cos_cache, sin_cache = cos_cache[places], sin_cache[places]
    cosine, sine = cos_cache.unsqueeze(2), sin_cache.unsqueeze(2)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (cosine * first - sine * second, sine * first + cosine * second)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    result = torch.cat([turned, rest], -1) if rest.shape[-1] else turned
    return result.transpose(1, 2) if x.ndim == 4 else result.reshape(shape)
