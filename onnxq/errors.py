"""The one exception that users of onnxq meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

# What torch (on either device), onnxruntime and C++ say, each in an exception of its own.
NO_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "bad allocation")
LESS_MEMORY = "use fewer or smaller samples, a smaller batch (--set batch=), or a machine with more memory"


class OnnxqError(Exception):
    """Something the user can put right.

    Args:
        message: One line: what was expected, what was found and where (node, tensor or file name).
        hint: One line: what to do about it.

    The command line prints ``error: message`` and ``  tip: hint`` and exits with code 2.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class CheckError(OnnxqError):
    """A result was made but does not pass its own check (exit code 1)."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is what a library raises where memory ran out, the machine's or the GPU's."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def unwanted(error: ValidationError) -> str:
    """What an :class:`OnnxqError` says after "expected" of the first value that pydantic refused."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    found = "" if not where else f", found {first.get('input')!r}"
    return f"another value{' for ' * bool(where)}{where}: {first['msg'].lower()}{found}"
