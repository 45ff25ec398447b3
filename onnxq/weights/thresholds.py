"""Widths for a target size: the least threshold on every layer's loss that the size allows.

Source: V. Chikin, M. Antiukh, Data-Free Network Compression via Parametric Non-Uniform Mixed Precision Quantization,
CVPR 2022. The candidates are the losses themselves, so that the sweep is exact.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxq.errors import OnnxqError


def widths(
    losses: Mapping[str, Mapping[int, float]], bits: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """The width of each layer: the narrowest whose loss is at most T, for the smallest T that fits.

    Args:
        losses: By layer and width; comparable between layers.
        bits: How many bits each layer takes at each width.
        budget: How many bits there are.

    Raises:
        OnnxqError: not even the narrowest widths fit.
    """
    smallest = sum(min(sizes.values()) for sizes in bits.values())
    if smallest > budget:
        raise OnnxqError(
            f"expected a compression that the narrowest widths reach, found {budget / 8e6:.3f} MB asked for and "
            f"{smallest / 8e6:.3f} MB at least",
            hint="ask for less compression, or allow narrower widths with --set widths=…",
        )
    for threshold in sorted({loss for found in losses.values() for loss in found.values()}):
        chosen = under(losses, threshold)
        if chosen is not None and sum(bits[name][width] for name, width in chosen.items()) <= budget:
            return chosen
    raise AssertionError("the largest threshold lets every layer take its narrowest width")


def under(losses: Mapping[str, Mapping[int, float]], threshold: float) -> dict[str, int] | None:
    """The narrowest width of each layer whose loss is at most the threshold; ``None`` where one has none."""
    chosen = {}
    for name, found in losses.items():
        fitting = [width for width, loss in found.items() if loss <= threshold]
        if not fitting:
            return None
        chosen[name] = min(fitting)
    return chosen
