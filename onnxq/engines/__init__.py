"""Build TensorRT engines, on a machine with or without a GPU, and prove in which precision each node runs."""

from onnxq.engines.inspect import CompiledLayer, Proof, Wish, parse_layers, prove, wishes
from onnxq.engines.shapes import Profile, parse_shapes
from onnxq.engines.tensorrt import EngineBuild, build

__all__ = [
    "CompiledLayer",
    "EngineBuild",
    "Profile",
    "Proof",
    "Wish",
    "build",
    "parse_layers",
    "parse_shapes",
    "prove",
    "wishes",
]
