"""onnxruntime.quantization: pre-processing and static quantization, per channel.

symmetric*: int8 with zero point 0 and float biases, the only placement of these that TensorRT takes.
uint8*: unsigned activations with a zero point, what onnxruntime's x86 kernels are fastest with.
products*: symmetric, but of Conv, Gemm and MatMul alone; with all operators it refuses some denoisers.
operator: the same written as QLinear operators instead of Q/DQ pairs.
defaults: quantize_static as it comes, but per channel.
"""

from __future__ import annotations

from pathlib import Path

from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from samples import Samples, main

TENSORRT = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": False}
RANGES = {"entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared))
    kind, _, ranges = method.partition("_")
    options = dict(per_channel=True, calibrate_method=RANGES.get(ranges, CalibrationMethod.MinMax))
    if kind in ("symmetric", "products"):
        options |= dict(extra_options=TENSORRT, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
    elif kind in ("uint8", "operator"):
        options |= dict(activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    if kind == "products":
        options |= dict(op_types_to_quantize=["Conv", "Gemm", "MatMul"])
    if kind == "operator":
        options |= dict(quant_format=QuantFormat.QOperator)
    try:
        quantize_static(str(prepared), str(out), samples, **options)
    finally:
        prepared.unlink(missing_ok=True)


METHODS = [
    "symmetric",
    "symmetric_entropy",
    "symmetric_percentile",
    "products_entropy",
    "products_percentile",
    "uint8",
    "uint8_percentile",
    "operator",
    "defaults",
]

if __name__ == "__main__":
    main(quantize, METHODS)
