"""AIMET-ONNX's AdaRound at W4A8, to hold beside the recipe `adaround` on the same images, iterations and widths.

    ~/peers/aimet/bin/python tests/benchmarks/peers/adaround_aimet.py model.onnx calib.npz aimet.onnx \
      --samples 64 --method 200
    onnxq quantize model.onnx --data calib.npz -n 64 --recipe adaround --weights int4 --activations int8 \
      --first-last int8 --set iterations=200 --set observer=minmax -o ours.onnx
    onnxq compare model.onnx aimet.onnx --data test.npz

The method is the number of iterations for each layer. Weights are symmetric per channel; the first and the last layer
have 8 bits; BatchNorm is folded first, as AIMET's guide says.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from aimet_onnx import apply_adaround
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.quantsim import QuantizationSimModel
from samples import Samples, main

LAYERS = ("Conv", "Gemm", "MatMul")


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    graph = onnx.load(model)
    fold_all_batch_norms_to_weight(graph)
    simulation = QuantizationSimModel(graph, param_type="int4", activation_type="int8", quant_scheme="min_max")
    quantizers = simulation.get_qc_quantize_op()
    layers = [node for node in graph.graph.node if node.op_type in LAYERS]
    for node in (layers[0], layers[-1]):
        quantizers[node.input[1]].set_bitwidth(8)
    apply_adaround(simulation, list(samples), num_iterations=int(method))
    simulation.compute_encodings(samples)
    onnx.save(simulation.to_onnx_qdq(), out)


if __name__ == "__main__":
    main(quantize, ["200", "10", "1000"])
