"""What 8 bits cost a language model: perplexity, and how far its predictions diverge from the float model's.

    python tests/benchmarks/text_models.py ../shared/data/language/stories260k.onnx \
      --text ../shared/data/language/tinystories_train_head.txt --tokenizer ../shared/data/language/tok512.bin

The text is cut in three: the first 40 % calibrates, choices between settings belong to the next 30 %
(``--part choose``), and figures that are quoted come from the rest. The divergence (KL, in nats a token) is what the
perplexity would grow by if the float model were right about the text; it has far less noise than the growth itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import onnxq
from onnxq import model as models
from onnxq.calibration.data import InputSpec, Preprocessing, input_specs, open_source
from onnxq.config import parse_assignments
from onnxq.runtime import Session

PARTS = {"calibrate": (0.0, 0.4), "choose": (0.4, 0.7), "report": (0.7, 1.0)}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def sequences(path: Path, specs: list[InputSpec], preprocessing: Preprocessing, count: int) -> Iterator[dict]:
    """Batches of one sequence."""
    for index, sample in enumerate(open_source(path, specs, preprocessing)):
        if index == count:
            return
        yield {name: value[None] for name, value in sample.items()}


def judge(quantized: Path, model: Path, feeds: list[dict], tokens: str, literal: bool) -> tuple[float, float, float]:
    """Perplexity before and after, and the divergence per token."""
    before, after = Session(model), Session(quantized, optimize=not literal)
    totals, count, divergence, positions = np.zeros(2), 0, 0.0, 0
    for feed in feeds:
        wanted, found = (log_softmax(session.run(feed, session.output_names[:1])[0][0]) for session in (before, after))
        following = feed[tokens][0, 1:]
        rows = np.arange(len(following))
        totals -= [wanted[rows, following].sum(), found[rows, following].sum()]
        count += len(following)
        divergence += float((np.exp(wanted) * (wanted - found)).sum())
        positions += len(wanted)
    perplexity = np.exp(totals / count)
    return float(perplexity[0]), float(perplexity[1]), divergence / positions


def main() -> None:
    """Quantize for each target and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--targets", nargs="+", default=["tensorrt", "cpu"])
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--weights")
    parser.add_argument("--set", nargs="*", default=[], dest="knobs")
    parser.add_argument("--part", choices=("choose", "report"), default="report")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--judged", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")
    specs = input_specs(models.load(given.model))
    preprocessing = Preprocessing(tokenizer=given.tokenizer, sequence_length=given.sequence_length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, (start, end) in PARTS.items():
            cut = text[int(start * len(text)) : int(end * len(text))]
            (folder / f"{part}.txt").write_text(cut, encoding="utf-8")
        calibration = list(sequences(folder / "calibrate.txt", specs, preprocessing, given.samples))
        feeds = list(sequences(folder / f"{given.part}.txt", specs, preprocessing, given.judged))
        for target in given.targets:
            started = time.perf_counter()
            output = folder / f"{target}.onnx"
            numbers = onnxq.quantize(
                given.model, calibration, output=output, target=target, recipe=given.recipe, weights=given.weights,
                knobs=parse_assignments(given.knobs),
            ).numbers  # fmt: skip
            seconds = time.perf_counter() - started
            before, after, divergence = judge(output, given.model, feeds, specs[0].name, target != "cpu")
            print(
                f"{given.model.stem} {target} {given.recipe}: perplexity {before:.3f} -> {after:.3f} "
                f"({100 * (after / before - 1):+.2f} %), divergence {100 * divergence:.2f} %, SQNR "
                f"{numbers['sqnr_db']:.1f} dB, {numbers['quantized_bytes'] / 1e6:.1f} MB, {seconds:.0f} s, "
                f"{numbers['peak_rss_mib']:.0f} MiB"
            )


if __name__ == "__main__":
    main()
