"""onnxruntime and torch on an NVIDIA GPU: nothing falls back to the CPU unsaid, and one seed gives the same bytes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
from typing import Any

import onnxruntime

from onnxq.errors import OnnxqError

PROVIDER = "CUDAExecutionProvider"
# By default float products round their operands to TF32's ten bits, which a comparison with the CPU would show.
OPTIONS = {"use_tf32": "0"}


def require_provider() -> None:
    """See that onnxruntime can be asked for its CUDA provider.

    Raises:
        OnnxqError: there is no NVIDIA driver, or this onnxruntime was built without CUDA.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise OnnxqError(
            "expected an NVIDIA driver for --device cuda, found none (libcuda.so.1 does not load)",
            hint="use --device cpu; every command works without a GPU",
        ) from error
    if PROVIDER not in onnxruntime.get_available_providers():
        raise OnnxqError(
            "expected onnxruntime with CUDA for --device cuda, found one for the CPU alone",
            hint="pip uninstall onnxruntime, then pip install onnxruntime-gpu; or use --device cpu",
        )
    load_libraries()


@functools.cache
def load_libraries() -> str:
    """Load CUDA and cuDNN from torch's or NVIDIA's pip packages, once; what onnxruntime says of those that failed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    return " ".join(said.getvalue().split())


def require_on_gpu(session: Any) -> None:
    """See that a session which was to run on the GPU does: onnxruntime goes on without one, and only logs it.

    Raises:
        OnnxqError: CUDA's or cuDNN's libraries are missing or too old.
    """
    if PROVIDER not in session.get_providers():
        raise OnnxqError(
            "expected CUDA and cuDNN that onnxruntime can load for --device cuda, found that it runs on the CPU "
            f"({load_libraries()[:200] or 'it gives no reason'})",
            hint="pip install 'onnxruntime-gpu[cuda,cudnn]', or use --device cpu",
        )


def prepare_torch() -> None:
    """Make torch repeat itself on a GPU, in full float32.

    Raises:
        OnnxqError: torch finds no GPU that it can use.
    """
    # Read when cuBLAS is first used; without it, products on several streams may add up in another order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if not torch.cuda.is_available():
        raise OnnxqError(
            "expected a GPU that torch can use for --device cuda, found none",
            hint="use --device cpu, or install a build of torch with CUDA",
        )
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
