"""Shapes of dynamic inputs: an engine needs the smallest, the usual and the largest of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxq.errors import OnnxqError

# Where only the first dimension is open, it is taken for the batch.
BATCH_MINIMUM, BATCH_USUAL, BATCH_MAXIMUM = 1, 8, 32

# Stands for an open dimension in the example that an error shows.
_EXAMPLE = (64, 128, 256)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """The shapes that an engine is built for: it runs on all between the smallest and the largest.

    Attributes:
        minimum: The smallest shape.
        usual: The shape that the compiler optimises for.
        maximum: The largest shape.
    """

    minimum: Shape
    usual: Shape
    maximum: Shape


def parse_shapes(texts: str | Sequence[str]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Read ``x:1x3x224x224`` (one shape) or ``x:1x3x224x224,8x3x224x224,16x3x224x224`` (smallest, usual, largest).

    Args:
        texts: One input's shapes, or several; several inputs may also share one text, separated by spaces or ``;``.

    Returns:
        ``{input: (minimum, usual, maximum)}``, as :func:`onnxq.engines.build` takes it.

    Raises:
        OnnxqError: the text is not of that form, or names an input twice.
    """
    parsed: dict[str, tuple[Shape, Shape, Shape]] = {}
    joined = texts if isinstance(texts, str) else " ".join(texts)
    for text in joined.replace(";", " ").split():
        name, _, dimensions = text.rpartition(":")
        try:
            shapes = [tuple(int(size) for size in shape.split("x")) for shape in dimensions.split(",")]
        except ValueError:
            shapes = []
        if not name or len(shapes) not in (1, 3) or any(size < 1 for shape in shapes for size in shape):
            raise OnnxqError(
                f"expected shapes like x:1x3x224x224 or x:1x3x224x224,8x3x224x224,16x3x224x224, found {text!r}",
                hint="give one shape, or three: smallest, usual, largest; sizes are positive integers",
            )
        if name in parsed:
            raise OnnxqError(f"expected shapes of {name!r} once, found them twice", hint="give all three in one entry")
        parsed[name] = (shapes[0], shapes[0], shapes[0]) if len(shapes) == 1 else (shapes[0], shapes[1], shapes[2])
    return parsed


def resolve(
    inputs: Mapping[str, Sequence[int]],
    given: Mapping[str, Sequence[Sequence[int]]] | None = None,
    symbols: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Profile]:
    """The profile of every dynamic input.

    Dimensions of one name have one size: what is given for one input holds for the others. An open first dimension
    with nothing given is a batch of 1 to 32, optimised for 8.

    Args:
        inputs: Shapes of the graph's inputs, ``-1`` where a dimension is open.
        given: What the user gave: ``{input: (minimum, usual, maximum)}``.
        symbols: The names of the dimensions of each input, empty where they have none.

    Raises:
        OnnxqError: a name is not an input, a shape does not fit it, or other dimensions than the first are open.
    """
    given = given or {}
    unknown = sorted(set(given) - set(inputs))
    if unknown:
        raise OnnxqError(
            f"expected shapes of the model's inputs, found shapes of {unknown[0]!r}",
            hint=f"the inputs are: {', '.join(inputs)}",
        )
    profiles = {}
    checked = {name: _checked(name, inputs[name], shapes) for name, shapes in given.items()}
    sizes = _sizes_by_symbol(checked, inputs, symbols or {})
    for name, dimensions in inputs.items():
        if name in checked:
            profile = checked[name]
        elif -1 in dimensions:
            profile = _inferred(name, dimensions, (symbols or {}).get(name, ()), sizes)
        if -1 in dimensions:  # a shape that fits a static input is right, and says nothing new
            profiles[name] = profile
    return profiles


def _sizes_by_symbol(
    checked: Mapping[str, Profile], inputs: Mapping[str, Sequence[int]], symbols: Mapping[str, Sequence[str]]
) -> dict[str, Shape]:
    """Smallest, usual and largest size of each named dimension that the user gave."""
    found: dict[str, Shape] = {}
    for name, profile in checked.items():
        for axis, (symbol, size) in enumerate(zip(symbols.get(name, ()), inputs[name], strict=False)):
            if symbol and size == -1:
                found[symbol] = (profile.minimum[axis], profile.usual[axis], profile.maximum[axis])
    return found


def _inferred(name: str, dimensions: Sequence[int], symbols: Sequence[str], sizes: Mapping[str, Shape]) -> Profile:
    """The profile of an input that the user gave no shapes for."""
    known = [sizes.get(symbol) for symbol in symbols] or [None] * len(dimensions)
    batch = (BATCH_MINIMUM, BATCH_USUAL, BATCH_MAXIMUM)
    open_sizes = [item or (batch if axis == 0 else None) for axis, item in enumerate(known)]
    if any(size == -1 and item is None for size, item in zip(dimensions, open_sizes, strict=True)):
        raise OnnxqError(
            f"expected the sizes of the dynamic input {name!r} of shape {_spell(dimensions, '?')}, found none",
            hint=f"give smallest, usual and largest, for example --shapes {_example(name, dimensions)}",
        )
    shapes = [
        tuple(item[which] if size == -1 and item else size for size, item in zip(dimensions, open_sizes, strict=True))
        for which in range(3)
    ]
    return Profile(*shapes)


def _checked(name: str, dimensions: Sequence[int], shapes: Sequence[Sequence[int]]) -> Profile:
    found = [tuple(shape) for shape in shapes]
    fits = len(found) == 3 and all(
        len(shape) == len(dimensions) and all(want in (-1, size) for want, size in zip(dimensions, shape, strict=True))
        for shape in found
    )
    if not fits:
        raise OnnxqError(
            f"expected three shapes that fit input {name!r} of shape {_spell(dimensions, '?')}, "
            f"found {', '.join(_spell(shape) for shape in found) or 'none'}",
            hint=f"for example --shapes {_example(name, dimensions)}",
        )
    minimum, usual, maximum = found
    if any(not 1 <= low <= mid <= high for low, mid, high in zip(minimum, usual, maximum, strict=True)):
        raise OnnxqError(
            f"expected smallest ≤ usual ≤ largest for input {name!r}, found {', '.join(map(_spell, found))}",
            hint="give the three shapes in that order",
        )
    return Profile(minimum, usual, maximum)


def _spell(dimensions: Sequence[int], unknown: str = "-1") -> str:
    return "x".join(unknown if size == -1 else str(size) for size in dimensions)


def _example(name: str, dimensions: Sequence[int]) -> str:
    batches = (BATCH_MINIMUM, BATCH_USUAL, BATCH_MAXIMUM)
    shapes = (
        [size if size != -1 else (batch if axis == 0 else other) for axis, size in enumerate(dimensions)]
        for batch, other in zip(batches, _EXAMPLE, strict=True)
    )
    return f"{name}:{','.join(map(_spell, shapes))}"
