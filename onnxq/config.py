"""The settings of one quantization: from keywords, the command line or a YAML file, checked in one place."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxq.errors import OnnxqError, unwanted
from onnxq.knobs import choices_of


class PreprocessingSettings(BaseModel):
    """How image and text files become the model's input (``preprocess:`` in the YAML file)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: float = Field(default=255.0, gt=0)
    channels: Literal["rgb", "bgr"] = "rgb"
    resize: Literal["crop", "squash"] = "crop"
    tokenizer: str | None = None
    sequence_length: int = Field(default=256, ge=2)


class Settings(BaseModel):
    """Everything that a quantization can be told. The same names are options and YAML keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = "int8"
    target: str = "tensorrt"
    weights: str | None = None
    activations: str | None = None
    first_last: str | None = None
    embeddings: Literal["float", "int8", "int4"] | None = None
    packed_blocks: bool = False
    opset: int | None = Field(default=None, ge=13, le=23)
    base: Literal["float32", "float16", "bfloat16"] = "float32"
    rotate: bool = False
    low_rank: int = Field(default=0, ge=0)
    samples: int | None = Field(default=None, ge=1)
    shapes: dict[str, tuple[Annotated[int, Field(ge=1)], ...]] = Field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    scheduler: str | None = None
    steps: int | None = Field(default=None, ge=1)
    guidance: float = Field(default=1.0, allow_inf_nan=False)
    conditions: str | None = None
    synthesis: Literal["auto", "noise", "pixels", "zeroq", "dsg", "genie", "hast", "texq", "psaq-vit"] = "auto"
    statistics: str | None = None
    budget: Literal["quick", "default", "paper"] = "default"
    device: Literal["cpu", "cuda"] = "cpu"
    custom_ops: tuple[str, ...] = ()
    workers: int = Field(default=1, ge=1, le=1024)
    ray: str | None = None
    knobs: dict[str, Any] = Field(default_factory=dict)
    preprocess: PreprocessingSettings = Field(default_factory=PreprocessingSettings)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Patterns of ``exclude``, and those of ``only``, which name what is not left out, with ``!`` before them."""
        return (*self.exclude, *(f"{NOT}{pattern}" for pattern in self.only))


NOT = "!"
WITHOUT_EFFECT = {"workers", "ray", "custom_ops"}  # on the result: they only say who does the work, and by what


def make_settings(entries: Mapping[str, Any]) -> Settings:
    """Check ``entries``; ``None`` means the default.

    Raises:
        OnnxqError: a name is unknown or a value is of the wrong kind.
    """
    try:
        return Settings(**{key: value for key, value in entries.items() if value is not None})
    except ValidationError as error:
        hint = "`onnxq quantize --help` explains it"
        if error.errors()[0]["type"] == "extra_forbidden":
            hint = f"settings are {', '.join(Settings.model_fields)}; what a recipe can be told goes into knobs={{...}}"
        raise OnnxqError(f"expected {unwanted(error)}", hint=hint) from error


def with_text(
    entries: Mapping[str, Any], tokenizer: str | os.PathLike[str] | None, sequence_length: int | None
) -> dict[str, Any]:
    """Settings with the options for text files put where ``preprocess:`` has them."""
    given = {"tokenizer": None if tokenizer is None else str(tokenizer), "sequence_length": sequence_length}
    chosen = {key: value for key, value in given.items() if value is not None}
    if not chosen:
        return dict(entries)
    return {**entries, "preprocess": {**(entries.get("preprocess") or {}), **chosen}}


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings from a YAML file (read safely: no object is ever built from it)."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
        TypeError,
        yaml.YAMLError,
    ) as error:  # it checks little itself
        raise OnnxqError(
            f"expected a YAML file of settings at {path}, found: {' '.join(str(error).split())[:160]}",
            hint="for example: 'target: cpu' and 'exclude: [Conv_0]', one a line",
        ) from error
    if entries is None:
        return {}
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise OnnxqError(
            f"expected names and values in {path}, found {type(entries).__name__}",
            hint="for example: 'target: cpu', one setting a line",
        )
    return entries


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``knob=value`` pairs of ``--set``; values are read as YAML scalars."""
    import yaml

    knobs: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise OnnxqError(f"expected knob=value, found {assignment!r}", hint="for example --set observer=minmax")
        try:
            knobs[name.strip().replace("-", "_")] = yaml.safe_load(text)
        except (ValueError, RecursionError, TypeError, yaml.YAMLError) as error:
            raise OnnxqError(f"expected a plain value, found {assignment!r}", hint="quote it") from error
    return knobs


def build_knobs(recipe: type[Any], knobs: Mapping[str, Any], name: str) -> Any:
    """The recipe's dataclass with ``knobs`` set, each checked against the type of its default and its choices.

    Raises:
        OnnxqError: the recipe has no such knob, or its value is of another type or no choice of it.
    """
    fields = {field.name: field for field in dataclasses.fields(recipe)}
    checked: dict[str, Any] = {}
    for key, value in knobs.items():
        if key not in fields:
            raise OnnxqError(
                f"expected a knob of recipe {name!r}, found {key!r}",
                hint=f"its knobs are {', '.join(fields) or 'none'}; `onnxq recipes {name}` explains them",
            )
        default = fields[key].default
        kind = type(default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is float and isinstance(value, str):
            with contextlib.suppress(ValueError):  # YAML reads 1e-5 as text
                value = float(value)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        if default is not None and not isinstance(value, kind):
            raise OnnxqError(
                f"expected {kind.__name__} for knob {key!r} of recipe {name!r}, found {value!r}",
                hint=f"its default is {default!r}",
            )
        words = choices_of(fields[key])
        if words and value not in words:
            raise OnnxqError(f"expected {key} of {', '.join(words)}, found {value!r}", hint=f"--set {key}={words[0]}")
        checked[key] = value
    return recipe(**checked)
