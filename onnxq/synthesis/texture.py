"""Which elements an image's texture is made of, after Laws, and a term that keeps all of them alive (TexQ)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onnxq.synthesis.terms import Taps

LEVEL, EDGE, SPOT = (1.0, 2.0, 1.0), (-1.0, 0.0, 1.0), (-1.0, 2.0, -1.0)


def laws_masks() -> Tensor:
    """Nine masks of 3x3, the outer products of level, edge and spot, [9, 3, 3]; the first, of level, is a blur.

    Source: K. I. Laws, Textured Image Segmentation, 1980.
    """
    vectors = torch.tensor([LEVEL, EDGE, SPOT])
    return torch.einsum("ai,bj->abij", vectors, vectors).reshape(9, 3, 3)


def texture_energy(images: Tensor) -> Tensor:
    """The share of each texture element in an image's energy, [samples, 9].

    The mean absolute response of each mask, over positions and channels. A channel's mean is taken off before: the
    blur would answer to brightness, which is no texture.

    Args:
        images: [samples, channels, height, width].
    """
    centred = images - images.mean((2, 3), keepdim=True)
    masks = laws_masks().to(images)[:, None]
    responses = functional.conv2d(centred.flatten(0, 1)[:, None], masks).abs().mean((2, 3))
    energy = responses.reshape(*images.shape[:2], len(masks)).mean(1)
    return torch.div(energy, energy.sum(-1, keepdim=True).clamp(min=1e-12))


@dataclass(frozen=True)
class TextureEnergy:
    """Keeps any texture element from outweighing the others, and each of them alive.

    The squared excess over ``most`` and the squared lack of ``least`` times an equal share. Source: TexQ (NeurIPS
    2023), which has a term of this purpose and these numbers; its form is inferred.

    Attributes:
        most: The largest share of an element.
        least: The smallest, in equal shares.
    """

    most: float = 0.3
    least: float = 0.5

    def __call__(self, inputs: Tensor, taps: Taps) -> Tensor:
        """The term, a scalar; 0 for inputs that are no images."""
        if inputs.ndim != 4 or min(inputs.shape[2:]) < 3:
            return torch.zeros((), device=inputs.device)
        share = texture_energy(inputs)
        lack = (self.least / share.shape[-1] - share).clamp(min=0).square()
        return ((share - self.most).clamp(min=0).square() + lack).sum(-1).mean()
