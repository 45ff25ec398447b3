"""`--device cuda`: the results of the CPU, twice the same bytes, and no fall back to the CPU that is not said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import MODELS

import onnxq
from onnxq import cuda
from onnxq.autograd.interpreter import TorchGraph
from onnxq.engines.runtimes import gpu_sm
from onnxq.errors import OnnxqError
from onnxq.model import load
from onnxq.runtime import Session

needs_gpu = pytest.mark.skipif(gpu_sm() is None, reason="no GPU")
needs_gpu_in_torch = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
needs_gpu_in_onnxruntime = pytest.mark.skipif(
    gpu_sm() is None or cuda.PROVIDER not in onnxruntime.get_available_providers(),
    reason="no GPU, or an onnxruntime for the CPU alone",
)
CLASSIFIER, DATA = MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz"


def test_a_session_that_went_on_without_the_gpu_is_refused() -> None:
    with pytest.raises(OnnxqError, match="found that it runs on the CPU"):
        cuda.require_on_gpu(SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]))
    cuda.require_on_gpu(SimpleNamespace(get_providers=lambda: [cuda.PROVIDER, "CPUExecutionProvider"]))


@pytest.mark.skipif(gpu_sm() is not None, reason="there is a GPU")
def test_without_a_gpu_nothing_pretends(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="--device cuda"):
        onnxq.quantize(CLASSIFIER, DATA, output=tmp_path / "quantized.onnx", device="cuda")
    with pytest.raises(OnnxqError, match="--device cuda"):
        TorchGraph(load(CLASSIFIER), "cuda")


@needs_gpu_in_onnxruntime
def test_onnxruntime_gives_what_the_cpu_gives() -> None:
    with np.load(DATA) as archive:
        feed = {name: archive[name][:16] for name in archive.files if name != "labels"}
    on_gpu, on_cpu = Session(CLASSIFIER, device="cuda").run(feed)[0], Session(CLASSIFIER).run(feed)[0]
    assert np.abs(on_gpu - on_cpu).max() < 1e-5 * np.abs(on_cpu).max()


@needs_gpu_in_torch
@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_unet_guided"])
def test_torch_gives_what_the_cpu_gives(name: str) -> None:
    model = load(MODELS / f"{name}.onnx")
    generator = torch.Generator().manual_seed(0)
    given = {}
    for value in model.graph.inputs:
        sizes = [size if isinstance(size, int) else 4 for size in value.shape or ()]
        whole = value.dtype is not None and value.dtype.is_integer()
        given[value.name or ""] = (
            torch.randint(0, 10, sizes, generator=generator) if whole else torch.randn(sizes, generator=generator)
        )
    found = {}
    for device in ("cpu", "cuda"):
        graph = TorchGraph(model, device)
        weights = graph.trainable(
            name
            for name, initializer in model.graph.initializers.items()
            if initializer.dtype == ir.DataType.FLOAT and len(initializer.shape or ()) == 4
        )
        output = graph.run(given, graph.output_names)[graph.output_names[0]]
        output.square().mean().backward()
        found[device] = [output.detach().cpu(), *(weight.grad.cpu() for weight in weights if weight.grad is not None)]
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


@needs_gpu
@pytest.mark.parametrize(
    "recipe, knobs",
    [
        ("int8", {}),
        ("brecq", {"iterations": 50}),
        ("gptq", {}),
        ("genie", {"iterations": 50}),
        ("lsq", {"steps": 20}),
        ("lsq", {"steps": 20, "distil": "network", "start": "gptq", "crop": 0.5}),
        ("hast", {"steps": 10, "hard_images": 16}),
        ("multiquant", {"steps": 10}),
    ],
)
def test_quantizing_gives_the_same_bytes_twice_and_the_quality_of_the_cpu(
    recipe: str, knobs: dict[str, Any], tmp_path: Path
) -> None:
    options = {"recipe": recipe, "knobs": knobs, "weights": "int8" if recipe in ("int8", "multiquant") else "int4"}

    def decibels(name: str, device: str, seed: int = 0) -> float:
        result = onnxq.quantize(CLASSIFIER, DATA, output=tmp_path / f"{name}.onnx", device=device, seed=seed, **options)
        return result.numbers["sqnr_db"]

    found = decibels("first", "cuda")
    assert decibels("second", "cuda") == found
    # A GPU draws other random numbers: its result lies among those of the CPU's seeds, which are up to 2 dB apart.
    on_cpu = [decibels("cpu", "cpu", seed) for seed in ((0, 1, 2) if knobs else (0,))]
    assert min(on_cpu) - 1 < found < max(on_cpu) + 1
    one, other = load(tmp_path / "first.onnx"), load(tmp_path / "second.onnx")
    for name, value in one.graph.initializers.items():
        assert value.const_value is not None and other.graph.initializers[name].const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.graph.initializers[name].const_value.numpy())
