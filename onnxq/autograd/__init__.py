"""ONNX graphs in torch, with gradients."""
