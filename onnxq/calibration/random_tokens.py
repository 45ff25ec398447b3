"""Random tokens for models that read text and write none: encoders, whose own words nobody can have them say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.calibration.data import InputSpec, Sample
from onnxq.calibration.text import check_roles, fixed_length, has_numbers, roles_of, text_sample
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]

LENGTH = 32
HINT = "give --data FILE.txt with --tokenizer, or FILE.npz keyed by input name"

SAME_TOKENS = ("Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Where", "Add", "Sub", "Mul", "Clip",
               "Max", "Min")  # fmt: skip
"""What exporters put between tokens and their table, to count from the end or to stay inside it."""


class RandomTokens:
    """Tokens of the model's vocabulary, each as likely as the other, and normal numbers for what is no text.

    Embeddings of random words are real embeddings, so that ranges are nearer to those of text than noise would be;
    attention and what it finds are not those of text.

    Args:
        model: A model that looks its tokens up in a table.
        specs: Its inputs: tokens, and masks, positions, segments, pictures or states of an encoder where it reads
            them.
        count: How many sequences.
        seed: The same seed gives the same tokens.
        length: Tokens in a sequence, where the model does not fix it.

    Raises:
        OnnxqError: the model reads something else, or how many tokens it knows cannot be told.
    """

    def __init__(
        self, model: ir.Model, specs: Sequence[InputSpec], *, count: int, seed: int, length: int = LENGTH
    ) -> None:
        self.numbers = [spec for spec in specs if has_numbers(spec)]
        self.specs = [spec for spec in specs if not has_numbers(spec)]
        check_roles(self.specs, hint=HINT)
        size = vocabulary_size(model, specs)
        if size is None:
            raise OnnxqError("expected a table that tokens are looked up in, found none", hint=HINT)
        self.length, self.seed = fixed_length(self.specs) or length, seed
        self._rows = np.random.default_rng(seed).integers(0, size, (count, self.length))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        generator = np.random.default_rng((self.seed, 1))
        for row in self._rows:
            sample = text_sample(self.specs, row)
            for spec in self.numbers:
                shape = [size or self.length for size in spec.shape[1:]]
                sample[spec.name] = generator.standard_normal(shape, np.float32).astype(spec.dtype)
            yield sample


def vocabulary_size(model: ir.Model, specs: Sequence[InputSpec]) -> int | None:
    """How many tokens the model knows: rows of the table that they index; ``None`` where there is no such table."""
    tokens = {name for name, role in roles_of(specs).items() if role == "tokens"}
    for node in model.graph.all_nodes():
        if not graphs.is_op(node, "Gather") or node.attributes.get_int("axis", 0) != 0:
            continue
        table, indices = node.inputs[:2]
        if table is not None and table.shape is not None and tokens & _made_from(indices):
            rows = table.shape[0]
            return rows if isinstance(rows, int) else None
    return None


def _made_from(indices: ir.Value | None) -> set[str]:
    """Names of the values that the indices of a table are, but for a type, a shape or an offset."""
    reached = [] if indices is None else [indices]
    for value in reached:  # grows meanwhile
        maker = value.producer()
        if maker is not None and graphs.is_op(maker, *SAME_TOKENS):
            reached.extend(source for source in maker.inputs if source is not None and source not in reached)
    return {value.name for value in reached if value.name}
