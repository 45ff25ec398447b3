"""In which units a network wants its inputs: found by matching the first layer's statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam

from onnxq.autograd.denormals import no_denormals
from onnxq.autograd.interpreter import TorchGraph
from onnxq.synthesis.statistics import Remembered, moments

STEPS = 150
TRIED_STEPS = 50  # after which the better of two starts is known
SAMPLES = 8
ELEMENTS = SAMPLES * 3 * 224 * 224  # of all samples, at most: a large picture shows a filter as much as several small
LAYERS = 2
SMOOTHING = 4  # noise is enlarged so many times, half of it: pictures are smooth, and filters answer to that
SMALLEST_SIDE = 8  # of what has a spectrum
COLOURS = 3
SPECTRUM = 1.2  # amplitudes of pictures fall with about this power of the frequency (Field 1987: 0.8 to 1.5)
SHARED = 0.9  # of the variance: what a picture's colours have in common

# What preprocessing makes of a picture: the least and the largest value of a pixel.
CONVENTIONS = (
    (0.0, 255.0),
    (-124.0, 151.0),  # less the mean of ImageNet
    (0.0, 1.0),
    (-1.0, 1.0),
    (-2.12, 2.64),  # less ImageNet's mean, by its deviation
)
PICTURE_MEAN, PICTURE_DEVIATION = 0.47, 0.24  # of the distance between black and white


@no_denormals()
def input_scale(
    graph: TorchGraph,
    name: str,
    shape: Sequence[int],
    layers: Sequence[Remembered],
    source: torch.Generator,
    *,
    picture: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and shift of each input channel with which smooth noise meets what the first layers remember.

    Networks are fed with pixels between 0 and 255, between -1 and 1, or normalised by channel; nothing in a file says
    which. Starting from normalised inputs, scale and shift are learned from the first BatchNormalization layers.

    With ``picture`` noise has the spectrum of pictures, and the colours share their scale: they hardly differ, and
    first filters see little of each alone. On five networks the scale is then within a fifth of the true one but for
    one (two thirds); without, it is 0.25 to 1.4 times that, by channel. ``psaq-vit`` does without: its images gave a
    hybrid 26.5 instead of 27.8 dB.

    Returns:
        Two tensors [1, channels, 1, …]; 1 and 0 for normalised images, nearly, and where no layer remembers anything.
    """
    samples = max(1, min(SAMPLES, ELEMENTS // math.prod(shape)))
    noise = (picture_noise if picture else smooth_noise)((samples, *shape), source).to(graph.device)
    broadcast = (1, shape[0], *[1] * (len(shape) - 1))
    unchanged = (torch.ones(broadcast, device=graph.device), torch.zeros(broadcast, device=graph.device))
    if not layers:
        return unchanged
    scales = (1, 1, *broadcast[2:]) if picture and shape[0] == COLOURS else broadcast

    def descend(first: float) -> Iterator[tuple[float, Tensor, Tensor]]:
        """The loss of each step, with the scale and the shift behind it."""
        logarithm = torch.full(scales, math.log(first), device=graph.device, requires_grad=True)
        shift = torch.zeros(broadcast, device=graph.device, requires_grad=True)  # in units of the scale
        optimizer = Adam([logarithm, shift], 0.05)
        for _ in range(STEPS):
            optimizer.zero_grad()
            inputs = logarithm.exp() * (noise + shift)
            loss = _loss(graph.run({name: inputs}, [layer.value for layer in layers[:LAYERS]]), layers[:LAYERS])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scale = logarithm.exp().detach().expand(broadcast)
            yield float(loss.detach()), scale, scale * shift.detach()

    starts = {}
    for start in (descend(1.0), descend(64.0)):  # normalised, or raw bytes: the two basins
        *_, (loss, _, _) = islice(start, TRIED_STEPS)
        if math.isfinite(loss):
            starts[loss] = start
    if not starts:
        return unchanged
    *_, (_, scale, shift) = starts[min(starts)]
    return scale, shift


def smooth_noise(shape: Sequence[int], source: torch.Generator) -> Tensor:
    """Standard normal noise, half of it at a lower resolution, as in pictures."""
    fine = torch.randn(*shape, generator=source)
    if len(shape) != 4 or min(shape[2:]) < 2 * SMOOTHING:
        return fine
    small = torch.randn(*shape[:2], *(-(-size // SMOOTHING) for size in shape[2:]), generator=source)
    coarse = functional.interpolate(small, size=tuple(shape[2:]), mode="bilinear")
    mixed: Tensor = coarse / coarse.std() * 0.9 + fine * 0.4359
    return mixed


def picture_noise(shape: Sequence[int], source: torch.Generator) -> Tensor:
    """Normal noise of mean 0 and deviation 1 with the spectrum of pictures, whose colours nearly agree.

    Statistics that white noise is far from, this meets nearly everywhere in a first layer: filters answer to edges, and
    pictures are smooth.

    Args:
        shape: [samples, channels, …]; only what has two axes of 8 or more gets a spectrum, other noise is white.
        source: Where random numbers come from.
    """
    fine = torch.randn(*shape, generator=source)
    if len(shape) != 4 or min(shape[2:]) < SMALLEST_SIDE:
        return fine
    height, width = shape[2:]
    rows, columns = torch.fft.fftfreq(height, 1 / height), torch.fft.rfftfreq(width, 1 / width)
    frequency = (rows[:, None].square() + columns.square()).sqrt().clamp(min=1)  # the mean varies like the slowest wave
    if shape[1] == COLOURS:
        grey = torch.randn(shape[0], 1, height, width, generator=source)
        fine = math.sqrt(SHARED) * grey + math.sqrt(1 - SHARED) * fine
    waves = torch.fft.rfft2(fine) / frequency**SPECTRUM
    made: Tensor = torch.fft.irfft2(waves, s=(height, width))
    return made / made.std()


def pixel_bounds(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor] | None:
    """The least and the largest value of a picture's pixels, in the units that :func:`input_scale` found.

    Of the usual conventions the one whose pictures have the nearest mean and deviation; real pictures reach from black
    to white, and never beyond.

    Args:
        scale: The deviation of inputs, [1, channels, 1, 1].
        shift: Their mean, [1, channels, 1, 1].

    Returns:
        Two tensors [1, channels, 1, 1]; ``None`` for what is no picture of three colours.
    """
    if scale.ndim != 4 or scale.shape[1] != COLOURS:
        return None
    deviation, mean = float(scale.mean()), float(shift.mean())

    def distance(convention: tuple[float, float]) -> float:
        low, high = convention
        usual = PICTURE_DEVIATION * (high - low)
        off = (mean - low - PICTURE_MEAN * (high - low)) / usual
        return math.log(deviation / usual) ** 2 + off**2

    low, high = min(CONVENTIONS, key=distance)
    return (low - shift) / scale, (high - shift) / scale


def _loss(taps: dict[str, Tensor], layers: Sequence[Remembered]) -> Tensor:
    total = torch.zeros(())
    for layer in layers:
        mean, deviation = moments(taps[layer.value], per_sample=False)
        total = total + ((mean - layer.mean) / layer.unit).square().mean()
        total = total + (deviation / layer.deviation).log().square().mean()
    return total
