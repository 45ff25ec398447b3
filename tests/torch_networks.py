"""Small networks with random weights, one of each family, to export."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Residual(nn.Module):
    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, wider, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
            nn.Conv2d(wider, wider, 3, 1, 1, bias=False),
            nn.BatchNorm2d(wider),
        )
        self.shortcut = nn.Conv2d(channels, wider, 1, stride) if stride > 1 or wider > channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual blocks behind a strided stem with a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(_Residual(8, 8, 1), _Residual(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class _Inverted(nn.Module):
    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1))
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = self.depthwise(self.expand(x))
        return x + self.project(wide * F.hardsigmoid(self.squeeze(wide)))


class MobileNet(nn.Module):
    """Inverted residuals with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(_Inverted(8, 16), _Inverted(8, 24))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.inward(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        return self.outward(mixed.transpose(1, 2).reshape(batch, length, width))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False, approximate: str = "none") -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, causal)
        self.wide = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.wide(self.second(x))


class ViT(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.layers = nn.Sequential(_Layer(16, 2), _Layer(16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        return self.head(self.layers(tokens)[:, 0])


def _wave(time: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(width // 2) / (width // 2))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class UNet(nn.Module):
    """A denoiser: group normalisation, attention at the bottom, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.enter, self.down = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.norm, self.middle = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, 1, 1)
        self.attention = _Attention(16, 2)
        self.up, self.leave = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.Conv2d(16, 3, 3, 1, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        embedding = self.time(_wave(time, 16))
        first = F.silu(self.enter(x))
        low = self.down(first) + embedding[:, :, None, None]
        low = low + self.middle(F.silu(self.norm(low)))
        tokens = F.avg_pool2d(low, 2).flatten(2).transpose(1, 2)
        batch, channels, height, width = low.shape
        mixed = self.attention(tokens).transpose(1, 2).reshape(batch, channels, height // 2, width // 2)
        low = low + F.interpolate(mixed, scale_factor=2.0, mode="nearest")
        return self.leave(torch.cat([F.silu(self.up(low)), first], 1))


class DiT(nn.Module):
    """A diffusion transformer: the time scales and shifts normalised tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.time = nn.Linear(48, 16), nn.Linear(16, 16)
        self.norm, self.attention = nn.LayerNorm(16, elementwise_affine=False), _Attention(16, 2)
        self.modulate, self.leave = nn.Linear(16, 48), nn.Linear(16, 48)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        blocks = x.reshape(batch, 3, height // 4, 4, width // 4, 4)
        tokens = self.patches(torch.einsum("bchiwj->bhwcij", blocks).reshape(batch, -1, 48))
        shift, scale, gate = self.modulate(F.silu(self.time(_wave(time, 16)))).unsqueeze(1).chunk(3, 2)
        tokens = tokens + gate * self.attention(self.norm(tokens) * (1 + scale) + shift)
        pieces = self.leave(tokens).reshape(batch, height // 4, width // 4, 3, 4, 4)
        return pieces.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class GPT(nn.Module):
    """A causal language model."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(32, 16), nn.Embedding(64, 16)
        self.layers = nn.Sequential(_Layer(16, 2, True, "tanh"), _Layer(16, 2, True, "tanh"))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.layers(self.words(tokens) + self.places(places))))


def _image(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 32, 32),)


def _noisy(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 3, 16, 16), torch.randint(0, 1000, (batch,))


def _tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 32, (batch, 12)),)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "resnet": (ResNet, _image),
    "mobilenet": (MobileNet, _image),
    "vit": (ViT, _image),
    "unet": (UNet, _noisy),
    "dit": (DiT, _noisy),
    "gpt": (GPT, _tokens),
}
"""For each family how to make the network, and inputs of a batch size."""


def make(name: str, seed: int = 0) -> nn.Module:
    """The network with random weights and statistics, ready for inference."""
    torch.manual_seed(seed)
    network = NETWORKS[name][0]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


def export(
    name: str, exporter: str, path: Path, *, dynamic: bool = True, opset: int | None = None
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Export a network to ``path``; the network and the inputs of two samples that it was exported with.

    Args:
        name: Of :data:`NETWORKS`.
        exporter: ``dynamo`` or ``torchscript``.
        path: The file.
        dynamic: Whether the batch is free.
        opset: ``None``: what the exporter chooses, 17 for the older one.
    """
    network = make(name)
    inputs = NETWORKS[name][1](2)
    names = [f"input{index}" for index in range(len(inputs))]
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            if exporter == "dynamo":
                shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic else None
                torch.onnx.export(
                    network, inputs, path, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False,
                    external_data=False, opset_version=opset,
                )  # fmt: skip
            else:
                axes = {each: {0: "batch"} for each in names} if dynamic else None
                torch.onnx.export(
                    network, inputs, path, dynamo=False, input_names=names, dynamic_axes=axes,
                    opset_version=opset or 17,
                )  # fmt: skip
    finally:
        logging.disable(disabled)
    return network, inputs
