"""What docstrings say, in parts: recipes explain themselves to the command line and to the documentation with them."""

from __future__ import annotations

import dataclasses
import inspect
import re

SECTIONS = ("Source", "Departures", "Attributes", "Args", "Returns", "Raises")


def sections(doc: str) -> dict[str, str]:
    """A docstring's text (under ``""``) and its sections by title."""
    found: dict[str, list[str]] = {"": []}
    title = ""
    for line in doc.splitlines():
        head = re.match(rf"({'|'.join(SECTIONS)}):(.*)", line)
        if head:
            title = head[1]
            found[title] = [head[2].strip()]
            continue
        if title not in ("", "Source") and line and not line.startswith(" "):
            title = ""  # the section has ended
        found[title].append(line)
    return {key: inspect.cleandoc("\n".join(lines)).strip() for key, lines in found.items()}


def entries(text: str) -> dict[str, str]:
    """``name: meaning`` entries of a section, which may go on in indented lines."""
    parts = re.split(r"\n(?=\S)", text)
    pairs = (part.partition(":") for part in parts if re.match(r"[\w*]+:", part))
    return {key: " ".join(meaning.split()) for key, _, meaning in pairs}


def knob_meanings(recipe: type) -> dict[str, str]:
    """What each knob of a recipe means: as its docstring says, or that of the class which it has the knob from."""
    found: dict[str, str] = {}
    for owner in recipe.__mro__:
        if dataclasses.is_dataclass(owner):
            found = entries(sections(inspect.getdoc(owner) or "").get("Attributes", "")) | found
    return found
