"""More than a batch holds: crops of its images, mixtures of them, and versions that are harder for the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnxq.errors import OnnxqError
from onnxq.learning.finetune import Batch, Batches
from onnxq.learning.losses import Loss
from onnxq.learning.student import Student


@dataclass(frozen=True)
class Augmentation:
    """Other batches of batches of images.

    Attributes:
        axes: How the input's axes are turned for channels to come first; empty: they do.
        crop: The smallest part of an image's area in a random crop; 1: images stay whole.
        mix: Whether as many mixtures of pairs come along.
        seed: Of both.
    """

    axes: tuple[int, ...]
    crop: float
    mix: bool
    seed: int

    def __call__(self, batches: Batches) -> Batches:
        """The batches, augmented."""
        if self.crop < 1:
            batches = cropped(batches, self.axes, self.crop, self.seed)
        return mixed(batches, self.seed) if self.mix else batches


def cropped(batches: Batches, axes: Sequence[int], smallest: float, seed: int) -> Batches:
    """Random crops, enlarged to the images' size, half of them flipped; the float network looks at them anew.

    Args:
        batches: Of one input, of images.
        axes: How the input's axes are turned for channels to come first; empty: they do.
        smallest: The smallest part of an image's area in a crop.
        seed: Of the crops.

    Raises:
        OnnxqError: the part is not above 0.
    """
    if smallest <= 0:
        raise OnnxqError(f"expected a crop above 0 and up to 1, found {smallest:g}", hint="use --set crop=0.5")
    back = np.argsort(axes).tolist()

    def at(step: int) -> Batch:
        source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        found = {}
        for name, value in batches(step).inputs.items():
            images = value.permute(*axes) if axes else value
            images = random_crops(images, smallest, source)
            found[name] = images.permute(*back) if axes else images
        return Batch(found)

    return at


def random_crops(images: Tensor, smallest: float, source: torch.Generator) -> Tensor:
    """One crop of each image, enlarged to its size, half of them flipped.

    Args:
        images: [samples, channels, height, width].
        smallest: The smallest part of an image's area in its crop.
        source: Where random numbers come from.
    """
    count = len(images)
    side = (smallest + (1 - smallest) * torch.rand(count, generator=source)).sqrt()
    shift = (1 - side)[:, None] * (2 * torch.rand(count, 2, generator=source) - 1)
    flip = 1 - 2 * torch.randint(2, (count,), generator=source)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = side * flip, side, shift
    grid = functional.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mixed(batches: Batches, seed: int) -> Batches:
    """Every batch, and as many mixtures of its pairs, of which the float network says what they are.

    Source: mixup (arXiv 1710.09412) without labels, its share drawn from Beta(1, 1), as in TexQ.

    Args:
        batches: To start from.
        seed: Of pairs and shares.
    """

    def at(step: int) -> Batch:
        source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = batches(step)
        rows = len(next(iter(batch.inputs.values())))
        partner, share = torch.randperm(rows, generator=source), float(torch.rand(1, generator=source))
        return Batch({name: mixture(value, partner, share) for name, value in batch.inputs.items()})

    return at


def mixture(value: Tensor, partner: Tensor, share: float) -> Tensor:
    """Samples, followed by ``share`` of each and the rest of its partner.

    Args:
        value: [samples, …].
        partner: The number of each sample's partner, [samples].
        share: Between 0 and 1.
    """
    return torch.cat([value, share * value + (1 - share) * value[partner.to(value.device)]])


def perturbed(batches: Batches, student: Student, wanted: Sequence[str], loss: Loss, radius: float) -> Batches:
    """Every batch, and the same samples moved one step to where student and teacher differ more.

    Source: sample difficulty promotion of HAST, arXiv 2303.13826, section 3.3: one step along the sign of the loss's
    gradient, within an L∞ ball. Gradients flow through both networks.

    Args:
        batches: To start from.
        student: What learns, and its teacher.
        wanted: Names of the values that the loss reads.
        loss: Of the student's and the teacher's values.
        radius: Of the ball, in the standard deviation of the batch's inputs.
    """

    def at(step: int) -> Batch:
        inputs = {name: value.detach().requires_grad_(True) for name, value in batches(step).inputs.items()}
        moved = steepest(inputs, loss(student.run(inputs, wanted), student.teach(inputs, wanted)), radius)
        return Batch({name: torch.cat([value.detach(), moved[name]]) for name, value in inputs.items()})

    return at


def steepest(inputs: Mapping[str, Tensor], loss: Tensor, radius: float) -> dict[str, Tensor]:
    """Inputs one step of ``radius`` standard deviations along the sign of the loss's gradient."""
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {
        name: (value + radius * value.std() * gradient.sign()).detach()
        for (name, value), gradient in zip(inputs.items(), gradients, strict=True)
    }
