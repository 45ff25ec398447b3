"""Text that a language model writes itself, for calibrating it where there is no data.

Source: Z. Liu et al., LLM-QAT, 2023 (arXiv 2305.17888), section 3.1: a random first token, the most likely ones after
it, then samples from what the model predicts. A model that reads a cache of keys and values and returns it reads each
token once; without one the time grows with the square of the sequences' length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import InputSpec, Sample, fixed_batch
from onnxq.calibration.text import check_roles, fixed_length, roles_of, text_feed, text_sample
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

Array = np.ndarray[Any, Any]

GREEDY_TOKENS = 4  # after the first; the rest is sampled
LENGTH = 64
BATCH = 16
TOLERANCE = 1e-3  # of the largest score: more apart, what was returned is not the cache


class GeneratedText:
    """Sequences of tokens that the model continues from a random first token.

    Args:
        model: The float model: tokens (and masks and positions) [batch, sequence] and an empty cache to logits.
        specs: Its inputs.
        count: How many sequences.
        seed: The same seed gives the same tokens.
        length: Tokens in a sequence, where the model does not fix it.

    Raises:
        OnnxqError: the model reads something else, or gives no logits for each token.
    """

    def __init__(
        self, model: ir.Model, specs: Sequence[InputSpec], *, count: int, seed: int, length: int = LENGTH
    ) -> None:
        self.specs = list(specs)
        check_roles(specs, hint="give --data FILE.npz keyed by input name")
        self.fixed = fixed_length(specs)
        self.batch = fixed_batch(specs) or BATCH
        self.length = self.fixed or length
        self.count, self.seed = count, seed
        self._session = Session(model)
        self._caches = self._paired_caches()
        parts = [self._write(start) for start in range(0, count, self.batch)]
        self._rows = np.concatenate(parts)[:count]
        del self._session

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        for row in self._rows:
            yield text_sample(self.specs, row)

    def _write(self, start: int) -> Array:
        generator = np.random.default_rng((self.seed, start))
        tokens = np.zeros((self.batch, self.length), np.int64)
        past = self._empty()
        vocabulary = self._logits(tokens[:, :1], 0).shape[-1]
        tokens[:, 0] = generator.integers(0, vocabulary, self.batch)
        for position in range(1, self.length):
            if self._caches:
                found, past = self._step(tokens[:, :position], past)
                logits = found.astype(np.float64)
            else:
                logits = self._logits(tokens[:, :position], position - 1).astype(np.float64)
            if position > GREEDY_TOKENS:  # the largest of logits with Gumbel noise is a sample of their softmax
                logits = logits + generator.gumbel(size=logits.shape)
            tokens[:, position] = logits.argmax(axis=-1)
        return tokens

    def _logits(self, tokens: Array, position: int) -> Array:
        """Scores of the token after a position."""
        if self.fixed is not None:
            tokens = np.pad(tokens, ((0, 0), (0, self.fixed - tokens.shape[1])))
        found = self._session.run(text_feed(self.specs, tokens), self._session.output_names[:1])[0]
        if found.ndim != 3 or found.shape[:2] != tokens.shape:
            raise OnnxqError(
                f"expected logits [batch, sequence, vocabulary] of a language model, found shape {list(found.shape)}",
                hint="give --data; text is written only by decoders",
            )
        return np.asarray(found[:, position])

    def _paired_caches(self) -> dict[str, str]:
        """The output that holds what each cache is after a token; empty where no cache can be given back.

        Taken to be in the same order, and tried: two tokens, read one by one and together, have to say the same.
        """
        roles = roles_of(self.specs)
        caches = [spec for spec in self.specs if roles[spec.name] == "cache"]
        paired = {spec.name: name for spec, name in zip(caches, self._session.output_names[1:], strict=False)}
        if not caches or len(paired) < len(caches) or self.fixed is not None:
            return {}
        self._caches = paired
        tokens = np.repeat([[1, 0]], self.batch, axis=0)
        together = self._logits(tokens, 1)
        try:
            _, past = self._step(tokens[:, :1], self._empty())
            apart, _ = self._step(tokens, past)
        except OnnxqError:
            return {}
        near = apart.shape == together.shape and np.abs(apart - together).max() <= TOLERANCE * np.abs(together).max()
        return paired if near else {}

    def _step(self, tokens: Array, past: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Scores of the token after the last, which alone is read, and the caches after it."""
        feed = text_feed(self.specs, tokens)
        for name, role in roles_of(self.specs).items():
            if role != "mask":  # which is as long as the cache and what is new together
                feed[name] = past[name] if role == "cache" else feed[name][:, -1:]
        names = [self._session.output_names[0], *self._caches.values()]
        logits, *caches = self._session.run(feed, names)
        return np.asarray(logits[:, -1]), dict(zip(self._caches, caches, strict=True))

    def _empty(self) -> dict[str, Array]:
        """Caches of no tokens."""
        feed = text_feed(self.specs, np.zeros((self.batch, 1), np.int64))
        return {name: feed[name] for name, role in roles_of(self.specs).items() if role == "cache"}
