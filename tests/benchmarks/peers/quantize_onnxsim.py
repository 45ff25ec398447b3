"""onnxsim's static quantizer; full quantizes the whole graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxsim
from samples import Samples, main


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    quantized = onnxsim.quantize_static(
        onnx.load(model), calibration_data=list(samples), method="minmax", full_graph=method == "full"
    )
    onnx.save(quantized, out)


if __name__ == "__main__":
    main(quantize, ["full", "default"])
