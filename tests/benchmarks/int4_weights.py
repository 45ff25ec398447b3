"""4-bit weights on a real decoder, int4 in blocks of 32 and FP4: perplexity of every peer's methods beside ours.

    python tests/benchmarks/int4_weights.py --data ../shared/data --peers /path/to/environments

`--peers` holds an environment for each peer (see install_peers.sh). All calibrate on the same tokens, and all results
run in the same onnxruntime session on text that nobody calibrated on. Bytes are those of the whole file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import onnxq
from onnxq.calibration.tokenizers import open_tokenizer

HERE = Path(__file__).resolve().parent
FP4: dict[str, Any] = {"weights": "fp4", "target": "tensorrt"}
OURS: dict[str, dict[str, Any]] = {
    "int4-weights": {"recipe": "int4-weights"},
    "int4-weights, least error": {"recipe": "int4-weights", "knobs": {"weight_ranges": "mse"}},
    "awq": {"recipe": "awq"},
    "gptq": {"recipe": "gptq"},
    "norm-tweaking over gptq": {"recipe": "norm-tweaking", "knobs": {"base": "gptq"}},
    "int4-weights, rank 8": {"recipe": "int4-weights", "low_rank": 8},
    "gptq, rank 8": {"recipe": "gptq", "low_rank": 8},
    "gptq, rotated": {"recipe": "gptq", "rotate": True},
    "fp4, extremes": {"recipe": "fp4-weights", "knobs": {"weight_ranges": "minmax"}, **FP4},
    "fp4-weights": {"recipe": "fp4-weights", **FP4},
    "awq, fp4": {"recipe": "awq", **FP4},
    "gptq, fp4": {"recipe": "gptq", **FP4},
}
THEIRS = {
    "onnxruntime": ["symmetric", "asymmetric", "hqq", "k_quant"],
    "neural_compressor": ["rtn", "gptq", "awq"],
    "modelopt": ["rtn_dq", "awq_lite", "awq_clip"],
}


def tokens(language: Path, length: int, folder: Path) -> tuple[Path, Path]:
    """Calibration and test sequences, as npz files."""
    text = (language / "tinystories_train_head.txt").read_text(encoding="utf-8")
    encode = open_tokenizer(language / "tok512.bin").encode
    paths = []
    for name, part in (("calibration", text[:40000]), ("test", text[40000:])):
        ids = np.asarray(encode(part), np.int64)
        rows = ids[: len(ids) // length * length].reshape(-1, length)
        paths.append(folder / f"{name}.npz")
        np.savez(paths[-1], input_ids=rows)
    return paths[0], paths[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with language/stories260k.onnx")
    parser.add_argument("--peers", type=Path, help="folder with the peers' environments; without it ours alone run")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    model = options.data / "language" / "stories260k.onnx"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration, test = tokens(options.data / "language", options.length, folder)
        output = folder / "quantized.onnx"
        for label, chosen in OURS.items():
            chosen = {"weights": "int4:32", "target": "cpu", **chosen}
            onnxq.quantize(model, calibration, output=output, samples=options.samples, **chosen)
            rows.append(measure(f"onnxq: {label}", model, output, test))
        for peer, methods in THEIRS.items() if options.peers else ():
            for method in methods:
                output.unlink(missing_ok=True)
                command = [options.peers / peer / "bin" / "python", HERE / "peers" / "quantize_int4.py", model]
                command += [calibration, output, "--samples", options.samples, "--method", f"{peer}.{method}"]
                done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
                if done.returncode or not output.is_file():
                    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
                    print(f"{peer}: {method}: failed: {reason[:160]}", file=sys.stderr)
                    continue
                try:
                    rows.append(measure(f"{peer}: {method}", model, output, test))
                except onnxq.OnnxqError as error:
                    print(f"{peer}: {method}: does not run: {error.message[:160]}", file=sys.stderr)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


def measure(label: str, model: Path, quantized: Path, test: Path) -> dict[str, Any]:
    found = onnxq.compare(model, quantized, test, layers=False, latency=False, layer_samples=0)
    assert found.perplexity_float is not None and found.perplexity_quantized is not None
    cost = found.perplexity_quantized / found.perplexity_float - 1
    print(
        f"{label:36s} perplexity {found.perplexity_float:.3f} -> {found.perplexity_quantized:.3f} ({cost:+.1%})  "
        f"{found.sqnr_db:5.1f} dB  {found.quantized_bytes / 1e3:.0f} kB",
        flush=True,
    )
    return {"method": label, "cost": cost, "sqnr_db": found.sqnr_db, "bytes": found.quantized_bytes}


if __name__ == "__main__":
    main()
