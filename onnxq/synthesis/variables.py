"""What synthesis changes: pixels, or a generator with its latent codes."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, ReduceLROnPlateau

LATENT = 256
WIDTH = 128
SMALLEST_RATE = 1e-4
ROUNDS = 2
WARM_UP = 0.2  # of a round, with a rate that rises
SHIFTS = (15 / 224, 30 / 224)  # of the image's side, in each round


class Variable(Protocol):
    """Something that makes a batch of inputs and learns."""

    def inputs(self) -> Tensor:
        """The batch as it is now, [samples, channels, …]."""

    def made(self) -> Tensor:
        """The batch that is handed out at the end."""

    def step(self, loss: Tensor) -> None:
        """One step downhill, after ``loss.backward()``."""

    def zero_grad(self) -> None:
        """Forget gradients."""


class Pixels:
    """Every pixel is a variable of its own (ZeroQ): Adam, its rate cut when the loss no longer falls.

    Args:
        start: The first batch.
        rate: Adam's rate.
        patience: Steps without progress before the rate is cut to a tenth.
        bounds: The least and the largest value of a pixel, [1, channels, 1, 1] each; ``None``: there are none.
    """

    def __init__(self, start: Tensor, rate: float, patience: int, bounds: tuple[Tensor, Tensor] | None = None) -> None:
        self.values, self.bounds = start.clone().requires_grad_(True), bounds
        self._keep_to_bounds()
        self.optimizer = Adam([self.values], rate)
        self.schedule = ReduceLROnPlateau(self.optimizer, patience=patience, min_lr=SMALLEST_RATE)

    def inputs(self) -> Tensor:
        """The pixels."""
        return self.values

    def made(self) -> Tensor:
        """The pixels."""
        return self.values

    def zero_grad(self) -> None:
        """Forget gradients."""
        self.optimizer.zero_grad()

    def step(self, loss: Tensor) -> None:
        """One step of Adam; pixels stay in their bounds."""
        self.optimizer.step()
        self.schedule.step(float(loss))
        self._keep_to_bounds()

    def _keep_to_bounds(self) -> None:
        if self.bounds is not None:
            with torch.no_grad():
                self.values.clamp_(*self.bounds)


class JitteredPixels:
    """Pixels seen through random shifts and flips, in two rounds of cosine annealing (PSAQ-ViT, section 4.1).

    What holds for an image wherever it is shifted to is no matter of single pixels.

    Args:
        start: The first batch, [samples, channels, …]; only images are shifted.
        rate: Adam's rate at the top of each round.
        steps: How many steps there will be, in both rounds together.
        bounds: The least and the largest value of a pixel.
        source: Where random numbers come from.
    """

    def __init__(
        self, start: Tensor, rate: float, steps: int, bounds: tuple[float, float], source: torch.Generator
    ) -> None:
        self.values = start.clone().clamp(*bounds).requires_grad_(True)
        self.optimizer = Adam([self.values], rate, betas=(0.5, 0.9))
        self.rate, self.round, self.bounds, self.source = rate, max(1, -(-steps // ROUNDS)), bounds, source
        self.done = 0

    def inputs(self) -> Tensor:
        """The pixels, shifted by the same random distance along both axes, flipped half of the times."""
        if self.values.ndim != 4:
            return self.values
        reach = int(SHIFTS[min(self.done // self.round, ROUNDS - 1)] * min(self.values.shape[2:]))
        shift = int(torch.randint(-reach, reach + 1, (1,), generator=self.source))
        seen = torch.roll(self.values, (shift, shift), dims=(2, 3))
        return seen.flip(3) if int(torch.randint(2, (1,), generator=self.source)) else seen

    def made(self) -> Tensor:
        """The pixels as they are."""
        return self.values

    def zero_grad(self) -> None:
        """Forget gradients."""
        self.optimizer.zero_grad()

    def step(self, loss: Tensor) -> None:
        """One step of Adam at the round's rate; pixels stay in their bounds."""
        progress = (self.done % self.round) / self.round
        warming = progress / WARM_UP
        annealed = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
        self.optimizer.param_groups[0]["lr"] = self.rate * (warming if progress < WARM_UP else annealed)
        self.optimizer.step()
        with torch.no_grad():
            self.values.clamp_(*self.bounds)
        self.done += 1


class Generator:
    """A small generator and the latent codes of its batch, learned together (GENIE-D, section 3.1).

    Images of one batch share what the generator has learned, which keeps high frequencies out of them.

    Args:
        samples: The size of the batch.
        shape: [channels, height, width].
        source: Where random numbers come from.
        latent_rate: Adam's rate of the codes, cut when the loss no longer falls.
        generator_rate: Adam's rate of the generator, times 0.95 every 100 steps of 4,000.
        steps: How many steps there will be, to which both schedules are scaled.
        device: Where it runs.
    """

    def __init__(
        self,
        samples: int,
        shape: tuple[int, int, int],
        source: torch.Generator,
        *,
        latent_rate: float = 0.1,
        generator_rate: float = 0.01,
        steps: int = 4000,
        device: str = "cpu",
    ) -> None:
        self.codes = torch.randn(samples, LATENT, generator=source).to(device).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=source)))
            self.network = generator_network(shape).to(device)
        self.shape = shape
        patience = max(5, steps // 40)
        self.optimizers: list[Optimizer] = [
            Adam([self.codes], latent_rate),
            Adam(self.network.parameters(), generator_rate),
        ]
        self.plateau = ReduceLROnPlateau(self.optimizers[0], patience=patience, min_lr=SMALLEST_RATE)
        self.decay: LRScheduler = ExponentialLR(self.optimizers[1], 0.95 ** (40 / max(steps, 1)))

    def inputs(self) -> Tensor:
        """What the generator makes of the codes."""
        made: Tensor = self.network(self.codes)
        return made[:, :, : self.shape[1], : self.shape[2]]

    def made(self) -> Tensor:
        """What the generator makes of the codes."""
        return self.inputs()

    def zero_grad(self) -> None:
        """Forget gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, loss: Tensor) -> None:
        """One step of both optimisers."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.plateau.step(float(loss))
        self.decay.step()


def generator_network(shape: tuple[int, int, int]) -> nn.Module:
    """From latent codes [samples, LATENT] to images of at least that shape, each channel of the batch normalised."""
    channels, height, width = shape
    rows, columns = -(-height // 4), -(-width // 4)
    return nn.Sequential(
        nn.Linear(LATENT, WIDTH * rows * columns),
        nn.Unflatten(1, (WIDTH, rows, columns)),
        nn.BatchNorm2d(WIDTH),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1),
        nn.BatchNorm2d(WIDTH // 2),
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(WIDTH // 2, channels, 3, padding=1),
        nn.Tanh(),
        nn.BatchNorm2d(channels, affine=False),
    )
