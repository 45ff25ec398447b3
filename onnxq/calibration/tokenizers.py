"""Tokenizers that the user names: Hugging Face's ``tokenizer.json`` or folder, and the vocabulary files of llama2.c."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from onnxq.errors import OnnxqError

UNKNOWN, BEGIN, FIRST_BYTE = 0, 1, 3
BYTES = 256


class Tokenizer(Protocol):
    """Text to tokens."""

    @property
    def texts_stand_alone(self) -> bool:
        """Whether a text gets a mark at both ends, as encoders read sentences; a decoder reads on and on."""

    @property
    def padding(self) -> int:
        """The token that fills a short text."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a document, with the mark of its beginning where the vocabulary has one."""

    def encode_texts(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """The tokens of texts that stand alone, each cut to a length that includes its marks."""


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer from its file.

    Raises:
        OnnxqError: there is no such file, it is of no known kind, or the package that reads it is missing.
    """
    file = Path(path)
    if file.is_dir():
        return _of_folder(file)
    if not file.is_file():
        raise OnnxqError(f"expected a tokenizer at {file}, found nothing", hint="check --tokenizer")
    if file.suffix == ".json":
        return _of_file(file)
    if file.suffix == ".bin":
        return read_llama2c(file)
    raise OnnxqError(
        f"expected a tokenizer.json, a tokenizer's folder or a .bin of llama2.c, found {file.name}",
        hint="for another tokenizer, write the tokens to an .npz keyed by the model's input names",
    )


def read_folder(folder: Path) -> Any:
    """The tokenizer of the package transformers from a folder, as models are published with; nothing is downloaded.

    Raises:
        OnnxqError: the folder holds none, or the package is missing.
    """
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise OnnxqError(
            f"expected the package transformers to read the tokenizer in {folder}, found it not installed",
            hint="pip install 'onnxq[prompts]'",
        ) from error
    hint = "copy the folder from where the model comes from: tokenizer_config.json and the vocabulary"
    if not folder.is_dir():
        raise OnnxqError(f"expected a tokenizer in {folder}, found nothing", hint=hint)
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # it knows many kinds
        raise OnnxqError(f"expected a tokenizer in {folder}, found {_reason(error)}", hint=hint) from error


def _of_folder(folder: Path) -> Tokenizer:
    tokenizer = read_folder(folder)
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise OnnxqError(
            f"expected a tokenizer that Hugging Face's tokenizers run in {folder}, found a {type(tokenizer).__name__}",
            hint="write the tokens to an .npz keyed by the model's input names",
        )
    return _HuggingFace(inner, folder, tokenizer.pad_token_id or 0, tokenizer.model_max_length)


def _of_file(file: Path) -> Tokenizer:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise OnnxqError(
            "expected the package tokenizers to read a tokenizer.json, found it not installed",
            hint="pip install 'onnxq[text]'",
        ) from error
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise OnnxqError(
            f"expected a tokenizer.json in {file}, found something else ({_reason(error)})",
            hint="it is the file that Hugging Face's tokenizers save",
        ) from error
    return _HuggingFace(inner, file, (inner.padding or {}).get("pad_id", 0))


def _reason(error: Exception) -> str:
    """One line of what another package says."""
    return " ".join(str(error).split())[:120] or type(error).__name__


class _HuggingFace:
    """A tokenizer of the package tokenizers.

    Args:
        inner: It.
        path: Where it comes from.
        padding: The token that fills a short text.
        longest: The tokens that its model reads at most.
    """

    def __init__(self, inner: Any, path: Path, padding: int, longest: int | None = None) -> None:
        # The files may ask for both, as the model's users want a sentence, not as a whole file needs.
        inner.no_truncation()
        inner.no_padding()
        self.inner, self.path, self.padding, self.longest = inner, path, padding, longest
        self.texts_stand_alone = inner.num_special_tokens_to_add(False) > 1

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        try:
            return list(self.inner.encode(text).ids)
        except Exception as error:  # it knows no other kind
            raise OnnxqError(
                f"expected a tokenizer that takes any text in {self.path}, found: {_reason(error)}",
                hint="a vocabulary without a token for what it does not know takes only text that it knows",
            ) from error

    def encode_texts(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """See :class:`Tokenizer`."""
        self.inner.enable_truncation(min(length, self.longest or length))
        encoded = [list(found.ids) for found in self.inner.encode_batch(list(texts))]
        self.inner.no_truncation()
        return encoded


def read_llama2c(file: Path) -> BytePairs:
    """The vocabulary file of llama2.c: the longest piece's length, then a score and the bytes of each piece."""
    data = file.read_bytes()
    pieces: list[bytes] = []
    scores: list[float] = []
    offset = 4
    while offset + 8 <= len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        if not 0 <= length <= len(data) - offset:
            break
        pieces.append(data[offset : offset + length])
        scores.append(score)
        offset += length
    if offset != len(data) or len(pieces) < FIRST_BYTE + BYTES:
        raise OnnxqError(
            f"expected a vocabulary of llama2.c in {file}, found something else", hint="its export writes tokenizer.bin"
        )
    return BytePairs(tuple(pieces), tuple(scores))


@dataclass(frozen=True)
class BytePairs:
    """Byte pairs merged by score, best first, as SentencePiece does it.

    Attributes:
        pieces: The bytes of each token; from the fourth on, 256 of them stand for single bytes.
        scores: The higher, the earlier two neighbours merge into the piece.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    texts_stand_alone: bool = False
    padding: int = UNKNOWN

    def encode_texts(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """The tokens of each text, cut to a length."""
        return [self.encode(text)[:length] for text in texts]

    def encode(self, text: str) -> list[int]:
        """Tokens of the text; characters that are no piece become bytes. A line is merged at a time."""
        index = {piece: token for token, piece in reversed(list(enumerate(self.pieces)))}
        tokens = [BEGIN]
        for number, line in enumerate(text.splitlines(keepends=True)):
            tokens += self._merged(self._characters((" " if number == 0 else "") + line, index), index)
        return tokens

    def _characters(self, text: str, index: dict[bytes, int]) -> list[int]:
        tokens: list[int] = []
        for character in text:
            encoded = character.encode()
            known = index.get(encoded)
            tokens += [known] if known is not None else [FIRST_BYTE + byte for byte in encoded]
        return tokens

    def _merged(self, tokens: list[int], index: dict[bytes, int]) -> list[int]:
        while True:
            best, where, merged = float("-inf"), -1, -1
            for position, (left, right) in enumerate(itertools.pairwise(tokens)):
                found = index.get(self.pieces[left] + self.pieces[right])
                if found is not None and self.scores[found] > best:
                    best, where, merged = self.scores[found], position, found
            if where < 0:
                return tokens
            tokens[where : where + 2] = [merged]
