"""Text files as inputs of a language model: tokens in sequences of one length, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onnxq.calibration.data import InputSpec, Sample
from onnxq.calibration.tokenizers import Tokenizer
from onnxq.errors import OnnxqError

# What a decoder reads besides its tokens, by the ends of usual names.
MASKS, POSITIONS = ("attention_mask", "mask"), ("position_ids", "positions")
TOKENS = ("input_ids", "tokens", "ids")


class Text:
    """Sequences of tokens cut from a text file one after the other; what is left at the end is dropped.

    Args:
        path: A UTF-8 text file.
        tokenizer: What makes tokens of it.
        specs: The model's inputs: tokens [batch, sequence], and masks (ones) and positions where it reads them.
        length: Tokens in a sequence, where the model does not fix it.

    Raises:
        OnnxqError: the file is no text or too short, or the model has an input that text does not give.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, specs: Sequence[InputSpec], length: int) -> None:
        self.specs = list(specs)
        for spec in specs:
            if spec.dtype.kind not in "iu" or len(spec.shape) != 2 or role_of(spec) is None:
                raise OnnxqError(
                    f"expected a model that reads tokens, masks and positions [batch, sequence], found input "
                    f"{spec.name!r} {spec.dtype} of shape {list(spec.shape)}",
                    hint="write an .npz keyed by the model's input names; a decoder with a cache needs its start too",
                )
        self.length = next((size for spec in specs if (size := spec.shape[1]) is not None), None) or length
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
            values = {"tokens": row, "mask": np.ones_like(row), "positions": np.arange(self.length)}
            yield {spec.name: values[role_of(spec) or ""].astype(spec.dtype) for spec in self.specs}


def role_of(spec: InputSpec) -> str | None:
    """What of text an input takes: ``tokens``, ``mask`` or ``positions``; ``None``: something else."""
    for role, endings in (("mask", MASKS), ("positions", POSITIONS), ("tokens", TOKENS)):
        if spec.name.lower().endswith(endings):
            return role
    return None
