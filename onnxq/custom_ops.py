"""Libraries of custom ops, of which onnxruntime is told in this process and in those that it starts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from onnxq.errors import OnnxqError

VARIABLE = "ONNXQ_CUSTOM_OPS"  # so that processes that are started know them, too


def use(libraries: Iterable[str | os.PathLike[str]]) -> None:
    """Tell every session that is opened from now on of some libraries, beside those told before.

    Raises:
        OnnxqError: there is no such file.
    """
    known = list_libraries()
    for library in libraries:
        path = Path(library).absolute()
        if not path.is_file():
            raise OnnxqError(
                f"expected a library of custom ops at {library}, found nothing",
                hint="name the shared library that onnxruntime's register_custom_ops_library would take",
            )
        known.append(str(path))
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys(known))


def list_libraries() -> list[str]:
    """The paths of the libraries."""
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
