"""Write the pages of this folder that follow from docstrings: recipes, commands, rules, the Python interface.

    python docs/generate.py [FOLDER]

A test fails while a page differs from what this writes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main
from typer.cli import get_docs_for_click

import onnxq
from onnxq import recipes
from onnxq.cli import app
from onnxq.docstrings import entries, knob_meanings, sections
from onnxq.knobs import choices_of

NOTE = "<!-- Written by docs/generate.py from the docstrings. -->\n\n"


def main(folder: Path) -> None:
    """Write all pages."""
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NOTE + text.rstrip() + "\n", encoding="utf-8")


def pages() -> dict[str, str]:
    """The text of each page, by its path in this folder."""
    found = {f"recipes/{name}.md": recipe_page(name, entry) for name, entry in recipes.RECIPES.items()}
    found["recipes/README.md"] = recipe_index()
    found["commands.md"] = commands_page()
    found["rules.md"] = rules_page()
    found["api.md"] = api_page()
    return found


def recipe_index() -> str:
    """All recipes, a line each."""
    rows = [f"| [`{name}`]({name}.md) | {entry.line} |" for name, entry in recipes.RECIPES.items()]
    return "\n".join(["# Recipes", "", "| recipe | what it does |", "|---|---|", *rows])


def recipe_page(name: str, entry: recipes.Entry) -> str:
    """What a recipe does, whose idea it is, where it departs from it, and its knobs."""
    recipe: Any = entry.load()
    parts = sections(inspect.getdoc(recipe) or "")
    parts.pop("Attributes", None)
    meanings = knob_meanings(recipe)
    rows = []
    for item in dataclasses.fields(recipe):
        default = entry.knobs.get(item.name, item.default)
        words = "".join(f", `{word}`" for word in choices_of(item) if word != default)
        rows.append(f"| `{item.name}` | `{default}`{words} | {one_line(meanings.get(item.name, ''))} |")
    only = "" if entry.target is None else f" Target: {entry.target} alone."
    formats = f"Weights: {entry.weights or 'the default of the target'}. Activations: "
    lines = [
        f"# {name}", "", f"{entry.line[0].upper()}{entry.line[1:]}.", "",
        "```sh", f"onnxq quantize model.onnx --recipe {name}", "```", "",
        formats + f"{entry.activations or 'the default of the target'}.{only}", "",
        markdown(parts.pop("")), "",
    ]  # fmt: skip
    for title, text in parts.items():
        lines += [f"## {title}", "", markdown(text), ""]
    lines += [
        "## Knobs (`--set name=value`)",
        "",
        "| knob | default, other choices | meaning |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines)


def commands_page() -> str:
    """Every command with its options, as ``--help`` has them."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="onnxq")
    return re.sub(r"[ \t]+$", "", str(text), flags=re.MULTILINE)


def rules_page() -> str:
    """What a graph must keep to so that a target runs it in low precision: the lint's rules."""
    lines = ["# What the targets want", "", "`onnxq lint model.onnx --target TARGET` finds what breaks these.", ""]
    for target in ("tensorrt", "cpu"):
        lines += [f"## {target}", ""]
        for rules in rules_of(target):
            lines += [f"- {one_line(inspect.getdoc(check) or name)}" for name, check in rules.items()]
        lines += [""]
    return "\n".join(lines)


def rules_of(target: str) -> Iterator[Mapping[str, Callable[..., Any]]]:
    """The tables of a target's rules, errors first."""
    for module in (f"{target}_lint", f"{target}_advice"):
        try:
            loaded = importlib.import_module(f"onnxq.targets.{module}")
        except ModuleNotFoundError:
            continue
        for table in ("ERRORS", "WARNINGS", "ADVICE", "RULES"):
            rules = getattr(loaded, table, None)
            if rules and next(iter(rules.values())).__module__ == loaded.__name__:
                yield rules


def api_page() -> str:
    """The names that ``import onnxq`` gives."""
    lines = ["# From Python", ""]
    for name in onnxq.__all__:
        item = getattr(onnxq, name)
        lines += [f"## onnxq.{name}", ""]
        if inspect.isfunction(item):
            lines += ["```python", f"{name}{inspect.signature(item)}", "```", ""]
        parts = sections(inspect.getdoc(item) or "")
        lines += [markdown(parts.pop("")), ""]
        for title, text in parts.items():
            lines += [f"**{title}**", ""]
            lines += [f"- `{key}`: {one_line(meaning)}" for key, meaning in entries(text).items()] or [markdown(text)]
            lines += [""]
    return "\n".join(lines)


def markdown(text: str) -> str:
    """Double backticks and roles of reStructuredText become Markdown's single ones."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def one_line(text: str) -> str:
    """The text in one line, fit for a table."""
    return markdown(" ".join(text.split())).replace("|", "\\|")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
