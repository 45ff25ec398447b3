"""Text files as inputs of a language model: tokens in sequences of one length, streamed.

A decoder's sequences are cut from the whole file. An encoder's are the lines of the file, each with the marks that the
tokenizer puts at both ends, filled up on the right to one length, with a mask that says what is text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.data import InputSpec, Sample
from onnxq.calibration.tokenizers import Tokenizer
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]

# What a language model reads besides its tokens, by the ends of usual names.
MASKS, POSITIONS = ("attention_mask", "mask"), ("position_ids", "positions")
SEGMENTS = ("token_type_ids", "segment_ids")  # which of two texts; there is one
TOKENS = ("input_ids", "tokens", "ids")
SWITCHES = ("use_cache_branch", "use_cache")  # of a decoder that holds itself twice, with a cache and without
CACHE, ENCODER = "past", "encoder"  # in the names of keys and values that a decoder gets back, or has of an encoder


class Text:
    """Sequences of tokens from a text file: its lines where texts stand alone, else cut one after the other.

    What is left at the end of the last sequence is dropped; what is left of a long line too.

    Args:
        path: A UTF-8 text file.
        tokenizer: What makes tokens of it.
        specs: The model's inputs: tokens [batch, sequence], and masks, positions, segments and a cache where it reads
            them.
        length: Tokens in a sequence, where the model does not fix it; lines that are all shorter are filled up to the
            longest.

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
        if tokenizer.texts_stand_alone:
            self._rows, self._masks = self._lines(path, text, tokenizer)
            return
        tokens = np.asarray(tokenizer.encode(text), np.int64)
        count = len(tokens) // self.length
        if count == 0:
            raise OnnxqError(
                f"expected at least {self.length} tokens in {path}, found {len(tokens)}",
                hint="give more text, or a smaller --sequence-length",
            )
        self._rows = tokens[: count * self.length].reshape(count, self.length)
        self._masks = np.ones_like(self._rows)

    def _lines(self, path: Path, text: str, tokenizer: Tokenizer) -> tuple[Array, Array]:
        """Tokens and masks [lines, sequence]."""
        texts = [line for line in text.splitlines() if line.strip()]
        if not texts:
            raise OnnxqError(f"expected a text a line in {path}, found none", hint="write one sentence a line")
        encoded = tokenizer.encode_texts(texts, self.length)
        if fixed_length(self.specs) is None:
            self.length = max(len(tokens) for tokens in encoded)
        rows = np.full((len(encoded), self.length), tokenizer.padding, np.int64)
        masks = np.zeros_like(rows)
        for row, mask, tokens in zip(rows, masks, encoded, strict=True):
            row[: len(tokens)], mask[: len(tokens)] = tokens, 1
        return rows, masks

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        for row, mask in zip(self._rows, self._masks, strict=True):
            yield {name: value[0] for name, value in text_feed(self.specs, row[None], mask[None]).items()}


def roles_of(specs: Sequence[InputSpec]) -> dict[str, str | None]:
    """What each input takes: ``tokens``, ``mask``, ``positions``, ``segments``, ``cache`` or ``switch``; or ``None``.

    Told by the ends of names; where no input is named as tokens are, the only one of integers [batch, sequence] with
    another name is the tokens.
    """
    roles = {spec.name: _role_by_name(spec) for spec in specs}
    others = [spec.name for spec in specs if roles[spec.name] is None and _is_integer_rows(spec)]
    if "tokens" not in roles.values() and len(others) == 1:
        roles[others[0]] = "tokens"
    return roles


def _role_by_name(spec: InputSpec) -> str | None:
    name = spec.name.lower()
    if spec.dtype.kind == "b":
        return "switch" if name.endswith(SWITCHES) and len(spec.shape) < 2 else None
    if spec.dtype.kind == "f":
        return "cache" if CACHE in name and ENCODER not in name and _grows(spec) else None
    ends = {"mask": MASKS, "positions": POSITIONS, "segments": SEGMENTS, "tokens": TOKENS}
    for role, endings in ends.items():
        if _is_integer_rows(spec) and name.endswith(endings):
            return role
    return None


def has_numbers(spec: InputSpec) -> bool:
    """Whether an input takes floats that no text gives: pictures, or states of an encoder [batch, sequence, width]."""
    sizes = spec.shape[2:] if len(spec.shape) == 3 else spec.shape[1:]
    return spec.dtype.kind == "f" and bool(sizes) and None not in sizes and _role_by_name(spec) is None


def _is_integer_rows(spec: InputSpec) -> bool:
    return spec.dtype.kind in "iu" and len(spec.shape) == 2


def check_roles(specs: Sequence[InputSpec], *, hint: str) -> None:
    """Refuse a model with an input that text does not give.

    Raises:
        OnnxqError: there is one.
    """
    roles = roles_of(specs)
    for spec in specs:
        if roles[spec.name] is None:
            shape = ["free" if size is None else size for size in spec.shape]
            raise OnnxqError(
                "expected a model that reads tokens, masks, positions and segments [batch, sequence] and a cache of "
                f"keys and values of free length, found input {spec.name!r} {spec.dtype} of shape {shape}",
                hint=hint,
            )


def fixed_length(specs: Sequence[InputSpec]) -> int | None:
    """The sequence length that the model was exported for; ``None``: any."""
    roles = roles_of(specs)
    tokens = (spec for spec in specs if roles[spec.name] == "tokens")
    return next((size for spec in tokens if (size := spec.shape[1]) is not None), None)


def text_feed(specs: Sequence[InputSpec], tokens: Array, mask: Array | None = None) -> dict[str, Array]:
    """Whole sequences as an encoder reads them, or a decoder at the start, when nothing is cached yet.

    A cache that is empty says all there is: the keys and values that a quantizer sees behind it are those of every
    position, as they would be if they had come out of the cache one by one.

    Args:
        specs: The model's inputs (see :func:`roles_of`).
        tokens: Tokens [batch, sequence].
        mask: 1 where there is text, 0 where a row is filled up; ``None``: text everywhere.

    Returns:
        Arrays by input name: the tokens, the mask, positions from 0, segments of zeros, caches of length 0 that are to
        be read; where an input has a fixed length of its own, cut to it or begun again.
    """
    mask = np.ones_like(tokens) if mask is None else mask
    values = {"tokens": tokens, "mask": mask, "segments": np.zeros_like(tokens)}
    feed, roles = {}, roles_of(specs)
    for spec in specs:
        role = roles[spec.name] or ""
        if role == "switch":
            feed[spec.name] = np.ones([1 if spec.is_whole else len(tokens)] * len(spec.shape), spec.dtype)
        elif role == "cache":
            feed[spec.name] = np.zeros((len(tokens), *(size or 0 for size in spec.shape[1:])), spec.dtype)
        else:
            places = np.arange(spec.shape[1] or tokens.shape[1])  # the decoder of a translator has a length of its own
            if role == "positions":
                rows = np.broadcast_to(places, (len(tokens), len(places)))
            else:
                rows = values[role][:, places % tokens.shape[1]]
            feed[spec.name] = rows.astype(spec.dtype)
    return feed


def text_sample(specs: Sequence[InputSpec], tokens: Array) -> Sample:
    """What :func:`text_feed` gives for one sequence [length], as a sample without its batch axis."""
    feed = text_feed(specs, tokens[None])
    return {spec.name: feed[spec.name] if spec.is_whole else feed[spec.name][0] for spec in specs}


def without_padding(feed: Mapping[str, Array], output: Array) -> Array:
    """The rows [positions, …] of an output [batch, sequence, …] where the mask says that there is text.

    An output of another shape, or of a model that reads no mask, comes back as it is: what a model says of positions
    that fill up a short text is read by nobody.
    """
    for name, value in feed.items():
        is_mask = name.lower().endswith(MASKS) and value.dtype.kind in "iub" and value.ndim == 2
        if is_mask and output.ndim == 3 and output.shape[:2] == value.shape:
            rows: Array = output[value != 0]
            return rows
    return output


def _grows(spec: InputSpec) -> bool:
    """Whether a cache [batch, …] has one free axis besides the batch, along which it is as long as the past."""
    return spec.shape[1:].count(None) == 1
