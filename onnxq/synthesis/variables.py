"""What synthesis changes: pixels, or a generator with its latent codes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, ReduceLROnPlateau

LATENT = 256
WIDTH = 128
SMALLEST_RATE = 1e-4


class Variable(Protocol):
    """Something that makes a batch of inputs and learns."""

    def inputs(self) -> Tensor:
        """The batch as it is now, [samples, channels, …]."""

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
    """

    def __init__(self, start: Tensor, rate: float, patience: int) -> None:
        self.values = start.clone().requires_grad_(True)
        self.optimizer = Adam([self.values], rate)
        self.schedule = ReduceLROnPlateau(self.optimizer, patience=patience, min_lr=SMALLEST_RATE)

    def inputs(self) -> Tensor:
        """The pixels."""
        return self.values

    def zero_grad(self) -> None:
        """Forget gradients."""
        self.optimizer.zero_grad()

    def step(self, loss: Tensor) -> None:
        """One step of Adam."""
        self.optimizer.step()
        self.schedule.step(float(loss))


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
            self.network = _network(shape).to(device)
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


def _network(shape: tuple[int, int, int]) -> nn.Module:
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
