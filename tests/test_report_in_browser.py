"""Reports as a browser shows them: what is on the page, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS
from PIL import Image

from onnxq.cli import app

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
LIGHT, DARK = 1, 0
PAGE = {LIGHT: (0xF6, 0xF7, 0xF9), DARK: (0x14, 0x16, 0x1B)}
BARS = {LIGHT: (0x4C, 0x78, 0xC9), DARK: (0x6F, 0x9B, 0xEA)}


def browse(page: Path, folder: Path, *flags: str) -> str:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.decode()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    model, data = str(MODELS / "fashion_resnet.onnx"), str(MODELS / "fashion_calibration.npz")
    pages = {name: folder / f"{name}.html" for name in ("quantize", "analyze")}
    common = ["--data", data, "-n", "16", "-q", "--report"]
    app(["quantize", model, *common, str(pages["quantize"]), "-o", str(folder / "q.onnx")], standalone_mode=False)
    app(["analyze", model, *common, str(pages["analyze"])], standalone_mode=False)
    return pages


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_it_is_drawn_in_light_and_dark(reports: dict[str, Path], tmp_path: Path, scheme: int) -> None:
    picture = tmp_path / "page.png"
    flags = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,2400", f"--screenshot={picture}")
    browse(reports["quantize"], tmp_path, *flags)
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert tuple(pixels[0]) == PAGE[scheme]
    assert (pixels == PAGE[scheme]).all(axis=1).mean() > 0.1
    assert (pixels == BARS[scheme]).all(axis=1).mean() > 0.005  # the layers' bars and the histograms
    assert len(np.unique(pixels, axis=0)) > 50  # and text


def test_what_is_on_the_page(reports: dict[str, Path], tmp_path: Path) -> None:
    quantized = browse(reports["quantize"], tmp_path, "--dump-dom")
    for title in ("How it was made", "Layers", "Layer by layer", "Quantized tensors"):
        assert f"<h2>{title}</h2>" in quantized
    assert "onnxq" in quantized and "SQNR" in quantized
    analyzed = browse(reports["analyze"], tmp_path, "--dump-dom")
    assert "<h2>Sensitivity</h2>" in analyzed and "<h2>Leaving the most sensitive in float</h2>" in analyzed
    assert "--exclude" in analyzed  # what to paste
    assert len(re.findall(r"<td>node_conv2d_\d+</td><td>Conv</td>", analyzed)) >= 10


@pytest.fixture(scope="module")
def further_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of samples, of made inputs, and of what an engine runs."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("further")
    pages = {name: folder / f"{name}.html" for name in ("sample", "synthesize", "build")}
    model, denoiser = str(MODELS / "fashion_resnet.onnx"), str(MODELS / "fashion_unet_guided.onnx")
    small = ["-q", "--steps", "2", "--report"]
    app(["sample", denoiser, "--against", denoiser, "-n", "2", *small, str(pages["sample"])], standalone_mode=False)
    made = ["-o", str(folder / "made.npz"), "-n", "4"]
    app(["synthesize", model, *made, *small, str(pages["synthesize"])], standalone_mode=False)
    engine = ["-o", str(folder / "engine"), "--sm", "89", "-q", "--report"]
    app(["build", model, *engine, str(pages["build"])], standalone_mode=False)
    return pages


def test_samples_made_inputs_and_engines_are_shown(further_reports: dict[str, Path], tmp_path: Path) -> None:
    """Pictures are drawn, commands can be copied, and nothing is wider than a phone."""
    script = """<script>
document.body.style.width = "360px";
const outside = [...document.querySelectorAll("body > *:not(script)")].filter(item => item.scrollWidth > 360);
document.body.dataset.outside = outside.filter(item => getComputedStyle(item).overflowX != "auto").length;
document.body.dataset.pictures = [...document.images].filter(image => image.naturalWidth > 50).length;
</script></body>"""
    wanted = {
        "sample": (3, ["<h2>Samples</h2>", "quantized less float", "<h2>Steps of the sampler</h2>"]),
        "synthesize": (1, ["<h2>Samples</h2>", "standard deviations", "<h2>Loss</h2>"]),
        "build": (0, ["<h2>The same with other tools</h2>", "<pre>trtexec", "<h2>Products in engine</h2>"]),
    }
    for name, (pictures, texts) in wanted.items():
        page = tmp_path / f"{name}.html"
        page.write_text(further_reports[name].read_text().replace("</body>", script))
        shown = browse(page, tmp_path, "--dump-dom", "--window-size=360,800")
        assert all(text in shown for text in texts), name
        body = re.search(r"<body[^>]*>", shown)
        assert body is not None and 'data-outside="0"' in body[0] and f'data-pictures="{pictures}"' in body[0], name


def test_a_click_sorts_and_a_phone_needs_no_sideways_scrolling(reports: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "clicked.html"
    script = """<script>
const table = document.querySelector("table.sortable"), heads = [...table.querySelectorAll("th button")];
const last = heads.findIndex(head => head.textContent == "alone");
table.querySelectorAll("th button")[last].click();
const order = [...table.tBodies[0].rows].map(row => Number(row.cells[last].dataset.order));
table.querySelectorAll("th button")[last].click();
const back = [...table.tBodies[0].rows].map(row => Number(row.cells[last].dataset.order));
document.body.dataset.sorted = [order.every((value, i) => !i || order[i - 1] <= value),
  back.every((value, i) => !i || back[i - 1] >= value)].join();
document.body.style.width = "360px";
const outside = [...document.querySelectorAll("body > *:not(script)")].filter(item => item.scrollWidth > 360);
document.body.dataset.seen = heads[last].getBoundingClientRect().right <= 360;
document.body.dataset.outside = outside.filter(item => getComputedStyle(item).overflowX != "auto").length;
</script></body>"""
    page.write_text(reports["analyze"].read_text().replace("</body>", script))
    body = re.search(r"<body[^>]*>", browse(page, tmp_path, "--dump-dom", "--window-size=360,800"))
    assert body is not None
    assert 'data-sorted="true,true"' in body[0]
    assert 'data-outside="0"' in body[0]
    assert 'data-seen="true"' in body[0]  # what the table is for
