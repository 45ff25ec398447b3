"""Text files as inputs of a language model: tokens in sequences of one length, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.data import InputSpec, Sample
from onnxq.calibration.tokenizers import Tokenizer
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]

# What a decoder reads besides its tokens, by the ends of usual names.
MASKS, POSITIONS = ("attention_mask", "mask"), ("position_ids", "positions")
TOKENS = ("input_ids", "tokens", "ids")
CACHE, ENCODER = "past", "encoder"  # in the names of keys and values that a decoder gets back, or has of an encoder


class Text:
    """Sequences of tokens cut from a text file one after the other; what is left at the end is dropped.

    Args:
        path: A UTF-8 text file.
        tokenizer: What makes tokens of it.
        specs: The model's inputs: tokens [batch, sequence], and masks, positions and a cache where it reads them.
        length: Tokens in a sequence, where the model does not fix it.

    Raises:
        OnnxqError: the file is no text or too short, or the model has an input that text does not give.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, specs: Sequence[InputSpec], length: int) -> None:
        self.specs = list(specs)
        check_roles(specs, hint="write an .npz keyed by the model's input names")
        self.length = fixed_length(specs) or length
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OnnxqError(f"expected UTF-8 text in {path}, found: {error}", hint="check --data") from error
        tokens = np.asarray(tokenizer.encode(text), np.int64)
        count = len(tokens) // self.length
        if count == 0:
            raise OnnxqError(
                f"expected at least {self.length} tokens in {path}, found {len(tokens)}",
                hint="give more text, or a smaller --sequence-length",
            )
        self._rows = tokens[: count * self.length].reshape(count, self.length)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        for row in self._rows:
            yield {name: value[0] for name, value in decoder_feed(self.specs, row[None]).items()}


def role_of(spec: InputSpec) -> str | None:
    """What a decoder's input takes: ``tokens``, ``mask``, ``positions`` or ``cache``; ``None``: something else."""
    name = spec.name.lower()
    if spec.dtype.kind == "f":
        return "cache" if CACHE in name and ENCODER not in name and _grows(spec) else None
    for role, endings in (("mask", MASKS), ("positions", POSITIONS), ("tokens", TOKENS)):
        if spec.dtype.kind in "iu" and len(spec.shape) == 2 and name.endswith(endings):
            return role
    return None


def check_roles(specs: Sequence[InputSpec], *, hint: str) -> None:
    """Refuse a model with an input that text does not give.

    Raises:
        OnnxqError: there is one.
    """
    for spec in specs:
        if role_of(spec) is None:
            shape = ["free" if size is None else size for size in spec.shape]
            raise OnnxqError(
                f"expected a model that reads tokens, masks and positions [batch, sequence] and a cache of keys and "
                f"values of free length, found input {spec.name!r} {spec.dtype} of shape {shape}",
                hint=hint,
            )


def fixed_length(specs: Sequence[InputSpec]) -> int | None:
    """The sequence length that the model was exported for; ``None``: any."""
    tokens = (spec for spec in specs if role_of(spec) == "tokens")
    return next((size for spec in tokens if (size := spec.shape[1]) is not None), None)


def decoder_feed(specs: Sequence[InputSpec], tokens: Array) -> dict[str, Array]:
    """Whole sequences as a decoder reads them at the start, when nothing is cached yet.

    A cache that is empty says all there is: the keys and values that a quantizer sees behind it are those of every
    position, as they would be if they had come out of the cache one by one.

    Args:
        specs: The model's inputs (see :func:`role_of`).
        tokens: Tokens [batch, sequence].

    Returns:
        Arrays by input name: the tokens, masks of ones, positions from 0, caches of length 0.
    """
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    values = {"tokens": tokens, "mask": np.ones_like(tokens), "positions": positions}
    feed = {}
    for spec in specs:
        role = role_of(spec) or ""
        if role == "cache":
            feed[spec.name] = np.zeros((len(tokens), *(size or 0 for size in spec.shape[1:])), spec.dtype)
        else:
            feed[spec.name] = values[role].astype(spec.dtype)
    return feed


def _grows(spec: InputSpec) -> bool:
    """Whether a cache [batch, …] has one free axis besides the batch, along which it is as long as the past."""
    return spec.shape[1:].count(None) == 1
