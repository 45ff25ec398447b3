"""AIMET-ONNX: BatchNorm folded first, as its guide says; min-max or tf-enhanced ranges; optional equalization."""

from __future__ import annotations

from pathlib import Path

import onnx
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.cross_layer_equalization import equalize_model
from aimet_onnx.quantsim import QuantizationSimModel
from samples import Samples, main


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    graph = onnx.load(model)
    if method == "equalize":
        equalize_model(graph)
    else:
        fold_all_batch_norms_to_weight(graph)
    ranges = "tf_enhanced" if method == "tf_enhanced" else "min_max"
    simulation = QuantizationSimModel(graph, param_type="int8", activation_type="int8", quant_scheme=ranges)
    simulation.compute_encodings(samples)
    onnx.save(simulation.to_onnx_qdq(), out)


if __name__ == "__main__":
    main(quantize, ["min_max", "tf_enhanced", "equalize"])
