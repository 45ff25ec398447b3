"""The demo classifier: a small residual network with the graph shapes that quantizers have to get right.

    x [batch, 1, 28, 28] in [-1, 1]  ->  logits [batch, 10]

On purpose it holds a plain residual Add, an inverted residual (depthwise convolution, ReLU6, linear output),
a Concat of two branches with different ranges, BatchNorm everywhere, and an average-pool head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def convolution(
    inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, activation: type | None = nn.ReLU
) -> nn.Sequential:
    """Convolution without bias, BatchNorm and, unless it is None, an activation."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, activation()) if activation else nn.Sequential(*layers)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.second = convolution(outputs, outputs, activation=None)
        same_shape = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same_shape else convolution(inputs, outputs, kernel=1, stride=stride, activation=None)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Keeps [batch, channels, height, width], or halves height and width with stride 2."""
        return torch.relu(self.second(self.first(features)) + self.shortcut(features))


class ConcatDownsample(nn.Module):
    """Halves the resolution by a strided convolution and by max pooling, and puts the two side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.learned = convolution(inputs, outputs - inputs, stride=2)
        self.pooled = nn.MaxPool2d(2)

    def forward(self, features: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / 2, width / 2]."""
        return torch.cat([self.learned(features), self.pooled(features)], dim=1)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen by 1x1, filter depthwise by 3x3, narrow by a linear 1x1, add the input."""

    def __init__(self, channels: int, expansion: int = 3) -> None:
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            convolution(channels, wide, kernel=1, activation=nn.ReLU6),
            convolution(wide, wide, groups=wide, activation=nn.ReLU6),
            convolution(wide, channels, kernel=1, activation=None),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Keeps the shape."""
        return features + self.body(features)


class FashionResNet(nn.Module):
    """28x28 grey images to ten logits, with 158,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 16)
        self.stages = nn.Sequential(
            ResidualBlock(16, 16),
            ResidualBlock(16, 32, stride=2),
            ConcatDownsample(32, 64),
            InvertedResidual(64),
            ResidualBlock(64, 64),
            InvertedResidual(64),
        )
        # A fixed window exports as one AveragePool node; adaptive pooling becomes ReduceMean between Reshapes.
        self.pool = nn.AvgPool2d(7)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 1, 28, 28] in [-1, 1] to logits [batch, 10]."""
        pooled = self.pool(self.stages(self.stem(x)))
        return self.head(pooled.reshape(-1, 64))  # nn.Flatten would export the batch size as a chain of Shape nodes
