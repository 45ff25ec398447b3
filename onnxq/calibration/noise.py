"""Random inputs: the baseline without data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxq.calibration import picture_size
from onnxq.calibration.data import Array, InputSpec, Sample
from onnxq.calibration.images import USUAL_SIDE
from onnxq.errors import OnnxqError

if TYPE_CHECKING:
    from onnxq.diffusion.latents import Scaling


MIDDLE_BYTE, BYTE_DEVIATION = 128, 64  # of noise for pictures of bytes


class Noise:
    """Standard normal samples in the shape of the model's float inputs, or around grey where pictures are bytes.

    Args:
        specs: The model's inputs.
        count: How many samples.
        seed: Of the random numbers.
        scaling: Of latents, for the decoder of a pipeline.

    Raises:
        OnnxqError: an input is neither float nor a picture, or has a free dimension other than the batch; nothing can
            be guessed then.
    """

    is_made_up = True

    def __init__(self, specs: Sequence[InputSpec], *, count: int, seed: int, scaling: Scaling | None = None) -> None:
        needed, following = picture_size.apart(specs)
        for spec in needed:
            if spec.dtype.kind != "f" and not spec.holds_bytes:
                constant = f", or make it a constant: onnxq specialize MODEL --input {spec.name}=VALUE"
                raise OnnxqError(
                    f"expected calibration data for the {spec.dtype} input {spec.name!r}, found no --data",
                    hint=f"give --data FILE.npz keyed by input name{constant if set(spec.shape) <= {1} else ''}",
                )
        free = [spec for spec in specs if None in spec.row_shape]
        if free:
            raise OnnxqError(
                f"expected the size of input {free[0].name!r}, which the model leaves free, found neither data nor "
                "--shapes",
                hint=f"give {' '.join(spec.example(USUAL_SIDE) for spec in free)} with your sizes, or --data",
            )
        self.specs = needed
        sides = next((spec.sides for spec in needed if spec.is_picture), (1, 1))
        self.told = picture_size.told(following, *(size or 1 for size in sides))
        self.count = count
        self.seed = seed
        self.scaling = scaling

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        generator = np.random.default_rng(self.seed)
        for _ in range(self.count):
            yield {spec.name: self._drawn(generator, spec) for spec in self.specs} | self.told

    def _drawn(self, generator: np.random.Generator, spec: InputSpec) -> Array:
        drawn = generator.standard_normal([size or 1 for size in spec.row_shape])
        if spec.holds_bytes:
            return as_bytes(MIDDLE_BYTE + BYTE_DEVIATION * drawn)
        scaled = drawn if self.scaling is None else self.scaling.applied(drawn[None])[0]
        return scaled.astype(spec.dtype)


def as_bytes(numbers: Array) -> Array:
    """The nearest bytes."""
    return np.clip(np.rint(numbers), 0, 255).astype(np.uint8)
