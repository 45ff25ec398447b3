"""What detectors are told beside their picture: its size, and by how much it was scaled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.calibration.data import Array, InputSpec

SIZE_WORDS = ("size", "shape")  # orig_target_sizes, im_shape
SCALE_WORD = "scale"  # scale_factor


def apart(specs: Sequence[InputSpec]) -> tuple[list[InputSpec], list[InputSpec]]:
    """The inputs that samples are needed for, and those that follow from the one picture among them."""
    if sum(spec.is_picture for spec in specs) != 1:
        return list(specs), []
    told = [spec for spec in specs if _follows(spec)]
    return [spec for spec in specs if spec not in told], told


def told(specs: Sequence[InputSpec], height: int, width: int) -> dict[str, Array]:
    """One row of each input that follows, for a picture that has the size that the network sees."""
    return {
        spec.name: np.asarray([1, 1] if SCALE_WORD in spec.name.lower() else [height, width], spec.dtype)
        for spec in specs
    }


def _follows(spec: InputSpec) -> bool:
    return spec.row_shape == (2,) and any(word in spec.name.lower() for word in (*SIZE_WORDS, SCALE_WORD))
