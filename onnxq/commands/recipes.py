"""What there is to choose from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from onnxq.commands.common import JsonPath, write_json

INDENT = " " * 6


def recipes(
    name: Annotated[str | None, typer.Argument(help="One recipe, in full.", show_default=False)] = None,
    json_path: JsonPath = None,
) -> None:
    """List the recipes; with a NAME, its paper, its algorithm and its knobs with their defaults."""
    import dataclasses
    import inspect
    import textwrap

    from onnxq import recipes as registry
    from onnxq.docstrings import knob_meanings
    from onnxq.knobs import choices_of

    if name is None:
        write_json(json_path, {key: entry.line for key, entry in registry.RECIPES.items()})
        for key, entry in registry.RECIPES.items():
            formats = f" [{entry.weights or 'any'}/{entry.activations or 'any'}]"
            typer.echo(f"{key:14} {entry.line}{formats if entry.weights or entry.activations else ''}")
        typer.echo("In brackets: the formats of weights and activations that a recipe brings.")
        return
    entry = registry.get(name)
    recipe: Any = entry.load()
    knobs = {field.name: entry.knobs.get(field.name, field.default) for field in dataclasses.fields(recipe)}
    formats_given = {"weights": entry.weights, "activations": entry.activations}
    write_json(json_path, {"recipe": registry.canonical(name), **formats_given, "knobs": knobs})
    typer.echo((inspect.getdoc(recipe) or "").partition("Attributes:")[0].rstrip())
    typer.echo("\nFormats (--weights, --activations):")
    for what, given in formats_given.items():
        typer.echo(f"  {what} = {given or 'the default of the target'}")
    typer.echo("\nKnobs (--set name=value):")
    words, meanings = {field.name: choices_of(field) for field in dataclasses.fields(recipe)}, knob_meanings(recipe)
    for key, value in knobs.items():
        others = [word for word in words[key] if word != value]
        typer.echo(f"  {key} = {value!r}" + (f", or {', '.join(others)}" if others else ""))
        typer.echo(textwrap.fill(meanings.get(key, ""), 116, initial_indent=INDENT, subsequent_indent=INDENT))
