"""Quark ONNX: its A8W8 preset, or symmetric int8 with weights per channel."""

from __future__ import annotations

from pathlib import Path

from quark.onnx import A8W8_QCONFIG, CalibMethod, Int8Spec, ModelQuantizer, QConfig, QLayerConfig, QuantGranularity
from samples import Samples, main


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    if method == "a8w8":
        config = A8W8_QCONFIG
    else:
        activation, weight = Int8Spec(), Int8Spec()
        for spec in (activation, weight):
            spec.set_symmetric(True)
            spec.set_calibration_method(CalibMethod.MinMax)
        weight.set_quant_granularity(QuantGranularity.Channel)
        config = QConfig(global_config=QLayerConfig(activation=activation, weight=weight))
    ModelQuantizer(config).quantize_model(str(model), str(out), samples)


if __name__ == "__main__":
    main(quantize, ["per_channel", "a8w8"])
