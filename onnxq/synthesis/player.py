"""A generator that goes on learning while another network learns from what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from onnxq.synthesis.variables import LATENT, generator_network

Array = np.ndarray[Any, Any]


class Player:
    """Makes new images in every step, of classes that are drawn (GDFQ, arXiv 2003.03603, section 3.2).

    A class is an embedding that is added to the latent code. GDFQ multiplies by it, which leaves a class nothing but
    the sizes of a code's elements: after 240 moves its images of ten classes were told apart no better than by chance,
    those of a sum all of them after 40 (shipped Fashion-MNIST classifier).
    Draws depend on the seed and on the number of the draw alone, so that an interrupted game goes on as it would have.

    Args:
        shape: [channels, height, width].
        classes: How many there are; 0: the generator knows none (ZAQ).
        seed: Of its first weights and of all draws.
        rate: Adam's rate.
        device: Where it runs.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, seed: int, *, rate: float = 1e-3, device: str = "cpu"
    ) -> None:
        self.shape, self.classes, self.seed, self.device = shape, classes, seed, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = generator_network(shape).to(device)
            self.classes_embedded = nn.Embedding(max(classes, 1), LATENT).to(device)
        self._learned = [*self.network.parameters(), *(self.classes_embedded.parameters() if classes else ())]
        self._optimizer = Adam(self._learned, rate, betas=(0.5, 0.999))

    def draw(self, samples: int, number: int) -> tuple[Tensor, Tensor]:
        """Images [samples, channels, height, width] with gradients, and their classes [samples].

        Args:
            samples: How many.
            number: Of the draw; another number makes other images.
        """
        source = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        codes = torch.randn(samples, LATENT, generator=source).to(self.device)
        labels = torch.randint(max(self.classes, 1), (samples,), generator=source).to(self.device)
        if self.classes:
            codes = codes + self.classes_embedded(labels)
        images: Tensor = self.network(codes)
        return images[:, :, : self.shape[1], : self.shape[2]], labels

    def step(self, loss: Tensor) -> None:
        """One step downhill; nothing but the generator gets a gradient."""
        gradients = torch.autograd.grad(loss, self._learned)
        for parameter, gradient in zip(self._learned, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def state(self) -> dict[str, Array]:
        """Weights, statistics and what Adam remembers."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self._tensors().items()}
        for index, parameter in enumerate(self._learned):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                arrays[f"adam/{index}/{key}"] = value.detach().cpu().numpy()
        return arrays

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take up what :meth:`state` gave."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(torch.from_numpy(np.asarray(state[name])))
        for key, array in state.items():
            if key.startswith("adam/"):
                _, index, name = key.split("/")
                tensor = torch.from_numpy(np.array(array))
                place = "cpu" if name == "step" else self.device
                self._optimizer.state[self._learned[int(index)]][name] = tensor.to(place)

    def _tensors(self) -> dict[str, Tensor]:
        own = self.network.state_dict()
        return {f"network/{name}": tensor for name, tensor in own.items()} | {"classes": self.classes_embedded.weight}
