"""Recipes: one paper, one file. This is their registry; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from onnxq.errors import OnnxqError

if TYPE_CHECKING:
    from onnxq.job import Job

# name: (module, class, one line)
RECIPES: dict[str, tuple[str, str, str]] = {
    "default": ("static", "Static", "post-training static quantization from streamed statistics"),
}


class Recipe(Protocol):
    """A frozen dataclass of knobs with one method that reads like the paper's algorithm."""

    def run(self, job: Job) -> None:
        """Quantize ``job.model`` in place."""


def get(name: str) -> type[Recipe]:
    """The recipe's class.

    Raises:
        OnnxqError: there is no such recipe.
    """
    if name not in RECIPES:
        raise OnnxqError(
            f"expected a recipe of {', '.join(RECIPES)}, found {name!r}",
            hint="`onnxq recipes` lists them with their papers",
        )
    module, attribute, _ = RECIPES[name]
    found: type[Recipe] = getattr(importlib.import_module(f"onnxq.recipes.{module}"), attribute)
    return found
