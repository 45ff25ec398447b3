"""In which units a network wants its inputs: found by matching the first layer's statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam

from onnxq.autograd.interpreter import TorchGraph
from onnxq.synthesis.statistics import Remembered, moments

STEPS = 150
SAMPLES = 8
LAYERS = 2
SMOOTHING = 4  # noise is enlarged so many times, half of it: pictures are smooth, and filters answer to that


def input_scale(
    graph: TorchGraph, name: str, shape: Sequence[int], layers: Sequence[Remembered], source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scale and shift of each input channel with which smooth noise meets what the first layers remember.

    Networks are fed with pixels between 0 and 255, between -1 and 1, or normalised by channel; nothing in a file says
    which. Starting from normalised inputs, scale and shift are learned from the first BatchNormalization layers.

    Returns:
        Two tensors [1, channels, 1, …]; 1 and 0 for normalised images, nearly, and where no layer remembers anything.
    """
    noise = smooth_noise((SAMPLES, *shape), source).to(graph.device)
    broadcast = (1, shape[0], *[1] * (len(shape) - 1))
    best = (torch.ones(broadcast, device=graph.device), torch.zeros(broadcast, device=graph.device))
    if not layers:
        return best
    lowest = float("inf")
    for first in (1.0, 64.0):  # normalised, or raw bytes: the two basins
        logarithm = torch.full(broadcast, float(torch.tensor(first).log()), device=graph.device, requires_grad=True)
        shift = torch.zeros(broadcast, device=graph.device, requires_grad=True)  # in units of the scale
        optimizer = Adam([logarithm, shift], 0.05)
        loss = torch.tensor(float("inf"))
        for _ in range(STEPS):
            optimizer.zero_grad()
            inputs = logarithm.exp() * (noise + shift)
            loss = _loss(graph.run({name: inputs}, [layer.value for layer in layers[:LAYERS]]), layers[:LAYERS])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if float(loss.detach()) < lowest:
            lowest = float(loss.detach())
            best = (logarithm.exp().detach(), (logarithm.exp() * shift).detach())
    return best


def smooth_noise(shape: Sequence[int], source: torch.Generator) -> Tensor:
    """Standard normal noise, half of it at a lower resolution, as in pictures."""
    fine = torch.randn(*shape, generator=source)
    if len(shape) != 4 or min(shape[2:]) < 2 * SMOOTHING:
        return fine
    small = torch.randn(*shape[:2], *(-(-size // SMOOTHING) for size in shape[2:]), generator=source)
    coarse = functional.interpolate(small, size=tuple(shape[2:]), mode="bilinear")
    mixed: Tensor = coarse / coarse.std() * 0.9 + fine * 0.4359
    return mixed


def _loss(taps: dict[str, Tensor], layers: Sequence[Remembered]) -> Tensor:
    total = torch.zeros(())
    for layer in layers:
        mean, deviation = moments(taps[layer.value], per_sample=False)
        total = total + ((mean - layer.mean) / layer.unit).square().mean()
        total = total + (deviation / layer.deviation).log().square().mean()
    return total
