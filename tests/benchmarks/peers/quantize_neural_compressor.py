"""onnx-neural-compressor: static Q/DQ, weights per channel; uint8 or int8 activations."""

from __future__ import annotations

from pathlib import Path

from onnx_neural_compressor.data_reader import CalibrationDataReader
from onnx_neural_compressor.quantization import CalibrationMethod, QuantFormat, QuantType, config
from onnx_neural_compressor.quantization import quantize as compressor_quantize
from samples import Samples, main


class Reader(Samples, CalibrationDataReader):
    """The samples, as the class that this peer insists on."""


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    settings = config.StaticQuantConfig(
        calibration_data_reader=Reader(samples.path, samples.count),
        quant_format=QuantFormat.QDQ,
        calibrate_method=CalibrationMethod.MinMax,
        per_channel=True,
        activation_type=QuantType.QUInt8 if method == "uint8" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    compressor_quantize(str(model), str(out), settings)


if __name__ == "__main__":
    main(quantize, ["uint8", "int8"])
