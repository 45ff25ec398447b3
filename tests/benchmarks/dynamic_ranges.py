"""Ranges found while a text model runs, without data: ours, onnxruntime's dynamic quantization, and calibrated ones.

    python tests/benchmarks/dynamic_ranges.py --data ../shared/data [--layers 6 --width 384] [--rounds 25]

Two models: the language model of the data, judged by its divergence from float (KL, in nats a token) on text that
nobody calibrated on; and an encoder of random weights in the size of the sentence encoders that are run on CPUs, whose
latency and size are those of trained ones. Latencies are of one thread, all files in turn, the median over rounds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
from latency import burst
from session import open_session
from text_models import PARTS, judge, sequences

import onnxq
from onnxq import model as models
from onnxq.calibration.data import Preprocessing, input_specs

OURS = {
    "int8-dynamic": {"recipe": "int8-dynamic"},
    "int8, dynamic activations": {"activations": "dynamic"},
    "int8": {},
}
VOCABULARY = 30_000


def main() -> None:
    """Print a line for each model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with language/stories260k.onnx")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    language = given.data / "language"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = language / "stories260k.onnx"
        specs = input_specs(models.load(writer))
        text = (language / "tinystories_train_head.txt").read_text(encoding="utf-8")
        start, end = PARTS["report"]
        (folder / "report.txt").write_text(text[int(start * len(text)) : int(end * len(text))], encoding="utf-8")
        preprocessing = Preprocessing(tokenizer=str(language / "tok512.bin"), sequence_length=256)
        feeds = list(sequences(folder / "report.txt", specs, preprocessing, 64))
        for label, path, seconds in quantized(writer, folder):
            before, after, divergence = judge(path, writer, feeds, specs[0].name, literal=False)
            print(
                f"{writer.stem} {label:26s} perplexity {before:.3f} -> {after:.3f}, diverged {100 * divergence:.2f} %, "
                f"{path.stat().st_size / 1e6:.2f} MB, {seconds:.1f} s",
                flush=True,
            )
        encoder = folder / "encoder.onnx"
        export(encoder, given.layers, given.width)
        files = [("float", encoder, 0.0), *quantized(encoder, folder)]
        feed = {"input_ids": np.random.default_rng(1).integers(0, VOCABULARY, (1, given.tokens))}
        sessions = [open_session(path, 1) for _, path, _ in files]
        times = [[burst(session, feed) for session in sessions] for _ in range(given.rounds)]
        milliseconds = np.median(times, axis=0)
        expected = sessions[0].run(None, feed)[0]
        for (label, path, seconds), session, taken in zip(files, sessions, milliseconds, strict=True):
            error = session.run(None, feed)[0] - expected
            decibels = 10 * np.log10((expected**2).sum() / max((error**2).sum(), 1e-30))
            print(
                f"encoder {label:28s} {taken:.2f} ms ({taken / milliseconds[0]:.2f} of float), {decibels:.1f} dB, "
                f"{path.stat().st_size / 1e6:.1f} MB, {seconds:.1f} s"
            )


def quantized(model: Path, folder: Path) -> list[tuple[str, Path, float]]:
    """What each method makes of the model: its label, file and seconds."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = []
    for per_channel in (False, True):
        output, started = folder / f"{model.stem}_theirs_{per_channel}.onnx", time.perf_counter()
        quantize_dynamic(str(model), str(output), per_channel=per_channel, weight_type=QuantType.QInt8)
        label = f"onnxruntime{', per channel' if per_channel else ''}"
        files.append((label, output, time.perf_counter() - started))
    for label, options in OURS.items():
        output, started = folder / f"{model.stem}_{label}.onnx", time.perf_counter()
        onnxq.quantize(model, target="cpu", output=output, **options)
        files.append((label, output, time.perf_counter() - started))
    return files


def export(path: Path, layers: int, width: int) -> None:
    """An encoder of sentences: embeddings, blocks of attention and feed-forward layers, and the mean of the tokens."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(VOCABULARY, width)
            block = torch.nn.TransformerEncoderLayer(width, 12, 4 * width, activation="gelu", batch_first=True)
            self.blocks = torch.nn.TransformerEncoder(block, layers, enable_nested_tensor=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.words(input_ids)).mean(dim=1)

    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (2, 128))
    sizes = {"input_ids": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.onnx.export(
        Encoder().eval(), (tokens,), path, input_names=["input_ids"], output_names=["sentence"], dynamic_shapes=sizes,
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
