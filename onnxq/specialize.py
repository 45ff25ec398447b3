"""A model for one value of some inputs, and for fixed sizes: what depends on them alone is computed once and for all.

Exporters put a whole network into each branch of an If: one for every sampling rate, or a decoder with its cache and
one without. The branch that one value takes becomes part of the main graph, where Q/DQ can go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq import model as models
from onnxq.calibration import sizes
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]

TRUTHS = {"true": "1", "false": "0"}


@dataclass(frozen=True)
class Specialized:
    """What became of a model.

    Attributes:
        unread: Inputs that nothing reads any longer, and that are gone with those that got a value.
        inside: Layers that still lie in a branch or a loop.
    """

    unread: list[str]
    inside: list[str]


def parse_values(texts: Iterable[str]) -> dict[str, str]:
    """Read ``--input``: ``sr=16000``, ``use_cache_branch=true`` or ``scale=0.5,0.5,1``.

    Raises:
        OnnxqError: a text is of another form, or an input is named twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if not name or not value:
            raise OnnxqError(
                f"expected NAME=VALUE, found {text!r}", hint="such as sr=16000, use_cache=true or scale=0.5,0.5,1"
            )
        if name in values:
            raise OnnxqError(f"expected one value of {name!r}, found two", hint="leave one out")
        values[name] = value
    return values


def specialize(model: ir.Model, values: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> Specialized:
    """Give inputs a value or a size in place, and take the branches that follow.

    Args:
        model: A float model as :func:`onnxq.load` gives it.
        values: Numbers, or true and false, by the names of inputs; several are separated by commas, in the order in
            which they lie in memory; one number fills an input of any fixed size.
        shapes: Whole shapes by the names of inputs, batch included; dimensions of one name have one size everywhere.

    Returns:
        What became of it.

    Raises:
        OnnxqError: a name is not an input, or a value or a shape does not fit it.
    """
    sizes.choose(model, shapes)  # which checks them
    _fix_sizes(model, shapes)
    read = {value.name for value in model.graph.inputs if value.uses()}
    for name, text in values.items():
        _fix_value(model.graph, name, text)
    models.normalise(model)
    unread = [value for value in model.graph.inputs if value.name in read and not _is_read(value)]
    for value in unread:
        model.graph.inputs.remove(value)
    return Specialized(
        [value.name or "" for value in unread], [name for name, _ in layer_nodes.layers_inside(model.graph)]
    )


def _fix_sizes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Fix sizes of inputs, and those of one name everywhere; a name that stands for several says nothing elsewhere."""
    found: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        value = graphs.input_named(model.graph, name)
        for size, new in zip(value.shape or (), shape, strict=True):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                found.setdefault(size.value, set()).add(new)
        value.shape = ir.Shape(shape)
    known = {name: next(iter(them)) if len(them) == 1 else None for name, them in found.items()}
    for graph in model.graphs():
        for value in graphs.values(graph).values():
            if value.shape is not None and not value.is_initializer():
                value.shape = ir.Shape([_known(size, known) for size in value.shape])


def _known(size: int | ir.SymbolicDim, known: Mapping[str, int | None]) -> int | ir.SymbolicDim | None:
    return known.get(size.value or "", size) if isinstance(size, ir.SymbolicDim) else size


def _fix_value(graph: ir.Graph, name: str, text: str) -> None:
    """Make an input a constant."""
    value = next((value for value in graph.inputs if value.name == name), None)
    if value is None:
        known = ", ".join(item.name or "" for item in graph.inputs)
        raise OnnxqError(f"expected the name of an input, found {name!r}", hint=f"the inputs are: {known}")
    value.const_value = ir.tensor(_array_of(value, text), name=name)
    graph.inputs.remove(value)
    graph.initializers.add(value)


def _array_of(value: ir.Value, text: str) -> Array:
    kind = value.dtype or ir.DataType.FLOAT
    is_float = kind.is_floating_point()
    words = [TRUTHS.get(word.strip().lower(), word.strip()) for word in text.split(",")]
    try:
        exact = np.array([float(word) if is_float else int(word) for word in words])
        found = exact.astype(kind.numpy())
    except (ValueError, OverflowError, TypeError) as error:
        raise _unfit(value, text) from error
    if not is_float and np.any(found != exact):
        raise _unfit(value, text)
    shape = [size if isinstance(size, int) else None for size in value.shape or ()]
    if None in shape:
        spelled = sizes.spell(value.shape or ())
        raise OnnxqError(
            f"expected an input of fixed size for a value, found {value.name!r} of shape {spelled}",
            hint=f"give its size, too: --shapes {value.name}:{spelled.replace('?', '1')}",
        )
    fixed = [size or 0 for size in shape]
    if found.size not in (1, math.prod(fixed)):
        raise _unfit(value, text)
    return np.full(fixed, found[0]) if found.size == 1 else found.reshape(fixed)


def _unfit(value: ir.Value, text: str) -> OnnxqError:
    return OnnxqError(
        f"expected {spell_type(value)} for input {value.name!r}, found {text!r}",
        hint="give one number for all, or as many as it holds, separated by commas; of booleans true or false",
    )


def spell_type(value: ir.Value) -> str:
    """Type and shape of an input, such as ``float32 1x3x?x?``."""
    return f"{value.dtype} {sizes.spell(value.shape or ())}".lower().strip()


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
