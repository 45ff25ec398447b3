"""The table of ops: one torch function for each ONNX op.

A function is named as the op and its signature is the op's latest schema, so that an attribute nobody thought of is a
TypeError. Values are float tensors with gradients; integers that describe shapes stay on the CPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from onnxq.autograd.ops import (
    attention,
    elementwise,
    layers,
    pooling,
    quantization,
    recurrent,
    reduction,
    resize,
    shape,
)

_FILES = (attention, elementwise, layers, pooling, quantization, recurrent, reduction, resize, shape)


def _functions(module: Any) -> dict[str, Callable[..., Any]]:
    """The functions of a file that are named as ops, and those it takes from torch as they are."""
    named = {
        name: function
        for name, function in vars(module).items()
        if name[0].isupper() and inspect.isfunction(function) and function.__module__ == module.__name__
    }
    direct: dict[str, Callable[..., Any]] = module.DIRECT
    return named | direct


OPS: dict[str, Callable[..., Any]] = {name: function for file in _FILES for name, function in _functions(file).items()}
"""The function of each op of the ONNX domain."""


@functools.cache
def takes_outputs(function: Callable[..., Any]) -> bool:
    """Whether the function asks how many outputs its node has."""
    return inspect.isfunction(function) and "outputs" in inspect.signature(function).parameters
