"""float_inference.py MODEL SAMPLES.npz OUT: load the model, run every sample, write the model back.

The least that a tool which calibrates on these samples can do: the cost of quantizing is quoted as a multiple of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from samples import Samples


def main() -> None:
    model, samples, out = (Path(argument) for argument in sys.argv[1:])
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    for sample in Samples(samples, 10**9):
        session.run(None, sample)
    onnx.save(onnx.load(model), out)


if __name__ == "__main__":
    main()
