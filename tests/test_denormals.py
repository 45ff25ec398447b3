"""Numbers below the smallest normal one count as zero inside, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from onnxq.autograd.denormals import no_denormals

SMALL = 1e-39


def is_flushed() -> bool:
    """Whether a denormal number becomes zero in torch."""
    return float(torch.full((), SMALL) * 1.0) == 0


def test_denormals_are_zero_inside_alone_also_where_entered_twice() -> None:
    with no_denormals():
        if not is_flushed():
            pytest.skip("this processor cannot take denormal numbers for zero")
        with no_denormals():
            assert is_flushed()
        assert is_flushed()
    assert not is_flushed()


def test_an_error_inside_ends_it() -> None:
    with pytest.raises(RuntimeError), no_denormals():
        raise RuntimeError
    assert not is_flushed()
