"""The compilers that can be installed (TensorRT 10, TensorRT 11, TensorRT-RTX) and what differs between them.

Full TensorRT needs a GPU and builds for that one. TensorRT-RTX builds for any list of compute capabilities, on a
machine with no GPU at all.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxq.errors import OnnxqError

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {"tensorrt": "pip install tensorrt", "tensorrt-rtx": "pip install 'onnxq[tensorrt]'"}
DEFAULT_SM = "89"  # what TensorRT-RTX builds for on a machine without a GPU: the first with FP8
LINT_HINT = "`onnxq lint {model} --target tensorrt` may show why"  # of every graph that a compiler does not take
OLDEST_TENSORRT = 10  # explicit Q/DQ in strongly typed networks


@dataclass(frozen=True)
class Runtime:
    """A compiler that loads.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        module: Its Python module.
        sm: The compute capabilities to build for, such as ``89``.
    """

    name: str
    module: Any
    sm: tuple[str, ...]

    @property
    def version(self) -> str:
        """The package's version."""
        return str(self.module.__version__)

    @property
    def network_flags(self) -> int:
        """TensorRT 10 takes types from the graph only if told so; later ones always do."""
        if self.name == "tensorrt" and _major(self.module) == OLDEST_TENSORRT:
            return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return 0

    def aim(self, config: Any) -> None:
        """Tell the builder's configuration which GPUs to build for."""
        if self.name == "tensorrt":
            return  # it builds for the GPU of this machine
        config.num_compute_capabilities = len(self.sm)
        for index, sm in enumerate(self.sm):
            config.set_compute_capability(getattr(self.module.ComputeCapability, f"SM{sm}"), index)


def select(name: str, sm: Sequence[str] | None) -> Runtime:
    """The runtime to build with.

    Args:
        name: ``tensorrt``, ``tensorrt-rtx``, or ``auto``: full TensorRT where it is installed and this machine's GPU
            is what to build for, else TensorRT-RTX.
        sm: Compute capabilities to build for; ``None`` for this machine's GPU, or 89 where there is none.

    Raises:
        OnnxqError: the runtime is not installed, does not load, or cannot build for these capabilities.
    """
    gpu = gpu_sm()
    wanted = None if sm is None else tuple(dict.fromkeys(_plain(text) for text in sm))
    if wanted == ():
        raise OnnxqError("expected at least one compute capability, found none", hint="for example --sm 89")
    name = choose(name, wanted, gpu)
    if name not in PACKAGES:
        raise OnnxqError(
            f"expected a runtime that onnxq can build with, found {name!r}",
            hint=f"the runtimes are: auto, {', '.join(PACKAGES)}",
        )
    module = _import(name)
    return Runtime(name, module, _full_sm(wanted, gpu) if name == "tensorrt" else _rtx_sm(module, wanted, gpu))


def choose(name: str, wanted: tuple[str, ...] | None, gpu: str | None) -> str:
    """``name``, or what ``auto`` stands for when ``wanted`` is to be built on a machine with ``gpu``."""
    if name != "auto":
        return name
    suits = gpu is not None and wanted in (None, (gpu,))
    return "tensorrt" if _installed("tensorrt") and (suits or not _installed("tensorrt-rtx")) else "tensorrt-rtx"


def gpu_sm() -> str | None:
    """Compute capability of this machine's first GPU (``89``), or ``None`` where there is no usable one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, parts = ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        part = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device):
            return None
        parts.append(str(part.value))
    return "".join(parts)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(PACKAGES[name]) is not None


def _import(name: str) -> Any:
    if not _installed(name):
        raise OnnxqError(f"expected the {name} package, found that it is not installed", hint=INSTALL[name])
    try:
        module = importlib.import_module(PACKAGES[name])
    except (ImportError, OSError) as error:
        raise OnnxqError(
            f"expected the {name} package to load, found: {' '.join(str(error).split())}",
            hint=f"its libraries are missing or do not fit this machine; try {INSTALL[name]}",
        ) from error
    if name == "tensorrt" and _major(module) < OLDEST_TENSORRT:
        raise OnnxqError(
            f"expected TensorRT {OLDEST_TENSORRT} or later, found {module.__version__}",
            hint=f"upgrade it, or build with --runtime tensorrt-rtx ({INSTALL['tensorrt-rtx']})",
        )
    return module


def _full_sm(wanted: tuple[str, ...] | None, gpu: str | None) -> tuple[str, ...]:
    if gpu is None:
        raise OnnxqError(
            "expected an NVIDIA GPU, which full TensorRT needs to build an engine, found none",
            hint=f"build with --runtime tensorrt-rtx, which needs none ({INSTALL['tensorrt-rtx']})",
        )
    if wanted is not None and wanted != (gpu,):
        raise OnnxqError(
            f"expected --sm {gpu}, the GPU of this machine and the only one that full TensorRT builds for here, "
            f"found {', '.join(wanted)}",
            hint="leave --sm out, or build with --runtime tensorrt-rtx",
        )
    return (gpu,)


def _rtx_sm(module: Any, wanted: tuple[str, ...] | None, gpu: str | None) -> tuple[str, ...]:
    if wanted is None:
        require_kernels("tensorrt-rtx", module)
        return (gpu or DEFAULT_SM,)
    legal = _known_sm(module)
    unknown = [sm for sm in wanted if sm not in legal]
    if unknown:
        raise OnnxqError(
            f"expected a compute capability that TensorRT-RTX builds for, found {unknown[0]!r}",
            hint=f"the legal ones are: {', '.join(legal)}",
        )
    return wanted


def require_kernels(runtime: str, module: Any) -> None:
    """See that a runtime runs on this machine's GPU: TensorRT-RTX leaves out data-centre GPUs such as SM 90.

    Raises:
        OnnxqError: it does not.
    """
    gpu, legal = gpu_sm(), _known_sm(module)
    if gpu is not None and legal and gpu not in legal:
        raise OnnxqError(
            f"expected a GPU that {runtime} runs on (SM {', '.join(legal)}), found SM {gpu}",
            hint=f"{INSTALL['tensorrt']} builds for this one; --sm {DEFAULT_SM} builds for another machine",
        )


def _known_sm(module: Any) -> list[str]:
    """The compute capabilities that a runtime names, which full TensorRT does not."""
    names = getattr(getattr(module, "ComputeCapability", None), "__members__", ())
    return [name.removeprefix("SM") for name in names if name.startswith("SM")]


def _plain(sm: str) -> str:
    """``89`` from ``89``, ``8.9``, ``SM89`` or ``sm_89``."""
    return str(sm).strip().lower().removeprefix("sm").removeprefix("_").replace(".", "")


def _major(module: Any) -> int:
    return int(str(module.__version__).split(".")[0])
