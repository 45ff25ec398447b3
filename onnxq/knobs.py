"""Knobs of recipes that are a choice of words, so that another word is refused before anything is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

CHOICES = "choices"


def choice(*words: str) -> Any:
    """A knob that takes one of ``words``; the first is its default."""
    return dataclasses.field(default=words[0], metadata={CHOICES: words})


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The words that a knob takes; empty where it takes any value of its type."""
    return tuple(field.metadata.get(CHOICES, ()))
