"""4-bit weights in blocks of 32, activations in float: the methods of onnxruntime, Neural Compressor, Model-Optimizer.

Runs in any peer's environment; a method's name begins with the peer it belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from samples import Samples, main

BLOCK = 32
METHODS = [
    "onnxruntime.symmetric", "onnxruntime.asymmetric", "onnxruntime.hqq", "onnxruntime.k_quant",
    "neural_compressor.rtn", "neural_compressor.gptq", "neural_compressor.awq",
    "modelopt.rtn_dq", "modelopt.awq_lite", "modelopt.awq_clip",
]  # fmt: skip


def quantize(model: Path, samples: Samples, out: Path, method: str) -> None:
    peer, _, name = method.partition(".")
    onnx.save(PEERS[peer](model, samples, name), out)


def with_onnxruntime(model: Path, samples: Samples, name: str) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as peer

    if name == "hqq":
        config = peer.HQQWeightOnlyQuantConfig(block_size=BLOCK)
    elif name == "k_quant":
        config = peer.KQuantWeightOnlyQuantConfig()
    else:
        config = peer.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=name == "symmetric")
    quantizer = peer.MatMulNBitsQuantizer(onnx.load(model), block_size=BLOCK, algo_config=config)
    quantizer.process()
    return quantizer.model.model


def with_neural_compressor(model: Path, samples: Samples, name: str) -> Any:
    from onnx_neural_compressor import data_reader
    from onnx_neural_compressor.quantization import matmul_nbits_quantizer as peer

    class Reader(data_reader.CalibrationDataReader):  # it insists on a class of its own
        def get_next(self) -> Any:
            return samples.get_next()

        def rewind(self) -> None:
            samples.rewind()

    if name == "rtn":
        config = peer.RTNWeightOnlyQuantConfig()
    elif name == "gptq":
        config = peer.GPTQWeightOnlyQuantConfig(Reader(), block_size=BLOCK, actorder=True, mse=True)
    else:
        config = peer.AWQWeightOnlyQuantConfig(Reader())
    quantizer = peer.MatMulNBitsQuantizer(str(model), n_bits=4, block_size=BLOCK, is_symmetric=True, algo_config=config)
    quantizer.process()
    return getattr(quantizer.model, "model", quantizer.model)


def with_modelopt(model: Path, samples: Samples, name: str) -> Any:
    from modelopt.onnx.quantization import int4

    return int4.quantize(
        str(model),
        calibration_method=name,
        calibration_data_reader=samples,
        calibration_eps=["cpu"],
        use_external_data_format=False,
        block_size=BLOCK,
        nodes_to_exclude=[],
        log_level="WARNING",
    )


PEERS = {"onnxruntime": with_onnxruntime, "neural_compressor": with_neural_compressor, "modelopt": with_modelopt}


if __name__ == "__main__":
    main(quantize, METHODS)
