"""Block reconstruction: what it learns, that it resumes, that its memory is bounded and its bytes repeat."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import DATA, MODELS, add_weights

import onnxq
from onnxq import OnnxqError
from onnxq import model as models
from onnxq.autograd.interpreter import TorchGraph
from onnxq.learning import quantizers
from onnxq.learning import reconstruct as reconstruction
from onnxq.learning.activations import LearnedStep, random_mask
from onnxq.learning.cache import ActivationCache
from onnxq.learning.checkpoint import Checkpoint
from onnxq.learning.rounding import LearnedRounding
from onnxq.runtime import Session

QUICK = {"iterations": 40, "batch": 8, "samples": 32}


def sqnr(result: onnxq.Result) -> float:
    return float(result.numbers["sqnr_db"])


@pytest.fixture
def fashion() -> tuple[Path, Path]:
    return MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz"


@pytest.mark.parametrize("recipe", ["adaround", "brecq", "qdrop"])
def test_beats_nearest_rounding_at_four_bits(fashion: tuple[Path, Path], tmp_path: Path, recipe: str) -> None:
    formats = {"weights": "int4", "activations": "int8", "samples": 32}
    knobs = {"weight_ranges": "mse", "observer": "mse", "bias_correction": False}
    nearest = onnxq.quantize(*fashion, recipe="int8", knobs=knobs, **formats)
    learned = onnxq.quantize(*fashion, recipe=recipe, knobs=QUICK, output=tmp_path / "q.onnx", **formats)
    assert sqnr(learned) > sqnr(nearest) + 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.onnx"]  # no checkpoint is left


@pytest.mark.parametrize("recipe", ["adaround", "brecq"])
def test_biases_take_back_the_mean_error(fashion: tuple[Path, Path], recipe: str) -> None:
    with np.load(fashion[1]) as archive:
        feed = {"x": archive["x"][:32]}
    expected = Session(models.load(fashion[0])).run(feed)[0]
    mean_errors = []
    for correct_biases in (False, True):
        knobs = QUICK | {"iterations": 20, "correct_biases": correct_biases}
        knobs |= {"start": "nearest", "bias_rate": 0.0}
        options = {"recipe": recipe, "weights": "int3", "activations": "int8", "samples": 32, "knobs": knobs}
        found = Session(onnxq.quantize(fashion[0], [feed], **options).model, optimize=False).run(feed)[0]
        mean_errors.append(float(np.abs((found - expected).mean(axis=0)).mean()))
    assert mean_errors[1] < 0.2 * mean_errors[0]  # the rest comes from behind nonlinearities


@pytest.mark.parametrize("recipe", ["adaround", "qdrop"])
def test_a_step_in_parts_learns_the_same(
    fashion: tuple[Path, Path], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what gradients need of a block does not fit, those of a few samples at a time are added up."""
    knobs = QUICK | {"iterations": 10, **({"drop": 0.0} if recipe == "qdrop" else {})}
    options = {"recipe": recipe, "weights": "int4", "activations": "int8", "samples": 32, "knobs": knobs}
    found, drawn = [], []
    inputs = reconstruction._Block._inputs

    def counted(self: reconstruction._Block, index: np.ndarray, area: object) -> dict[str, torch.Tensor]:
        drawn[-1].append(len(index))
        return inputs(self, index, area)

    monkeypatch.setattr(reconstruction._Block, "_inputs", counted)
    for kept in (1 << 29, 1 << 16):
        monkeypatch.setattr(reconstruction, "KEPT_FOR_GRADIENTS", kept)
        drawn.append([])
        found.append(onnxq.quantize(*fashion, **options))
    assert set(drawn[0]) == {8} and set(drawn[1]) & {1, 2} and sum(drawn[0]) == sum(drawn[1])
    weights = [
        {
            name: v.const_value.numpy().astype(int)
            for name, v in item.model.graph.initializers.items()
            if "quant" in name
        }
        for item in found
    ]
    same = [np.mean(weights[0][name] == weights[1][name]) for name in weights[0]]
    assert len(same) > 5 and min(same) > 0.97
    assert sqnr(found[1]) == pytest.approx(sqnr(found[0]), abs=0.5)


PROJECTION = """<ir_version: 10, opset_import: ["" : 21]>
projection (float[N,6,32] x) => (float[N,6,16] y)
{
    product = MatMul (x, w)
    y = Add (product, b)
}"""


@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_biases_behind_a_product_take_the_mean_error_back_once(tmp_path: Path, start: str) -> None:
    """GPTQ and the learning move them too; what is left is measured with that."""
    ir.save(add_weights(PROJECTION, {"w": (32, 16), "b": (16,)}), tmp_path / "float.onnx")
    inputs = np.random.default_rng(0).normal(1.0, 0.5, (64, 6, 32)).astype(np.float32)
    source = [{"x": sample} for sample in inputs[:, None]]
    knobs = {"iterations": 20, "start": start, "bias_rate": 1e-2, "correct_biases": True}
    made = onnxq.quantize(
        tmp_path / "float.onnx", source, recipe="qdrop", weights="int3", activations="int8", knobs=knobs
    )
    expected = Session(models.load(tmp_path / "float.onnx")).run({"x": inputs})[0]
    mean_error = np.abs((Session(made.model, optimize=False).run({"x": inputs})[0] - expected).mean(axis=(0, 1))).max()
    assert mean_error < 0.005 * np.abs(expected).mean()


@pytest.mark.slow
def test_biases_take_back_what_inputs_of_the_float_network_hide(shared_data: Path, tmp_path: Path) -> None:
    """Keywords by depthwise convolutions at W4A4, on sounds that nothing learned from: 12.4 dB and 15.8."""
    model = DATA / "models" / "mlperf_tiny_kws_dscnn.onnx"
    for part, count in (("calib", 256), ("test", 500)):
        command = [sys.executable, DATA / "prepare.py", model.stem, part, "-n", count, "-o", tmp_path / f"{part}.npz"]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
    found = []
    for correct_biases in (False, True):
        knobs = {"iterations": 200, "correct_biases": correct_biases}
        options = {"recipe": "qdrop", "weights": "int4", "activations": "int4", "knobs": knobs}
        onnxq.quantize(model, tmp_path / "calib.npz", output=tmp_path / "q.onnx", samples=256, **options)
        seen = onnxq.compare(model, tmp_path / "q.onnx", tmp_path / "test.npz", layers=False, latency=False)
        found.append(float(seen.to_json()["sqnr_db"]))
    assert found[1] > found[0] + 1


def test_the_same_seed_gives_the_same_bytes_and_an_interrupted_run_goes_on(
    fashion: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"recipe": "qdrop", "weights": "int4", "activations": "int4", "samples": 16}
    knobs = QUICK | {"iterations": 5, "samples": 16}
    onnxq.quantize(*fashion, knobs=knobs, output=tmp_path / "whole.onnx", **options)
    learn = reconstruction._Block.learn
    learned: list[str] = []

    def interrupted(block: reconstruction._Block) -> dict[str, torch.Tensor]:
        if len(learned) == 3:
            raise KeyboardInterrupt
        learned.append(block.block.name)
        return learn(block)

    monkeypatch.setattr(reconstruction._Block, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        onnxq.quantize(*fashion, knobs=knobs, output=tmp_path / "parts.onnx", **options)
    first = list(learned)
    learned[:] = []
    monkeypatch.setattr(reconstruction._Block, "learn", lambda block: learned.append(block.block.name) or learn(block))
    onnxq.quantize(*fashion, knobs=knobs, output=tmp_path / "parts.onnx", **options)
    assert len(first) == 3 and not set(first) & set(learned)
    assert (tmp_path / "parts.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_cache_on_disk_gives_the_same_bytes(fashion: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"recipe": "adaround", "weights": "int4", "samples": 16}
    knobs = QUICK | {"iterations": 3, "samples": 16}
    for name, size in (("memory", 512), ("disk", 0)):
        onnxq.quantize(*fashion, knobs=knobs | {"cache_mib": size}, output=tmp_path / f"{name}.onnx", **options)
    memory = models.load(tmp_path / "memory.onnx").graph.initializers
    disk = models.load(tmp_path / "disk.onnx").graph.initializers
    for name, value in memory.items():
        np.testing.assert_array_equal(value.const_value.numpy(), disk[name].const_value.numpy())


def test_cache_moves_to_files_and_back(tmp_path: Path) -> None:
    with ActivationCache(1000, str(tmp_path)) as cache:
        cache.allocate("small", (10, 10), torch.float32)
        cache.allocate("large", (100, 100), torch.float32)
        cache.write("large", slice(0, 100), torch.ones(100, 100))
        cache.alias("again", "large")
        assert cache.used_bytes == 400
        cache.free("large")
        assert cache.rows("again", np.array([3, 99])).sum() == 200
        assert len(list(tmp_path.rglob("*.bin"))) == 1
        cache.free("again")
        assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.iterdir())


def test_cache_says_when_the_disk_is_full(tmp_path: Path) -> None:
    with ActivationCache(0, str(tmp_path)) as cache, pytest.raises(OnnxqError, match="for activations"):
        cache.allocate("absurd", (1 << 52,), torch.float32)


def test_checkpoint_forgets_what_another_run_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    Checkpoint(folder, "one").save("block", {"a/b": np.arange(3)})
    found = Checkpoint(folder, "one").load("block")
    assert found is not None and found["a/b"].tolist() == [0, 1, 2]
    assert Checkpoint(folder, "two").load("block") is None


def test_checkpoint_goes_on_where_another_run_for_the_same_output_removed_it(tmp_path: Path) -> None:
    mine = Checkpoint(tmp_path / "checkpoint", "one")
    Checkpoint(tmp_path / "checkpoint", "one").remove()
    mine.save("block", {"a": np.arange(3)})
    found = mine.load("block")
    assert found is not None and found["a"].tolist() == [0, 1, 2]


def grid(weight: np.ndarray, scale: np.ndarray) -> quantizers.Grid:
    found = object.__new__(quantizers.Grid)
    found.quantizer = quantizers.Quantizer("w", "dq", "s", "z", -8, 7, 0, None, None, True)
    found.weight, found.scale = torch.from_numpy(weight), torch.from_numpy(scale)
    found.low, found.high, found.zero_point = -8.0, 7.0, torch.tensor(0.0)
    return found


def test_rounding_starts_as_the_float_weight_and_ends_on_the_grid() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((4, 9)).astype(np.float32)
    scale = (np.abs(weight).max(axis=1) / 7).astype(np.float32)
    rounding = LearnedRounding(grid(weight, scale))
    np.testing.assert_allclose(rounding.weight().detach().numpy(), weight, atol=1e-6)
    decided, step = rounding.decided()
    codes = decided.numpy() / step.numpy()[:, None]
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-5)
    assert np.abs(codes - weight / scale[:, None]).max() <= 1 + 1e-5
    np.testing.assert_allclose(codes, np.rint(weight / scale[:, None]), atol=1e-5)  # undecided: the nearest


def test_rounding_that_starts_from_codes_keeps_them_until_it_learns() -> None:
    generator = np.random.default_rng(1)
    weight = generator.standard_normal((4, 9)).astype(np.float32)
    scale = (np.abs(weight).max(axis=1) / 7).astype(np.float32)
    codes = np.clip(np.rint(weight / scale[:, None]) + generator.integers(-2, 3, weight.shape), -7, 7)
    rounding = LearnedRounding(
        grid(weight, scale), rounded=torch.from_numpy((codes * scale[:, None]).astype(np.float32))
    )
    decided, step = rounding.decided()
    np.testing.assert_allclose(decided.numpy() / step.numpy()[:, None], codes, atol=1e-4)
    other = (2 * rounding.floor + 1).numpy() - codes  # the neighbour lies on the side of the float weight
    assert ((other > codes) == (weight / scale[:, None] >= codes)).all()


@pytest.mark.parametrize("recipe", ["adaround", "qdrop"])
def test_the_codes_of_gptq_are_a_better_start(fashion: tuple[Path, Path], recipe: str) -> None:
    formats = {"weights": "int3", "activations": "int8", "samples": 32}
    found = [
        sqnr(onnxq.quantize(*fashion, recipe=recipe, knobs=QUICK | {"iterations": 20} | knobs, **formats))
        for knobs in ({"start": "nearest", "bias_rate": 0.0}, {"start": "gptq", "bias_rate": 0.0})
    ]
    assert found[1] > found[0] + 1.0


DEPTHWISE = """<ir_version: 10, opset_import: ["" : 21]>
depthwise (float[N,8,12,12] x) => (float[N,8,10,10] y)
{
    y = Conv <group = 8> (x, w1, b1)
}"""


@pytest.mark.parametrize("recipe", ["adaround", "qdrop"])
def test_biases_learn_where_they_are_told_to(tmp_path: Path, recipe: str) -> None:
    """Over three seeds they neither help nor harm the classifier that ships here (20 steps, 3 bits): 0.2 dB of 23."""
    ir.save(add_weights(DEPTHWISE, {"w1": (8, 1, 3, 3), "b1": (8,)}), tmp_path / "float.onnx")
    inputs = np.random.default_rng(0).normal(4.0, 0.5, (32, 1, 8, 12, 12)).astype(np.float32)
    source = [{"x": sample} for sample in inputs]
    biases = []
    for rate in (0.0, 1e-2):
        knobs = {"iterations": 20, "start": "nearest", "bias_rate": rate, "correct_biases": False}
        made = onnxq.quantize(
            tmp_path / "float.onnx", source, recipe=recipe, weights="int3", activations="float", knobs=knobs
        )
        layer = next(node for node in made.model.graph if node.op_type == "Conv")
        biases.append(layer.inputs[2].const_value.numpy())
    given = models.load(tmp_path / "float.onnx").graph.initializers["b1"].const_value.numpy()
    np.testing.assert_array_equal(biases[0], given)
    assert np.abs(biases[1] - given).max() > 1e-2


def test_the_gradient_of_a_step_is_that_of_lsq(network: Path, calibration: Path) -> None:
    step = object.__new__(LearnedStep)
    step.quantizer = quantizers.Quantizer("x", "dq", "s", "z", -8, 7, None, None, None, False)
    step.first, step.first_zero_point = torch.tensor(0.5), torch.tensor(0.0)
    step.log_step, step.drop = torch.zeros(()).requires_grad_(), 0.0
    step.shift, step.scaled = torch.zeros(()), False
    values = torch.tensor([0.3, -1.1, 9.0, -9.0])
    step(values).sum().backward()
    ratio = values / 0.5
    inside = torch.round(ratio) - ratio
    expected = torch.where(ratio > 7, torch.tensor(7.0), torch.where(ratio < -8, torch.tensor(-8.0), inside))
    torch.testing.assert_close(step.log_step.grad, expected.sum() * 0.5)


def test_random_mask_has_its_probability() -> None:
    mask = random_mask(torch.Size((1000, 257)), 0.25, torch.Generator().manual_seed(0))
    assert mask.shape == (1000, 257) and abs(mask.float().mean().item() - 0.25) < 0.005


def test_float_run_of_the_quantized_graph_is_the_float_graph(fashion: tuple[Path, Path]) -> None:
    from onnxq.calibration import calibrate
    from onnxq.passes.insert_qdq import InsertQDQ
    from onnxq.targets import get

    model = models.load(fashion[0])
    target = get("tensorrt")
    target.prepare(model)
    x = torch.from_numpy(np.load(fashion[1])[model.graph.inputs[0].name][:4])
    with torch.inference_mode():
        expected = TorchGraph(model)(x)[0]
        placement = target.place(model.graph, target.scheme("int4", "int4"))
        InsertQDQ(placement.sites)(model)
        calibrate.set_weight_scales(model)
        graph = TorchGraph(model)
        name = graph.output_names[0]
        found = graph.run(
            {graph.input_names[0]: x}, [name], replaced=quantizers.as_float(quantizers.find(model.graph))
        )[name]
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real models are not here (../shared/data)")
def test_a_transformer_learns_too(tmp_path: Path) -> None:
    path = DATA / "models" / "r20vit_hybrid_cifar10.onnx"
    name = models.load(path).graph.inputs[0].name
    images = np.load(DATA / "images" / "cifar10_calib1024_uint8.npz")
    key = next(key for key in images.files if images[key].ndim == 4)
    pixels = images[key][:16].astype(np.float32)
    pixels = pixels.transpose(0, 3, 1, 2) if pixels.shape[-1] == 3 else pixels
    data = tmp_path / "data.npz"
    np.savez(data, **{name: (pixels / 255 - 0.48) / 0.24})
    formats = {"weights": "int4", "activations": "int8", "samples": 16}
    knobs = {"weight_ranges": "mse", "observer": "mse", "bias_correction": False}
    nearest = onnxq.quantize(path, data, recipe="int8", knobs=knobs, **formats)
    learned = onnxq.quantize(path, data, recipe="brecq", knobs=QUICK | {"samples": 16, "iterations": 25}, **formats)
    assert sqnr(learned) > sqnr(nearest)


def test_an_export_of_one_sample_learns_with_quantization_dropped(network: Path, calibration: Path) -> None:
    model = models.read(network)
    model.graph.inputs[0].shape = ir.Shape((1, 3, 16, 16))
    models.save(model, network)
    knobs = {"iterations": 3, "batch": 4, "samples": 8}
    assert sqnr(onnxq.quantize(network, calibration, recipe="qdrop", weights="int4", knobs=knobs)) > 10
