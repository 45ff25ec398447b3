"""The pages of docs/ say what the docstrings say, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from conftest import MODELS
from test_cli_errors import run

from onnxq.cli import app
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


PAGES = [page for page in DOCS.rglob("*.md") if page.parent.name != "recipes"]
EXAMPLES = sorted({line for page in PAGES for line in re.findall(r"^Example: `(onnxq .+)`$", page.read_text(), re.M)})


def test_examples_of_the_commands_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, in one folder, on the models that ship; only the counts are cut short."""
    for name, model in (
        ("model", "fashion_resnet"),
        ("unet", "fashion_unet_guided"),
        ("unet.int8", "fashion_unet_guided"),
    ):
        (tmp_path / f"{name}.onnx").symlink_to(MODELS / f"{model}.onnx")
    (tmp_path / "calibration.npz").symlink_to(MODELS / "fashion_calibration.npz")
    (tmp_path / "scheduler_config.json").symlink_to(MODELS / "fashion_unet_guided.scheduler.json")
    assert len(EXAMPLES) >= 4
    monkeypatch.chdir(tmp_path)
    short = {"sample": ["--steps", "2", "-n", "1"], "trajectories": ["--steps", "2", "-n", "2"]}
    for line in EXAMPLES:
        words = shlex.split(line)[1:]
        if words[0] == "trajectories":
            (tmp_path / "calibration.npz").unlink()  # it would be written into the folder of the models
        code, stderr = run(capsys, *words, *short.get(words[0], ["-n", "8"]), "-q")
        assert code == 0, f"{line}\n{stderr}"


def test_options_that_pages_name_exist() -> None:
    """``--option`` anywhere in the pages written by hand."""
    command = typer.main.get_command(app)
    known = {
        option
        for inner in command.commands.values()  # type: ignore[attr-defined]
        for parameter in inner.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for page in ("choosing.md", "limits.md", "README.md"):
        named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", (DOCS / page).read_text()))
        assert named <= known | {"--set", "--help"}, (page, named - known)
