"""Graph passes, one file each. Import them as ``onnxq.passes``."""
