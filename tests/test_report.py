"""Metrics that merge, and the report in its three forms."""

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rich.console import Console

from onnxq.engines import EngineBuild
from onnxq.report.html import histogram_plot, render_html, sqnr_bars
from onnxq.report.metrics import Accuracy, Agreement, MeanError, Perplexity, Sqnr, json_safe
from onnxq.report.scales import scale_plots
from onnxq.report.sections import engine_table
from onnxq.report.steps import step_plot
from onnxq.report.table import closing_table, plain_lines

PAIRS = arrays.arrays(np.float32, st.tuples(st.just(2), st.integers(0, 30)), elements=st.floats(-100, 100, width=32))


@given(PAIRS, PAIRS)
def test_sqnr_merges_like_concatenation(first, second):
    merged, other, whole = Sqnr(), Sqnr(), Sqnr()
    merged.update(*first)
    other.update(*second)
    merged.merge(other)
    whole.update(*np.concatenate([first, second], axis=1))
    assert merged.count == whole.count
    assert merged.signal == pytest.approx(whole.signal, rel=1e-12)
    assert merged.noise == pytest.approx(whole.noise, rel=1e-12)


@given(PAIRS, PAIRS)
def test_mean_error_merges_like_concatenation(first, second):
    merged, other, whole = MeanError(), MeanError(), MeanError()
    merged.update(*first)
    other.update(*second)
    merged.merge(other)
    whole.update(*np.concatenate([first, second], axis=1))
    assert merged.count == whole.count
    assert merged.total == pytest.approx(whole.total, rel=1e-12, abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.integers(0, 8))
def test_counts_merge_exactly(seed, rows, more):
    generator = np.random.default_rng(seed)
    scores, found = generator.normal(size=(2, rows + more, 7)).astype(np.float32)
    labels = generator.integers(0, 7, rows + more)
    merged, other, whole = Accuracy(5), Accuracy(5), Accuracy(5)
    merged.update(scores[:rows], labels[:rows])
    other.update(scores[rows:], labels[rows:])
    merged.merge(other)
    whole.update(scores, labels)
    assert merged == whole
    same, rest, all_of_it = Agreement(), Agreement(), Agreement()
    same.update(scores[:rows], found[:rows])
    rest.update(scores[rows:], found[rows:])
    same.merge(rest)
    all_of_it.update(scores, found)
    assert same == all_of_it


@pytest.mark.parametrize("metric", [Sqnr, MeanError, Agreement, Accuracy, Perplexity])
def test_nothing_seen_has_no_value_and_merges_as_nothing(metric):
    empty = metric()
    empty.merge(metric())
    assert empty == metric()
    assert empty.value is None


def test_sqnr_is_twenty_db_at_a_tenth():
    sqnr = Sqnr()
    sqnr.update(np.float32([1, -1]), np.float32([1.1, -1.1]))
    assert sqnr.value == pytest.approx(20.0, abs=1e-5)


def test_sqnr_of_identical_tensors_is_infinite():
    sqnr = Sqnr()
    sqnr.update(np.ones(3, np.float32), np.ones(3, np.float32))
    assert sqnr.value == math.inf


def test_sqnr_of_a_broken_tensor_is_minus_infinite_and_counted():
    sqnr = Sqnr()
    sqnr.update(np.float32([1, 2, 3]), np.float32([1, np.nan, np.inf]))
    assert sqnr.value == -math.inf
    assert sqnr.not_finite == 2


def test_sqnr_leaves_out_what_the_float_model_masks():
    sqnr = Sqnr()
    sqnr.update(np.float32([1, -np.inf]), np.float32([1, -np.inf]))
    assert (sqnr.value, sqnr.count) == (math.inf, 1)


def test_accuracy_counts_the_label_among_the_best():
    scores = np.float32([[3, 2, 1], [1, 2, 3], [np.nan, 0, 0]])
    top1, top2 = Accuracy(1), Accuracy(2)
    for accuracy in (top1, top2):
        accuracy.update(scores, np.array([0, 1, 0]))
    assert (top1.hits, top2.hits, top1.count) == (1, 2, 3)


def test_accuracy_breaks_ties_as_argmax_does():
    accuracy = Accuracy(1)
    accuracy.update(np.zeros((3, 3), np.float32), np.array([0, 1, 2]))
    assert accuracy.hits == 1


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    perplexity = Perplexity()
    perplexity.update(np.zeros((2, 5, 11), np.float32), np.zeros((2, 5), np.int64))
    assert perplexity.value == pytest.approx(11.0)
    assert perplexity.count == 8


def test_perplexity_does_not_count_padding():
    perplexity = Perplexity()
    mask = np.array([[1, 1, 0, 0]])
    perplexity.update(np.zeros((1, 4, 3), np.float32), np.zeros((1, 4), np.int64), mask)
    assert perplexity.count == 1


def test_json_safe_is_strict_json_that_reads_back():
    value = {"a": math.inf, "b": [-math.inf, math.nan], "c": np.float32(1.5), "d": np.arange(2)}
    text = json.dumps(json_safe(value), allow_nan=False)
    assert json.loads(text) == {"a": "inf", "b": ["-inf", None], "c": 1.5, "d": [0, 1]}
    assert float(json.loads(text)["a"]) == math.inf


RESULT = {
    "model": "/models/resnet20.onnx",
    "output": "/models/resnet20.int8.onnx",
    "recipe": "minmax",
    "target": "cpu",
    "weights": "int8",
    "activations": "int8",
    "quantized_nodes": 21,
    "weighted_nodes": 22,
    "integer_kernels": 31,
    "optimized_nodes": {"QLinearConv": 20, "QLinearAdd": 11, "QuantizeLinear": 1},
    "float_bytes": 18_000_000,
    "quantized_bytes": 4_800_000,
    "sqnr_db": 28.05,
    "agreement": 0.985,
    "top1_float": 0.91,
    "top1_quantized": 0.8992,
    "latency_ms_float": 1.61,
    "latency_ms_quantized": 0.59,
    "seconds": {"total": 6.4, "calibrate": 3.1, "learn": 0.0, "check": 2.2},
    "float_inference_seconds": 2.1,
    "peak_rss_mib": 1412,
    "samples": 200,
    "layers": [{"name": f"conv{i}", "op": "Conv", "value": f"v{i}", "sqnr_db": 8.0 + 4 * i} for i in range(8)],
    "warnings": ["look twice"],
    "next_steps": ["--exclude conv0"],
    "command": "onnxq quantize resnet20.onnx",
    "versions": {"onnxruntime": "1.32.0"},
}


def rendered(result, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(closing_table(result))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [100, 60])
def test_table_fits_and_says_what_was_gained(width):
    lines = rendered(RESULT, width).splitlines()
    assert max(map(len, lines)) <= width
    columns = {line.split("  ")[0]: line.split() for line in lines}
    assert columns["size"] == ["size", "18.0", "MB", "4.8", "MB", "3.8×"]
    assert columns["latency"] == ["latency", "1.61", "ms", "0.59", "ms", "2.7×"]
    assert columns["top-1"] == ["top-1", "91.00", "%", "89.92", "%", "-1.08", "points"]
    assert columns["integer kernels"][2:] == ["31", "of", "32", "nodes"]
    assert columns["conv4"] == ["conv4", "Conv", "24.0", "dB"]
    assert "conv5" not in columns
    assert columns["warning"] == ["warning", "look", "twice"]


def test_plain_lines_are_one_fact_each():
    lines = plain_lines(RESULT)
    assert "size: 18.0 MB -> 4.8 MB (3.8×)" in lines
    assert "time: 6.40 s, 3.0× the float run of the same samples" in lines
    assert "warning: look twice" in lines
    assert lines[-1] == "try next: --exclude conv0"


def test_an_empty_result_still_renders():
    assert plain_lines({}) == []
    assert rendered({}, 80).strip() == ""
    assert "Quantization report" in render_html({})


def test_a_terminal_does_not_obey_a_name():
    layers = [{"name": "a\x1b[2Jb", "op": "Conv", "sqnr_db": "-inf"}]
    assert plain_lines({"layers": layers}) == ["worst layer: a?[2Jb (Conv) -∞ dB"]
    assert "\x1b" not in rendered({"layers": layers}, 80)


def test_rich_markup_in_a_name_is_text():
    assert "[red]x[/red]" in rendered({"layers": [{"name": "[red]x[/red]", "op": "Conv", "sqnr_db": 1.0}]}, 80)


def test_page_escapes_every_name():
    evil = "<script>alert(1)</script>"
    page = render_html(
        {
            "model": f"{evil}.onnx",
            "command": evil,
            "versions": {evil: evil},
            "warnings": [evil],
            "layers": [{"name": evil, "op": evil, "value": evil, "sqnr_db": 3.0}],
            "tensors": [{"name": evil, "format": evil, "histogram": {"edges": [0, 1, 2], "counts": [1, 1]}}],
        }
    )
    assert "alert(1)" in page
    assert evil not in page
    assert page.count("<script>") == 1


def test_page_asks_nothing_of_the_network():
    page = render_html(RESULT)
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page


def test_page_stays_under_two_megabytes_and_says_what_it_left_out():
    histogram = {"edges": list(range(2049)), "counts": list(range(2048))}
    layers = [{"name": "n" * 500, "op": "Conv", "value": "v" * 500, "sqnr_db": float(i)} for i in range(5000)]
    tensors = [{"name": "t" * 500, "histogram": histogram, "clip_low": 0.0, "clip_high": 9.0}] * 1000
    page = render_html({"layers": layers, "tensors": tensors})
    assert len(page.encode()) < 2_000_000
    assert "more layers" in page
    assert "more tensors" in page


def test_bars_take_infinite_and_missing_ratios():
    bars = sqnr_bars([{"name": "a", "sqnr_db": "-inf"}, {"name": "b", "sqnr_db": "inf"}, {"name": "c"}])["bars"]
    assert [bar["height"] for bar in bars] == [1.0, 200.0, 200.0]
    assert [bar["low"] for bar in bars] == [True, False, False]


def test_histogram_shows_the_clip_lines_and_the_share_beyond():
    plot = histogram_plot({"edges": [-2, -1, 0, 1, 2], "counts": [1, 49, 49, 1]}, -1.0, 1.0)
    assert plot["clips"] == [250.0, 750.0]
    assert plot["clipped"] == "2 % clipped"


def test_histogram_of_nothing_is_left_out():
    assert histogram_plot({}, None, None) is None
    assert histogram_plot({"edges": [0, 1], "counts": [0]}, None, None) is None
    assert histogram_plot({"edges": [0, math.inf], "counts": [3]}, None, None) is None


def test_steps_are_drawn_from_what_there_is():
    plot = step_plot({"trajectory_sqnr_db": [40.0, 30.0, -5.0], "same_seed_sqnr_db": ["inf", 35.0, None]})
    assert [line["points"] for line in plot["lines"]] == ["0,88.9 500,111.1 1000,188.9", "0,0 500,100"]
    assert plot["lines"][0]["worst"] == "-5.0 dB at worst (step 2)"
    assert [line["db"] for line in plot["grid"]] == [*range(-10, 81, 10)]
    sparse = step_plot({"step_sqnr_db": {"12": 20.0, "3": 25.0}})
    assert sparse["lines"][0]["points"].startswith("250,") and sparse["axis"].startswith("steps 0 to 12")
    assert step_plot({"trajectory_sqnr_db": [], "step_sqnr_db": {}}) is None
    times = step_plot({"timestep_sqnr_db": {"21.0": 10.0, "999.0": 30.0}})
    assert times["axis"] == "timesteps 999 to 21, left to right"
    assert times["lines"][0]["worst"] == "10.0 dB at worst (timestep 21)"


def test_scales_that_follow_the_steps_are_drawn_as_staircases():
    plots = scale_plots({"still": [1.0, 1.0], "moving": [4.0, 2.0, 1.0], "none": []}, 9)
    assert [plot["name"] for plot in plots] == ["moving", "still"]
    points = [tuple(map(float, point.split(","))) for point in plots[0]["points"].split()]
    assert [y for _, y in points] == [0, 0, 100, 100, 200, 200] and points[0][0] == 0 and points[-1][0] == 1000
    assert plots[0]["ratio"] == "4.0×" and len(scale_plots({"a": [1.0], "b": [1.0]}, 1)) == 1
    page = render_html({"scales_by_step": {"<b>": [4.0, 2.0]}})
    assert page.count("<polyline") == 1 and "&lt;b&gt;" in page and "Scales by step" not in render_html({})


def test_a_page_shows_steps_and_pictures():
    png = b"\x89PNG\r\n\x1a\n"
    page = render_html(json_safe({"step_sqnr_db": {0: 30.0, 1: 20.0}, "pictures": [{"png": png, "caption": "<b>"}]}))
    assert page.count("<polyline") == 1 and page.count("<ellipse") == 2
    assert f'src="data:image/png;base64,{base64.b64encode(png).decode()}"' in page and "&lt;b&gt;" in page
    assert "<polyline" not in render_html({}) and "<img" not in render_html({})


def test_an_engines_nodes_are_listed_with_what_they_run_in():
    built = EngineBuild(
        Path("a.engine"), 9, "tensorrt", "11.0", ("89",), 1.0, (), ("conv1",), ("fc",), ("<b>", "c2"), ("c2",)
    )
    page = render_html({"model": "a.onnx", "tables": [engine_table(built)]})
    cells = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert cells == [
        ("conv1", "low precision"), ("fc", "weights only"), ("&lt;b&gt;", "float"),
        ("c2", "float, though Q/DQ ask for less"),
    ]  # fmt: skip
    assert "Products in a.engine" in page
