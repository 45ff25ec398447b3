"""The pages of docs/ say what the docstrings say, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from onnxq.recipes import RECIPES

pytest.importorskip("torch", reason="pages of recipes that learn need torch")
DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_generated_pages_are_current(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.main(tmp_path)
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.md")}
    stale = [
        str(name) for name, text in written.items() if not (DOCS / name).is_file() or (DOCS / name).read_text() != text
    ]
    assert not stale, "run python docs/generate.py"
    pages = {path.stem for path in (DOCS / "recipes").glob("*.md")} - {"README"}
    assert pages == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_knob_is_explained(recipe: str) -> None:
    page = (DOCS / "recipes" / f"{recipe}.md").read_text()
    knobs = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert knobs and all(meaning.strip() for _, _, meaning in knobs), [name for name, _, text in knobs if not text]


def test_links_lead_to_files() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_is_advised_exists() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|", (DOCS / "choosing.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row) if not name.startswith(("-", "onnxq"))}
    assert len(named) > 10
    assert not named - set(RECIPES)
