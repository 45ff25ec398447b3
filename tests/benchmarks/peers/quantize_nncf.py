"""NNCF on ONNX: fast bias correction; mixed has asymmetric activations, performance symmetric ones.

prepared: onnxruntime's pre-processing first. NNCF keeps BatchNorm between a convolution and its Q/DQ, and onnxruntime
then finds no integer kernel; with BatchNorm folded beforehand it does.
"""

from __future__ import annotations

from pathlib import Path

import nncf
import onnx
from onnxruntime.quantization.shape_inference import quant_pre_process
from samples import Samples, main


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    preset, *words = method.split("_")
    presets = {"mixed": nncf.QuantizationPreset.MIXED, "performance": nncf.QuantizationPreset.PERFORMANCE}
    prepared = out.with_suffix(".prepared.onnx")
    if "prepared" in words:
        quant_pre_process(str(model), str(prepared))
    graph = onnx.load(prepared if "prepared" in words else model)
    prepared.unlink(missing_ok=True)
    quantized = nncf.quantize(
        graph,
        nncf.Dataset(samples),
        preset=presets[preset],
        target_device=nncf.TargetDevice.ANY,
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if "transformer" in words else None,
    )
    onnx.save(quantized, out)


if __name__ == "__main__":
    main(quantize, ["mixed", "performance", "mixed_prepared", "performance_prepared", "mixed_transformer"])
