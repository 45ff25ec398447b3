"""Model-Optimizer (nvidia-modelopt): INT8, the rest in float32, calibrated on the CPU.

random: entropy as well, without data, for which it draws inputs of its own.
"""

from __future__ import annotations

from pathlib import Path

from modelopt.onnx.quantization import quantize as modelopt_quantize
from samples import Samples, main


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    modelopt_quantize(
        str(model),
        quantize_mode="int8",
        calibration_method="entropy" if method == "random" else method,
        calibration_data_reader=None if method == "random" else samples,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(out),
        log_level="WARNING",
    )


if __name__ == "__main__":
    main(quantize, ["max", "entropy", "random"])
