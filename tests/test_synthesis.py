"""Inputs made from a model: the terms are what the papers say, the loss falls, and calibration profits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS, NETWORK, SHAPES, add_weights
from typer.testing import CliRunner

import onnxq
from onnxq import OnnxqError
from onnxq import model as models
from onnxq.calibration.data import input_specs
from onnxq.cli import app
from onnxq.inputs import default_count
from onnxq.progress import Progress

torch = pytest.importorskip("torch", reason="synthesis needs torch: pip install 'onnxq[learn]'")

from onnxq.autograd.interpreter import TorchGraph  # noqa: E402
from onnxq.synthesis.scale import input_scale, picture_noise, pixel_bounds  # noqa: E402
from onnxq.synthesis.statistics import Remembered, distance, moments, pooled, remembered  # noqa: E402
from onnxq.synthesis.swing import swing  # noqa: E402
from onnxq.synthesis.synthesize import synthesise  # noqa: E402
from onnxq.synthesis.terms import MatchStatistics, Slack, slack_of  # noqa: E402
from onnxq.synthesis.variables import Pixels  # noqa: E402

FASHION = MODELS / "fashion_resnet.onnx"

COMPUTED_STATISTICS = """
<ir_version: 10, opset_import: ["" : 17]>
computed (float[N,3,8,8] x) => (float[N,32,8,8] z) {
    [c] y = Conv <pads=[1,1,1,1]> (x, w)
    m = ReduceMean <axes=[0,2,3], keepdims=0> (y)
    v = ReduceSumSquare <axes=[0,2,3], keepdims=0> (y)
    [b] z = BatchNormalization (y, s, s, m, v)
}
"""


def fashion() -> ir.Model:
    return models.load(FASHION)


def some_layers(count: int) -> tuple[list[Remembered], dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(0)
    layers = [Remembered(f"v{index}", torch.zeros(3), torch.ones(3)) for index in range(count)]
    return layers, {layer.value: torch.randn(4, 3, 5, 5, generator=source) for layer in layers}


def test_zeroq_sums_over_channels_and_averages_over_samples() -> None:
    layers, taps = some_layers(2)
    found = MatchStatistics(layers, per_sample=True, mean_of_channels=False)(taps["v0"], taps)
    wanted = 0.0
    for values in taps.values():
        mean, deviation = values.mean(dim=(2, 3)), (values.var(dim=(2, 3), correction=0) + 1e-6).sqrt()
        wanted += float((mean.square() + (deviation - 1).square()).sum(1).mean())
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_gdfq_and_who_follow_it_match_the_variances_of_a_batch() -> None:
    layers, taps = some_layers(2)
    found = MatchStatistics(layers, per_sample=False, mean_of_channels=True, variances=True)(taps["v0"], taps)
    wanted = 0.0
    for values in taps.values():
        mean, variance = values.mean(dim=(0, 2, 3)), values.var(dim=(0, 2, 3), correction=0)
        wanted += float((mean.square() + (variance - 1).square()).mean())
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_a_batch_can_match_while_no_sample_does() -> None:
    layers = [Remembered("v", torch.zeros(1), torch.ones(1))]
    values = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    batch = MatchStatistics(layers, per_sample=False, mean_of_channels=True)(values, {"v": values})
    alone = MatchStatistics(layers, per_sample=True, mean_of_channels=True)(values, {"v": values})
    assert float(batch) < 1e-6 < 1.9 < float(alone)


def test_slack_is_what_noise_is_off_and_frees_that_much() -> None:
    layers, taps = some_layers(3)
    plain = MatchStatistics(layers, True, False)
    assert float(MatchStatistics(layers, True, False, [Slack()] * 3)(taps["v0"], taps)) == float(
        plain(taps["v0"], taps)
    )
    all_of_it = slack_of(pooled([taps], layers), layers, 1.0)
    assert float(MatchStatistics(layers, False, False, all_of_it)(taps["v0"], taps)) == pytest.approx(0, abs=1e-10)


def test_emphasis_doubles_one_layer_for_each_sample() -> None:
    layers, taps = some_layers(4)
    alone = []
    for row, layer in enumerate(layers):
        own = {layer.value: taps[layer.value][[row]]}
        alone.append(float(MatchStatistics([layer], True, False)(own[layer.value], own)))
    plain = float(MatchStatistics(layers, True, False)(taps["v0"], taps))
    emphasised = float(MatchStatistics(layers, True, False, emphasis=1.0)(taps["v0"], taps))
    assert emphasised == pytest.approx(plain + sum(alone) / 4, rel=1e-5)


def test_swing_lets_every_pixel_count_and_leaves_the_graph_alone() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    strided (float[N,1,8,8] x) => (float[N,1,4,4] y) { [c] y = Conv <strides=[2,2]> (x, w) }
    """
    model = add_weights(text, {"w": (1, 1, 1, 1)})
    graph = TorchGraph(model)
    replaced = swing(graph, model, torch.Generator().manual_seed(0))

    def reached(draws: int, replacements: dict) -> float:
        x = torch.ones(1, 1, 8, 8, requires_grad=True)
        for _ in range(draws):
            graph.run({"x": x}, ["y"], replaced=replacements)["y"].sum().backward()
        return float((x.grad != 0).float().mean())

    assert reached(1, {}) == 0.25
    assert reached(60, replaced) == 1.0
    x = torch.randn(2, 1, 8, 8)
    assert graph.run({"x": x}, ["y"], replaced=replaced)["y"].shape == (2, 1, 4, 4)
    assert torch.equal(graph.run({"x": x}, ["y"])["y"], graph.run({"x": x}, ["y"])["y"])


@pytest.mark.parametrize("picture", [False, True])
def test_a_network_that_reads_bytes_is_recognised(picture: bool) -> None:
    """The first filters of the shipped classifier, made for 0 … 255 instead of -1 … 1."""
    model = fashion()
    first = next(node for node in model.graph if node.op_type == "Conv")
    x = model.graph.inputs[0]
    half, one = (ir.Value(name=name, const_value=ir.tensor(np.float32(number), name=name)) for name, number in
                 (("half", 127.5), ("one", 1.0)))  # fmt: skip
    tape = ir.tape.Tape()
    scaled = tape.op("Sub", [tape.op("Div", [x, half]), one])
    for value in (half, one):
        model.graph.register_initializer(value)
    model.graph.insert_before(first, tape.nodes)
    first.replace_input_with(0, scaled)
    scaled.name, tape.nodes[0].outputs[0].name = "scaled", "divided"
    found = {}
    for name, network in (("bytes", model), ("normalised", fashion())):
        layers = remembered(network)
        source = torch.Generator().manual_seed(0)
        scale, shift = input_scale(TorchGraph(network), "x", (1, 28, 28), layers, source, picture=picture)
        found[name] = float(scale), float(shift)
    assert found["bytes"][0] == pytest.approx(127.5 * found["normalised"][0], rel=0.25)
    assert found["bytes"][1] == pytest.approx(127.5 * (found["normalised"][1] + 1), rel=0.25)


def test_statistics_that_are_no_numbers_leave_the_units_alone() -> None:
    network = fashion()
    layers = [replace(layer, mean=layer.mean * float("nan")) for layer in remembered(network)]
    scale, shift = input_scale(TorchGraph(network), "x", (1, 28, 28), layers, torch.Generator().manual_seed(0))
    assert (float(scale), float(shift)) == (1, 0)


def test_noise_of_pictures_is_smooth_and_nearly_grey() -> None:
    source = torch.Generator().manual_seed(0)
    made = picture_noise((16, 3, 32, 48), source)
    assert float(made.std()) == pytest.approx(1, abs=1e-5)
    assert float((made[..., 1:] - made[..., :-1]).square().mean()) < 0.3  # 2 in white noise
    colours = torch.corrcoef(made.transpose(0, 1).flatten(1))
    assert float(colours[0, 1]) == pytest.approx(0.9, abs=0.03)
    waves = torch.fft.rfft2(made).abs().square().mean((0, 1))
    assert float(waves[2, 0] / waves[8, 0]) == pytest.approx(4**2.4, rel=0.5)
    sequence = picture_noise((16, 3, 32), source)  # has no spectrum of pictures
    assert float((sequence[..., 1:] - sequence[..., :-1]).square().mean()) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("deviation", "mean", "bounds"),
    [
        (41.0, 127.0, (0, 255)),  # what the networks of MLPerf Tiny and of ImageNet are found to be fed with
        (70.0, 10.0, (-124, 151)),
        (0.2, 0.5, (0, 1)),
        (0.59, 0.0, (-1, 1)),
        (1.13, -0.1, (-2.12, 2.64)),
    ],
)
def test_pixels_stay_between_black_and_white(deviation: float, mean: float, bounds: tuple[float, float]) -> None:
    scale, shift = torch.full((1, 3, 1, 1), deviation), torch.full((1, 3, 1, 1), mean)
    found = pixel_bounds(scale, shift)
    assert found is not None
    for bound, wanted in zip(found, bounds, strict=True):
        torch.testing.assert_close(scale * bound + shift, torch.full((1, 3, 1, 1), float(wanted)))
    assert pixel_bounds(scale[:, :1], shift[:, :1]) is None  # a spectrogram, perhaps
    pixels = Pixels(100 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 1.0, 5, found)
    for step in range(2):
        assert bool((pixels.made() >= found[0]).all() and (pixels.made() <= found[1]).all())
        if not step:
            pixels.inputs().sum().backward()
            pixels.step(torch.tensor(0.0))


@pytest.mark.parametrize("method", ["pixels", "zeroq", "dsg", "genie"])
def test_the_loss_falls_and_statistics_come_near(method: str) -> None:
    made = synthesise(fashion(), method, count=16, steps=60)
    losses = np.array(made.losses[0])
    assert losses[-5:].mean() < 0.4 * losses[0]
    assert made.distance < 0.6 * made.noise_distance
    assert made.inputs.shape == (16, 1, 28, 28) and made.inputs.dtype == np.float32


def test_samples_that_match_by_themselves_look_more_alike() -> None:
    """The homogenisation that DSG and GENIE speak of."""

    def spread(method: str) -> float:
        inputs = synthesise(fashion(), method, count=16, steps=80).inputs
        return float(inputs.mean(axis=(1, 2, 3)).std())

    assert spread("zeroq") < 0.7 * spread("pixels")


def test_one_seed_gives_the_same_bytes_also_after_an_interruption(tmp_path: Path) -> None:
    options = {"count": 40, "steps": 6, "seed": 3}
    whole = synthesise(fashion(), "pixels", **options).inputs
    assert whole.tobytes() == synthesise(fashion(), "pixels", **options).inputs.tobytes()

    class StoppedError(Exception):
        pass

    class Stops(Progress):
        def stage(self, *arguments: object, **keywords: object):  # type: ignore[no-untyped-def]
            import contextlib

            @contextlib.contextmanager
            def stage():  # type: ignore[no-untyped-def]
                def advance(done: int) -> None:
                    if done == 9:  # in the second batch
                        raise StoppedError

                yield advance

            return stage()

    with pytest.raises(StoppedError):
        synthesise(fashion(), "pixels", **options, checkpoint=tmp_path / "kept", progress=Stops())
    assert len(list((tmp_path / "kept").glob("*.npz"))) == 1
    again = synthesise(fashion(), "pixels", **options, checkpoint=tmp_path / "kept").inputs
    assert again.tobytes() == whole.tobytes()


def test_quantizing_without_data_is_nearly_as_good_as_with(tmp_path: Path) -> None:
    test = MODELS / "fashion_test.npz"
    found = {}
    for name, data, options in (
        ("real", MODELS / "fashion_calibration.npz", {}),
        ("made", None, {}),
        ("noise", None, {"synthesis": "noise"}),
    ):
        result = onnxq.quantize(FASHION, data, target="cpu", output=tmp_path / f"{name}.onnx", **options)
        found[name] = onnxq.compare(FASHION, tmp_path / f"{name}.onnx", test, latency=False, layers=False)
        assert bool(result.numbers["warnings"]) == (name == "noise")
    assert abs(found["made"].top1_quantized - found["real"].top1_quantized) < 0.004
    assert found["made"].sqnr_db > found["noise"].sqnr_db


def test_the_command_writes_what_quantize_reads(tmp_path: Path) -> None:
    made, grid, report = tmp_path / "made.npz", tmp_path / "grid.png", tmp_path / "report.html"
    arguments = ["synthesize", str(FASHION), "-o", str(made), "-n", "8", "--steps", "5", "--grid", str(grid)]
    arguments += ["--report", str(report)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert sorted(tmp_path.iterdir()) == [grid, made, report]  # finished batches are no longer kept
    assert grid.is_file() and "BatchNorm statistics are off by" in done.output
    result = onnxq.quantize(FASHION, made)
    assert result.numbers["samples"] == 8 and result.numbers["knobs"]["observer"] == "widened"
    page = report.read_text()
    assert "data:image/png;base64," in page and "<h2>Loss</h2>" in page and "<td>0</td><td>5</td>" in page


def test_channels_may_come_last() -> None:
    """A network that turns its input at once gets the same inputs, turned."""
    turned = add_weights(
        NETWORK.replace("float[N,3,16,16] x", "float[N,16,16,3] x").replace(
            "[conv1] c1 = Conv <pads=[1,1,1,1]> (x, w1)",
            "t = Transpose <perm=[0,3,1,2]> (x)\n    [conv1] c1 = Conv <pads=[1,1,1,1]> (t, w1)",
        ),
        SHAPES,
    )
    first, last = (synthesise(model, "pixels", count=4, steps=5) for model in (add_weights(NETWORK, SHAPES), turned))
    assert last.inputs.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(last.inputs.transpose(0, 3, 1, 2), first.inputs)
    assert last.distance == pytest.approx(first.distance)


def test_a_channel_that_never_changed_does_not_outweigh_all_others() -> None:
    layer = Remembered("v", torch.zeros(8), torch.ones(8))
    dead = Remembered("v", torch.zeros(8), torch.tensor([1e-3] + [1.0] * 7))
    values = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    values[:, 0] *= 0.01
    found = pooled([{"v": values}], [layer])
    assert distance(found, [dead]) < distance(found, [layer])


def test_statistics_of_batches_are_those_of_all_of_it() -> None:
    source = torch.Generator().manual_seed(0)
    for shape in ((10, 8, 4, 4), (10, 8)):
        values = 3 + torch.arange(10.0).reshape(-1, *[1] * (len(shape) - 1)) + torch.randn(*shape, generator=source)
        layer = Remembered("v", torch.zeros(8), torch.ones(8))
        ((mean, deviation),) = pooled(({"v": part} for part in values.split(4)), [layer])
        axes = [0, *range(2, len(shape))]
        torch.testing.assert_close(mean, values.mean(axes))
        torch.testing.assert_close(deviation, values.var(axes, correction=0).sqrt())


def test_large_pictures_are_few_and_made_few_at_a_time(tmp_path: Path) -> None:
    """So that memory and time hardly grow with the size: a large one shows each layer as much as several small ones."""
    counts = {}
    for side in (32, 224, 512, 1024):
        text = f"""<ir_version: 10, opset_import: ["": 20]>
        large (float[1, 3, {side}, {side}] x) => (float[1, 8, h, w] y) {{
            c = Conv <strides = [8, 8]> (x, w)
            y = BatchNormalization (c, gain, bias, mean, v_variance)
        }}"""
        sizes = {"gain": (8,), "bias": (8,), "mean": (8,), "v_variance": (8,)}
        path = tmp_path / f"{side}.onnx"
        ir.save(add_weights(text, {"w": (8, 3, 8, 8), **sizes}), path)
        model = models.load(path)
        counts[side] = default_count(input_specs(model))
        made = synthesise(model, count=counts[side], steps=1)
        assert len(made) == counts[side]
        assert len(made) // len(made.losses) * side**2 <= 16 * 224**2 or len(made) // len(made.losses) == 4
    assert counts == {32: 64, 224: 32, 512: 6, 1024: 4}


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    folded = tmp_path / "folded.onnx"
    model = add_weights(NETWORK, SHAPES)
    models.normalise(model)
    from onnxq.passes.fold_batchnorm import FoldBatchNorm

    FoldBatchNorm()(model)
    models.save(model, folded)
    with pytest.raises(OnnxqError, match="expected BatchNormalization nodes"):
        onnxq.quantize(folded, synthesis="genie")
    warnings = onnxq.quantize(folded).numbers["warnings"]
    assert "BatchNormalization nodes, or --statistics, would tell more" in warnings[0]
    computed = tmp_path / "computed.onnx"  # from the batch itself, nothing is remembered
    models.save(add_weights(COMPUTED_STATISTICS, {"w": (32, 3, 3, 3), "s": (32,)}), computed)
    with pytest.raises(OnnxqError, match="with constant statistics"):
        onnxq.quantize(computed, synthesis="pixels", target="cpu")
    assert onnxq.quantize(computed, target="cpu").numbers["warnings"]
    with pytest.raises(OnnxqError, match="expected a way to make inputs"):
        synthesise(fashion(), "zero")


def test_a_model_that_does_not_run_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[N,3,16,16] x) => (y) <int64[2] sizes = {-1, 7}> {
        c = Conv <pads=[1,1,1,1]> (x, w)
        n = BatchNormalization (c, g1, b1, m1, v1)
        y = Reshape (n, sizes)
    }
    """
    path = tmp_path / "broken.onnx"
    shapes = {"w": (8, 3, 3, 3), "g1": (8,), "b1": (8,), "m1": (8,), "v1": (8,)}
    ir.save(add_weights(text, shapes), path)
    progress = Progress()
    with pytest.raises(OnnxqError, match="Reshape"):
        onnxq.quantize(path, target="cpu", progress=progress)
    assert "synthesise" not in progress.seconds


def test_moments_are_those_of_numpy() -> None:
    values = torch.randn(3, 4, 5, 6)
    mean, deviation = moments(values, per_sample=False)
    np.testing.assert_allclose(mean, values.numpy().mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(deviation, values.numpy().std(axis=(0, 2, 3)), rtol=1e-4)


def test_nothing_is_made_for_recipes_that_read_no_data() -> None:
    """Weights alone, without data: random inputs do to judge the result, which then says so."""
    unbiased = {"bias_correction": False}
    numbers = onnxq.quantize(FASHION, recipe="rex", activations="float", knobs=unbiased).numbers
    assert "judged on random inputs" in numbers["warnings"][0] and "synthesise" not in numbers["seconds"]
    assert not onnxq.quantize(FASHION, recipe="rex", budget="quick", samples=8).numbers["warnings"]


def test_weights_through_which_nothing_finite_can_be_made_give_noise(network: Path) -> None:
    model = ir.load(network)
    weight = model.graph.initializers["w1"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1e30), name="w1")
    ir.save(model, network)
    warnings = onnxq.quantize(network, samples=2, budget="quick").numbers["warnings"]
    assert any("random inputs" in line and "overflow" in line for line in warnings)
