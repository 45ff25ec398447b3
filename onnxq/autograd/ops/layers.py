"""Convolutions, matrix products and normalisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxq.autograd.ops.windows import pad_ends, pads_of

DIRECT: dict[str, Callable[..., Any]] = {"MatMul": torch.matmul}

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def Conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution of one to three spatial axes."""
    axes = x.ndim - 2
    ones = (1,) * axes
    strides, dilations = strides or ones, dilations or ones
    before, after = pads_of(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    if before != after or min(before) < 0:
        x, before = pad_ends(x, before, after), [0] * axes
    return _CONVOLUTIONS[axes - 1](x, weight, bias, strides, before, dilations, group)


def ConvTranspose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The transposed convolution."""
    axes = x.ndim - 2
    ones, none = (1,) * axes, (0,) * axes
    strides, dilations, extra = strides or ones, dilations or ones, output_padding or none
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if output_shape is not None:
        before, after = [], []
        for axis, size in enumerate(output_shape[-axes:]):
            reach = (weight.shape[2 + axis] - 1) * dilations[axis] + 1
            total = strides[axis] * (x.shape[2 + axis] - 1) + extra[axis] + reach - size
            before.append(total // 2 if auto_pad == "SAME_UPPER" else total - total // 2)
            after.append(total - before[-1])
    else:
        before, after = (list(none), list(none)) if pads is None else (list(pads[:axes]), list(pads[axes:]))
    convolve = _TRANSPOSED[axes - 1]
    if before == after and min(before) >= 0:
        return convolve(x, weight, bias, strides, before, extra, group, dilations)
    whole = convolve(x, weight, bias, strides, none, extra, group, dilations)
    return pad_ends(whole, [-pad for pad in before], [-pad for pad in after])


def DeformConv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution whose taps are moved by ``offset`` and weighted by ``mask``, over images."""
    if x.ndim != 4:
        raise NotImplementedError(f"DeformConv of {x.ndim - 2} spatial axes")
    batch, channels, height, width = x.shape
    rows, columns = weight.shape[2:]
    stride, dilation, pad = strides or (1, 1), dilations or (1, 1), pads or (0, 0, 0, 0)
    out_height, out_width = offset.shape[2:]
    moves = offset.reshape(batch, offset_group, rows, columns, 2, out_height, out_width)

    def places(count: int, step: int, first: int, taps: int, spread: int) -> tuple[Tensor, Tensor]:
        return (
            torch.arange(count, device=x.device, dtype=x.dtype) * step - first,
            torch.arange(taps, device=x.device, dtype=x.dtype) * spread,
        )

    top, down = places(out_height, stride[0], pad[0], rows, dilation[0])
    left, right = places(out_width, stride[1], pad[1], columns, dilation[1])
    y = moves[:, :, :, :, 0] + down[:, None, None, None] + top[:, None]
    z = moves[:, :, :, :, 1] + right[:, None, None] + left
    grid = torch.stack([(2 * z + 1) / width - 1, (2 * y + 1) / height - 1], -1).flatten(0, 1)
    taps = F.grid_sample(
        x.reshape(batch * offset_group, channels // offset_group, height, width),
        grid.reshape(batch * offset_group, rows * columns * out_height, out_width, 2),
        align_corners=False,
    ).reshape(batch, offset_group, channels // offset_group, rows * columns, out_height, out_width)
    if mask is not None:
        taps = taps * mask.reshape(batch, offset_group, 1, rows * columns, out_height, out_width)
    columns_of = taps.reshape(batch, group, -1, out_height * out_width)
    result = torch.einsum("goc,bgcp->bgop", weight.reshape(group, weight.shape[0] // group, -1), columns_of)
    result = result.reshape(batch, weight.shape[0], out_height, out_width)
    return result if bias is None else result + bias[:, None, None]


def Gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """``alpha * a @ b + beta * c``."""
    a, b = a.mT if transA else a, b.mT if transB else b
    if c is not None and a.is_floating_point():
        if alpha == 1.0 and beta == 1.0 and c.ndim == 1:
            return F.linear(a, b.mT, c)
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    product = a @ b if alpha == 1.0 else (a @ b) * alpha
    return product if c is None else product + (c if beta == 1.0 else c * beta)


def Einsum(*xs: Tensor, equation: str) -> Tensor:
    """A sum over products, in Einstein's notation."""
    return torch.einsum(equation, *xs)


def BatchNormalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """A normalisation by stored statistics, or in training by those of the batch."""
    if training_mode:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        batch_mean, batch_variance = x.mean(axes), x.var(axes, correction=0)
        return (
            F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon),
            mean * momentum + batch_mean * (1 - momentum),
            variance * momentum + batch_variance * (1 - momentum),
        )
    if mean.requires_grad or variance.requires_grad:  # torch's own gives no gradient to statistics
        factor = scale / torch.sqrt(variance + epsilon)
        shape = (-1, *[1] * (x.ndim - 2))
        return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


def InstanceNormalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """A normalisation of each channel of each sample."""
    return torch.instance_norm(x, scale, bias, None, None, True, 0.0, epsilon, False)


def GroupNormalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """A normalisation of groups of channels; opset 18 had one scale for each group."""
    channels = x.shape[1]
    if scale.shape[0] != channels:
        scale, bias = (part.repeat_interleave(channels // num_groups) for part in (scale, bias))
    # Of channels that lie last torch asks how they lie, which it cannot for batches of a fixed batch.
    return F.group_norm(x.contiguous(), num_groups, scale, bias, epsilon)


def LayerNormalization(
    x: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """A normalisation of everything from ``axis`` on; also the mean and the inverse deviation if asked."""
    shape = x.shape[axis:]
    fused = all(part is None or part.shape == shape for part in (scale, bias))
    result, mean, inverse = torch.native_layer_norm(
        x, shape, scale if fused else None, bias if fused else None, epsilon
    )
    if not fused:
        result = result if scale is None else result * scale
        result = result if bias is None else result + bias
    return result if outputs == 1 else (result, mean, inverse)


def RMSNormalization(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """A division by the root mean square of everything from ``axis`` on."""
    shape = x.shape[axis:]
    if scale.shape == shape:
        return F.rms_norm(x, shape, scale, epsilon)
    return F.rms_norm(x, shape, None, epsilon) * scale


def LRN(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """A normalisation by neighbouring channels."""
    channels = x.shape[1]
    squares = x.square().reshape(x.shape[0], 1, channels, -1)
    padded = F.pad(squares, (0, 0, (size - 1) // 2, size // 2))
    total = F.avg_pool2d(padded, (size, 1), stride=1) * size
    return x / (bias + alpha / size * total.reshape(x.shape)) ** beta


def GridSample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """Values at places between the pixels."""
    modes = {"linear": "bilinear", "cubic": "bicubic"}
    return F.grid_sample(
        x, grid, mode=modes.get(mode, mode), padding_mode=padding_mode, align_corners=bool(align_corners)
    )


def AffineGrid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    """The places of pixels after an affine map."""
    return F.affine_grid(theta, size.tolist(), align_corners=bool(align_corners))


def GlobalAveragePool(x: Tensor) -> Tensor:
    """The mean of each channel."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def GlobalMaxPool(x: Tensor) -> Tensor:
    """The largest value of each channel."""
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def GlobalLpPool(x: Tensor, *, p: int = 2) -> Tensor:
    """The norm of each channel."""
    return x.abs().pow(p).sum(tuple(range(2, x.ndim)), keepdim=True).pow(1 / p)
