"""The tools under comparison: how each is called, and which of them are installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
METHODS = {  # tool: the methods that are measured unless --tools says otherwise
    "onnxq": ["tensorrt", "cpu"],
    "modelopt": ["max", "entropy"],
    "onnxruntime": [
        "symmetric",
        "symmetric_entropy",
        "symmetric_percentile",
        "uint8",
        "uint8_percentile",
        "operator",
        "defaults",
    ],
    "nncf": ["mixed", "performance", "mixed_prepared", "performance_prepared", "mixed_transformer"],
    "aimet": ["min_max", "tf_enhanced", "equalize"],
    "quark": ["per_channel", "a8w8"],
    "neural_compressor": ["uint8", "int8"],
    "onnxsim": ["full", "default"],
}


@dataclass(frozen=True)
class Tool:
    """One quantizer with one method; for ours the method is the target."""

    tool: str
    method: str
    python: Path

    @property
    def name(self) -> str:
        return f"{self.tool}:{self.method}"

    def output(self, folder: Path, model: str) -> Path:
        return folder / model / f"{self.tool}.{self.method}.onnx"

    def command(self, model: Path, calibration: Path, out: Path, samples: int) -> list[str]:
        """The command line that quantizes the model: a process of its own, as a user would start it."""
        if self.tool == "onnxq":
            arguments = ["quantize", model, "-o", out, "--data", calibration, "--samples", samples]
            arguments += ["--target", self.method, "--json", out.with_suffix(".json")]
            return [str(value) for value in (self.python.parent / "onnxq", *arguments)]
        script = HERE / "peers" / f"quantize_{self.tool}.py"
        arguments = [script, model, calibration, out, "--samples", samples, "--method", self.method]
        return [str(value) for value in (self.python, *arguments)]


def installed(peers: Path, patterns: list[str]) -> list[Tool]:
    """The tools that match a pattern and have an environment; ours lives in the environment that runs this."""
    found = []
    for tool, methods in METHODS.items():
        python = Path(sys.executable) if tool == "onnxq" else peers.resolve() / tool / "bin" / "python"
        present = (python.parent / "onnxq").exists() if tool == "onnxq" else python.exists()
        candidates = [Tool(tool, method, python) for method in methods] if present else []
        found += [tool for tool in candidates if any(fnmatch(tool.name, pattern) for pattern in patterns)]
    return found
