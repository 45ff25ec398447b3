"""What is installed, what is missing for which command, and which GPU there is."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata

from onnxq.machine import cores


@dataclass(frozen=True)
class Need:
    """A package that something needs.

    Attributes:
        module: The name under which it is imported.
        packages: The distributions that bring it, the usual one first.
        serves: What it is for.
        install: How to get it.
    """

    module: str
    packages: tuple[str, ...]
    serves: str
    install: str


NEEDS = (
    Need("onnxruntime", ("onnxruntime-gpu", "onnxruntime"), "every command", "pip install onnxq"),
    Need("torch", ("torch",), "recipes that learn, synthesis", "pip install 'onnxq[learn]'"),
    Need("scipy", ("scipy",), "mixed precision", "pip install 'onnxq[learn]'"),
    Need("diffusers", ("diffusers",), "denoisers: trajectories, sample", "pip install 'onnxq[diffusion]'"),
    Need(
        "tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx"), "engines, without a GPU", "pip install 'onnxq[tensorrt]'"
    ),
    Need(
        "tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "build, on the GPU itself", "pip install tensorrt"
    ),
    Need("netron", ("netron",), "view", "pip install 'onnxq[view]'"),
    Need("ray", ("ray",), "work on several machines", "pip install 'onnxq[ray]'"),
)


@dataclass(frozen=True)
class Found:
    """What there is of a :class:`Need`.

    Attributes:
        need: The need.
        version: The installed version, ``None`` if there is none.
        problem: What is wrong with it, or an empty string.
    """

    need: Need
    version: str | None
    problem: str = ""


def packages() -> list[Found]:
    """Every optional and necessary package, without importing the heavy ones."""
    found = []
    for need in NEEDS:
        versions = [(name, _version(name)) for name in need.packages]
        installed = [(name, version) for name, version in versions if version is not None]
        if not installed or importlib.util.find_spec(need.module) is None:
            found.append(Found(need, None))
            continue
        problem = ""
        if need.module == "onnxruntime" and len(installed) > 1:
            problem = "both builds are installed and overwrite one another: pip uninstall onnxruntime onnxruntime-gpu, "
            problem += "then install one"
        found.append(Found(need, installed[0][1], problem))
    return found


def gpu() -> tuple[str | None, bool]:
    """The compute capability of the first NVIDIA GPU, and whether onnxruntime's CUDA libraries load."""
    from onnxq.engines.runtimes import gpu_sm

    capability = gpu_sm()
    if capability is None:
        return None, False
    from onnxq import cuda
    from onnxq.errors import OnnxqError

    try:
        cuda.require_provider()
    except OnnxqError:
        return capability, False
    return capability, not cuda.load_libraries()


def machine() -> dict[str, str]:
    """What the CPU and the system are, as far as it matters for integer kernels."""
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            flags = next((line for line in stream if line.startswith("flags")), "")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(cores()),
        "integer instructions": integer_instructions(flags),
    }


def integer_instructions(flags: str) -> str:
    """The instructions that integer kernels use, from the flags of an x86 CPU.

    Without VNNI or AMX, pairs of products of bytes are added in 16 bits and cut off there (onnxruntime's documentation
    on quantization).
    """
    words = set(flags.split())
    exact = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "amx_int8": "AMX INT8"}
    found = [name for flag, name in exact.items() if flag in words]
    if "avx2" in words:
        found.append("AVX2" if found else "AVX2 without VNNI (8-bit weights may overflow: --target cpu --weights int7)")
    return ", ".join(found) or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
