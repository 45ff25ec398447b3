"""Recipes without data: the terms of transformers, the properties of the papers, and what a user gets."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DATA, MODELS, NETWORK, SHAPES, add_weights

import onnxq
from onnxq import OnnxqError
from onnxq import model as models

torch = pytest.importorskip("torch", reason="synthesis needs torch: pip install 'onnxq[learn]'")

from torch_networks import NETWORKS, make  # noqa: E402

from onnxq.autograd.interpreter import TorchGraph  # noqa: E402
from onnxq.runtime import Session  # noqa: E402
from onnxq.synthesis.attention import (  # noqa: E402
    DENSITY_FLOOR,
    MOST_PATCHES,
    PatchEntropy,
    attention_outputs,
    differential_entropy,
    patch_similarities,
    taken_apart,
)
from onnxq.synthesis.network import Network  # noqa: E402
from onnxq.synthesis.statistics import Remembered, pooled, remembered  # noqa: E402
from onnxq.synthesis.synthesize import BOUNDS, Synthesised, default_method, synthesise  # noqa: E402
from onnxq.synthesis.terms import MatchStatistics, Slack, TotalVariation, slack_of  # noqa: E402

FASHION = MODELS / "fashion_resnet.onnx"


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer without BatchNormalization, as torch exports it."""
    path = tmp_path_factory.mktemp("transformer") / "vit.onnx"
    inputs = NETWORKS["vit"][1](2)
    torch.onnx.export(make("vit"), inputs, path, input_names=["x"], dynamo=False, dynamic_axes={"x": {0: "N"}})
    return path


ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
attention (float[N,2,4,8] q, float[N,2,8,4] k, float[N,2,4,8] v, float[4,4] mask) => (float[N,2,4,8] y)
<float scale = {0.5}>
{
    SCORES
    p = Softmax (t)
    POSTPROCESS
    y = MatMul (r, v)
}
"""


@pytest.mark.parametrize(
    ("scores", "after"),
    list(
        itertools.product(
            [
                "s = MatMul (q, k)\n t = Mul (s, scale)",
                "u = Mul (q, scale)\n t = MatMul (u, k)",
                "s = MatMul (q, k)\n m = Div (s, scale)\n t = Add (m, mask)",
            ],
            ["r = Identity (p)", "c = Cast <to=1> (p)\n r = Identity (c)"],
        )
    ),
)
def test_attention_is_found_wherever_scale_and_mask_are(scores: str, after: str) -> None:
    model = ir.from_onnx_text(ATTENTION.replace("SCORES", scores).replace("POSTPROCESS", after))
    assert attention_outputs(model) == ["y"]


def test_an_exported_transformer_has_one_for_each_layer(transformer: Path) -> None:
    assert len(attention_outputs(models.load(transformer))) == 2
    assert attention_outputs(models.load(FASHION)) == []


FUSED = """
<ir_version: 10, opset_import: ["" : 23]>
tokens (float[N,3,8,8] x) => (float[N,10] logits) <int64[3] flat = {0, 16, 16}, int64[1] middle = {1}>
{
    e = Conv <strides=[2,2]> (x, patches)
    f = Reshape (e, flat)
    t = Transpose <perm=[0,2,1]> (f)
    q = MatMul (t, wq)
    k = MatMul (t, wk)
    v = MatMul (t, wv)
    a = Attention <q_num_heads=2, kv_num_heads=2> (q, k, v)
    s = Add (a, t)
    h = Attention <q_num_heads=2, kv_num_heads=2> (s, s, s)
    p = ReduceMean <keepdims=0> (h, middle)
    logits = MatMul (p, head)
}
"""


def test_fused_attention_is_taken_apart_to_be_found() -> None:
    shapes = {"patches": (16, 3, 2, 2), **dict.fromkeys(("wq", "wk", "wv"), (16, 16)), "head": (16, 10)}
    model = add_weights(FUSED, shapes)
    models.normalise(model)
    apart = taken_apart(model)
    found = attention_outputs(model)
    assert len(found) == 2 and found == attention_outputs(apart) and default_method(model) == "psaq-vit"
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values = TorchGraph(apart).run({"x": x}, [*found, "logits"])
    torch.testing.assert_close(values["logits"], TorchGraph(model).run({"x": x}, ["logits"])["logits"])
    assert values[found[0]].shape == (3, 2, 16, 8)  # heads apart
    assert synthesise(model, "psaq-vit", count=3, steps=2).entropy is not None
    assert any(node.op_type == "Attention" for node in model.graph)


def test_similarities_leave_out_the_class_token() -> None:
    source = torch.Generator().manual_seed(0)
    values = torch.randn(3, 2, 17, 8, generator=source)
    found = patch_similarities(values, 3)
    assert found.shape == (3, 16 * 16)
    changed = values.clone()
    changed[:, :, 0] += 5
    assert torch.equal(found, patch_similarities(changed, 3))
    alike = values[:, :, 1:2].expand(3, 2, 16, 8)
    torch.testing.assert_close(patch_similarities(alike, 3), torch.ones(3, 256))


def test_windows_and_merged_heads_belong_to_their_image() -> None:
    source = torch.Generator().manual_seed(0)
    windows = torch.randn(6, 2, 16, 8, generator=source)  # three of each of two images
    assert patch_similarities(windows, 2).shape == (2, 3 * 256)
    torch.testing.assert_close(patch_similarities(windows, 2)[0], patch_similarities(windows[:3], 1)[0])
    heads = torch.randn(4, 16, 8, generator=source)
    torch.testing.assert_close(patch_similarities(heads, 2), patch_similarities(heads.reshape(2, 2, 16, 8), 2))


def test_the_entropy_is_that_of_known_densities() -> None:
    """A uniform density; two points, whose kernels are cut in half by the ends of the grid; a normal one; a point."""
    source = torch.Generator().manual_seed(0)
    uniform = torch.linspace(-1, 1, 4096)[None]
    points = torch.cat([torch.full((1, 2048), 0.1), torch.full((1, 2048), 0.95)], 1)
    narrow = 0.9 + 0.02 * torch.randn(1, 4096, generator=source)
    equal = torch.full((1, 4096), 0.9)
    kernel = math.log(0.05 * math.sqrt(2 * math.pi * math.e))
    entropy = [float(differential_entropy(values, 0.05, 50)) for values in (uniform, points, narrow, equal)]
    assert entropy[0] == pytest.approx(math.log(2), abs=0.01)
    assert entropy[1] == pytest.approx((kernel + math.log(2)) / 2, abs=0.01)
    assert entropy[2] == pytest.approx(math.log(math.hypot(0.05, 0.02) / 0.05) + kernel, abs=0.06)
    assert entropy == sorted(entropy, reverse=True)  # equal similarities are no way out


def test_variation_is_measured_in_one_unit_for_all_sizes() -> None:
    """Noise of any size is as far from the variation of pictures; a constant image by all of it."""
    source = torch.Generator().manual_seed(0)
    far = [float(TotalVariation(0.0)(torch.randn(*shape, generator=source), {}))
           for shape in ((8, 3, 64, 64), (4, 3, 224, 224))]  # fmt: skip
    assert far[0] == pytest.approx(far[1], rel=0.03)
    assert float(TotalVariation(2700.0)(torch.ones(2, 3, 32, 32), {})) == 2700


def test_entropy_rises_within_the_bounds_of_pixels(transformer: Path) -> None:
    """By a quarter nat for each attention at least."""
    made = synthesise(models.load(transformer), "psaq-vit", count=8, steps=80)
    assert made.distance is None and made.entropy is not None and made.noise_entropy is not None
    assert made.entropy > made.noise_entropy + 0.5
    images = made.inputs[:-2]  # the rest, a third, is noise
    assert images.min() >= BOUNDS[0] and images.max() <= BOUNDS[1]
    again = synthesise(models.load(transformer), "psaq-vit", count=8, steps=80)
    assert made.inputs.tobytes() == again.inputs.tobytes()


def test_what_reads_no_picture_gets_noise(tmp_path: Path) -> None:
    """The latents that a decoder with attention reads have no patches; normal noise is what they are."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    decoder (float[N,32,8,8] latent) => (float[N,64,32] y)
    <int64[3] rows = {0, 32, 64}>
    {
        [rows] r = Reshape (latent, rows)
        [tokens] t = Transpose <perm=[0,2,1]> (r)
        [q] q = MatMul (t, w1)
        [scores] s = MatMul (q, r)
        [softmax] a = Softmax (s)
        [mix] m = MatMul (a, t)
        [out] y = MatMul (m, w2)
    }
    """
    path = models.save(add_weights(text, {"w1": (32, 32), "w2": (32, 32)}), tmp_path / "m.onnx")
    (warning,) = onnxq.quantize(path, samples=4).numbers["warnings"]
    assert "random inputs" in warning and "no picture" in warning


def test_transformers_without_statistics_choose_it_by_themselves(transformer: Path) -> None:
    result = onnxq.quantize(transformer, samples=4, budget="quick", target="cpu")
    assert "psaq-vit" in result.numbers["samples_from"] and not result.numbers["warnings"]


@pytest.mark.parametrize("recipe", ["zeroq", "dsg", "genie", "psaq-vit"])
def test_a_recipe_brings_its_own_inputs(recipe: str, transformer: Path, network: Path) -> None:
    model = transformer if recipe == "psaq-vit" else network
    knobs = {"iterations": 20} if recipe == "genie" else {}
    numbers = onnxq.quantize(model, recipe=recipe, samples=4, budget="quick", target="cpu", knobs=knobs).numbers
    assert f"({recipe})" in numbers["samples_from"] and numbers["sqnr_db"] > 15


def test_what_a_model_lacks_is_said(transformer: Path) -> None:
    with pytest.raises(OnnxqError, match="expected attention"):
        onnxq.quantize(FASHION, recipe="psaq-vit")
    with pytest.raises(OnnxqError, match="expected BatchNormalization nodes"):
        onnxq.quantize(transformer, recipe="genie")


def test_zeroq_keeps_its_budget(network: Path) -> None:
    numbers = onnxq.quantize(
        network, recipe="zeroq", samples=4, budget="quick", target="cpu", knobs={"budget_bits": 5.0}
    ).numbers
    assert numbers["mean_weight_bits"] <= 5
    assert len(set(numbers["layer_formats"].values())) > 1


def test_synthesis_changes_nothing_in_the_model() -> None:
    model = models.load(FASHION)
    before = {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()}
    synthesise(model, "zeroq", count=4, steps=3)
    assert before == {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()}


def test_one_layer_is_matched_exactly() -> None:
    """Where BatchNormalization reads the input itself, the best samples have its mean and deviation each."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    single (float[N,3,8,8] x) => (float[N,3,8,8] y) { [b] y = BatchNormalization (x, g, b, m, v) }
    """
    model = add_weights(text, {name: (3,) for name in "gbmv"})
    layer = remembered(model)[0]
    start = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, deviation = start.mean((2, 3), keepdim=True), start.var((2, 3), keepdim=True, correction=0).sqrt()
    exact = (start - mean) / deviation * layer.deviation[:, None, None] + layer.mean[:, None, None]
    match = MatchStatistics([layer], per_sample=True, mean_of_channels=False)
    assert float(match(exact, {"x": exact})) < 1e-8 < 1e-2 < float(match(start, {"x": start}))


def test_no_slack_and_no_emphasis_are_zeroq(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, in batches of the same size."""
    from dataclasses import replace

    from onnxq.synthesis import methods

    plain = replace(methods.METHODS["dsg"], slack=0.0, emphasis=0.0, batch=32)
    model = add_weights(NETWORK, SHAPES)
    slack, zeroq = (synthesise(model, name, count=8, steps=20).inputs for name in ("dsg", "zeroq"))
    monkeypatch.setitem(methods.METHODS, "dsg", plain)
    assert synthesise(model, "dsg", count=8, steps=20).inputs.tobytes() == zeroq.tobytes() != slack.tobytes()


def test_every_pixel_is_learned() -> None:
    """Gradients reach all of them."""
    model = add_weights(NETWORK, SHAPES)
    first, last = (synthesise(model, "zeroq", count=4, steps=steps).inputs for steps in (1, 2))
    assert bool((first != last).all())


@pytest.mark.parametrize("method", ["hast", "texq"])
def test_made_images_are_of_the_classes_that_were_drawn(method: str) -> None:
    """As many of each class, and the float network sees what they are meant to be."""
    made = synthesise(models.load(FASHION), method, count=20, steps=60)
    logits = next(iter(Session(models.load(FASHION)).run({"x": made.inputs})))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).numpy()
    assert (logits.argmax(1) == np.tile(order, 2)).mean() >= 0.95


def test_no_gradient_within_the_slack() -> None:
    source = torch.Generator().manual_seed(0)
    layer = Remembered("v", torch.zeros(3), torch.ones(3))
    values = torch.randn(4, 3, 5, 5, generator=source)
    means = values.mean((2, 3)).abs()
    free = Slack(float(means.median()), 10.0)
    values.requires_grad_(True)
    MatchStatistics([layer], True, False, [free])(values, {"v": values}).backward()
    touched = values.grad.abs().sum((2, 3)) > 0
    assert torch.equal(touched, means > free.mean) and touched.any() and not touched.all()


def test_slack_grows_with_the_part_that_is_free() -> None:
    source = torch.Generator().manual_seed(0)
    layer = Remembered("v", torch.randn(16, generator=source), torch.ones(16))
    taps = {"v": torch.randn(8, 16, 5, 5, generator=source)}
    free = [slack_of(pooled([taps], [layer]), [layer], part)[0] for part in (0.0, 0.5, 0.9, 1.0)]
    for values in ([item.mean for item in free], [item.deviation for item in free]):
        assert values == sorted(values) and values[0] >= 0


def diversity(inputs: np.ndarray, model: ir.Model) -> float:
    """The spread over samples of each channel's mean, in remembered deviations: the mean over layers and channels."""
    layers = remembered(model)
    taps = TorchGraph(model).run({"x": torch.from_numpy(inputs)}, [layer.value for layer in layers])
    return float(torch.cat([taps[layer.value].mean((2, 3)).std(0) / layer.deviation for layer in layers]).mean())


def test_slack_keeps_samples_apart() -> None:
    """DSG against the homogenisation by ZeroQ."""
    model = models.load(FASHION)
    found = {name: diversity(synthesise(model, name, count=12, steps=50).inputs, model) for name in ("zeroq", "dsg")}
    assert found["dsg"] > 1.1 * found["zeroq"]


def test_a_generator_makes_smoother_images_than_pixels() -> None:
    """GENIE: images of a generator have fewer high frequencies."""

    def high_frequencies(name: str) -> float:
        inputs = synthesise(models.load(FASHION), name, count=16, steps=40).inputs
        power = np.abs(np.fft.fftshift(np.fft.fft2(inputs - inputs.mean((2, 3), keepdims=True)), axes=(2, 3))) ** 2
        rows, columns = np.indices(power.shape[2:]) - np.array(power.shape[2:])[:, None, None] // 2
        return float(power[:, :, np.hypot(rows, columns) > power.shape[2] / 4].sum() / power.sum())

    assert high_frequencies("genie") < 0.7 * high_frequencies("pixels")


@pytest.fixture(scope="module")
def hybrid() -> tuple[Path, Synthesised]:
    """The CIFAR-10 hybrid, and images made for it: eight that were learned, and four of noise behind them."""
    path = DATA / "models" / "r20vit_hybrid_cifar10.onnx"
    if not path.is_file():
        pytest.skip("the real models are not here (../shared/data)")
    return path, synthesise(models.load(path), "psaq-vit", count=12, steps=160)


def test_entropy_and_classes_of_a_real_hybrid(hybrid: tuple[Path, Synthesised]) -> None:
    """Patches of made images are told apart, those of noise less; the network is sure of the classes that were drawn.

    Of a transformer that never was trained the variation of images is all that is learned: classes stay at chance.
    """
    path, made = hybrid
    assert len(attention_outputs(models.load(path))) == 6
    assert made.entropy is not None and made.noise_entropy is not None and made.entropy > made.noise_entropy + 1
    network, session = Network(models.load(path), 0, "cpu"), Session(models.load(path))
    other = synthesise(models.load(path), "psaq-vit", count=12, steps=160, seed=1)
    images = [made.inputs[:8], other.inputs[:8]]
    right, distances = [], []
    for seed, batch in enumerate(images):
        pixels = (torch.from_numpy(batch) - network.shift) / network.scale  # back from the units that the network reads
        assert pixels.min() >= BOUNDS[0] - 1e-5 and pixels.max() <= BOUNDS[1] + 1e-5
        logits = torch.from_numpy(next(iter(session.run({made.name: batch}))))
        labels = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:8]
        right.append(float((logits.argmax(1) == labels).float().mean()))
        distances.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert np.mean(right) >= 0.9
    assert np.mean(distances) < 0.5


def test_ranges_from_images_for_a_hybrid_are_as_good_as_real_ones(
    hybrid: tuple[Path, Synthesised], tmp_path: Path
) -> None:
    """W8A8: no point of top-1 below real images, nor below noise; and well nearer to the float network than noise."""
    path, made = hybrid
    for split, count in (("calib", 12), ("test", 300)):
        command = [sys.executable, str(DATA / "prepare.py"), path.stem, split, "-n", str(count), "-o", f"{split}.npz"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    noise = np.random.default_rng(0).standard_normal(made.inputs.shape).astype(np.float32)
    found = {}
    for name, data in (("real", tmp_path / "calib.npz"), ("made", [{made.name: made.inputs}]),
                       ("noise", [{made.name: noise}])):  # fmt: skip
        onnxq.quantize(path, data, output=tmp_path / "quantized.onnx")
        options = {"latency": False, "layers": False}
        found[name] = onnxq.compare(path, tmp_path / "quantized.onnx", tmp_path / "test.npz", **options)
    assert found["made"].top1_quantized >= found["real"].top1_quantized - 0.01
    assert found["noise"].top1_quantized <= found["made"].top1_quantized + 0.01
    assert found["made"].sqnr_db > found["noise"].sqnr_db + 3


def test_the_term_adds_attentions_up() -> None:
    source = torch.Generator().manual_seed(0)
    taps = {name: torch.randn(4, 2, 16, 8, generator=source) for name in "ab"}
    inputs = torch.zeros(4, 3, 8, 8)
    alone = [float(PatchEntropy([name])(inputs, taps)) for name in "ab"]
    assert float(PatchEntropy(["a", "b"])(inputs, taps)) == pytest.approx(sum(alone), rel=1e-5)


def test_the_gradient_of_an_entropy_is_that_of_its_bins() -> None:
    """The ends of the grid have no gradient, and everything between them has that of finite differences."""
    values = torch.rand(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values[:, 0], values[:, 1] = 0.0, 1.0  # the ends
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def entropy(inner: torch.Tensor) -> torch.Tensor:
        return differential_entropy(torch.cat([values[:, :2], inner], dim=1), 0.1, 25) @ weights

    inner = values[:, 2:].clone().requires_grad_()
    assert torch.autograd.gradcheck(entropy, (inner,))


def test_the_entropy_is_that_of_a_kernel_around_each_value() -> None:
    """Bins a quarter of a bandwidth wide change it by less than what a seed does, and its gradient hardly turns."""
    draws = torch.Generator().manual_seed(3)
    for values in (torch.rand(4, 3000, generator=draws) * 2 - 1, torch.randn(4, 3000, generator=draws).clamp(-1, 1)):
        values.requires_grad_()
        low, high = float(values.detach().min()), float(values.detach().max())
        grid = torch.linspace(low, high, 50)
        kernels = torch.exp(-0.5 * ((values[:, :, None] - grid) / 0.05).square()).mean(1)
        floored = kernels / (0.05 * math.sqrt(2 * math.pi)) + DENSITY_FLOOR
        exact = torch.trapezoid(-floored * floored.log(), grid, dim=1)
        found = differential_entropy(values, 0.05, 50)
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-3)
        slopes, wanted = (torch.autograd.grad(entropy.sum(), values)[0].ravel() for entropy in (found, exact))
        assert torch.nn.functional.cosine_similarity(slopes, wanted, dim=0) > 0.99


def test_of_many_patches_some_are_compared() -> None:
    """An early stage at 256² has 4,096 patches: all pairs of 16 pictures would take gigabytes at each step."""
    stage = torch.randn(2, 1, 4096, 8, generator=torch.Generator().manual_seed(2))
    stage[:, :, :2048] += 1.0  # an object
    found = patch_similarities(stage, 2)
    assert found.shape == (2, MOST_PATCHES**2)
    every = torch.nn.functional.normalize(stage.mean(1), dim=-1)
    whole = (every @ every.transpose(1, 2)).reshape(2, -1)
    assert torch.allclose(differential_entropy(found, 0.05, 50), differential_entropy(whole, 0.05, 50), atol=0.02)
