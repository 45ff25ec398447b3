"""engine.py FILE: does the TensorRT-RTX compiler take it? It compiles ahead of time, without a GPU; one JSON line.

`misread`: the compiler takes Q/DQ pairs of unsigned integers, warns, and compiles signed ones, which saturate at 127
instead of 255: the engine does not compute what the file says.
"""

from __future__ import annotations

import json
import sys

import onnx
import tensorrt_rtx as trt


def has_unsigned(path: str) -> bool:
    """Is there a Q/DQ node with a uint8 zero point?"""
    graph = onnx.load(path, load_external_data=False).graph
    unsigned = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.UINT8}
    quantizers = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return any(len(node.input) > 2 and node.input[2] in unsigned for node in quantizers)


def compile_engine(path: str) -> dict:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        return {"accepted": False, "reason": "; ".join(reasons)[:300]}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if any(-1 in tuple(value.shape) for value in inputs):
        profile = builder.create_optimization_profile()
        for value in inputs:
            shape = tuple(1 if size == -1 else size for size in value.shape)
            profile.set_shape(value.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"accepted": False, "reason": "the compiler gave no engine"}
    return {"accepted": True, "misread": has_unsigned(path), "engine_bytes": engine.nbytes}


if __name__ == "__main__":
    print(json.dumps(compile_engine(sys.argv[1])))
