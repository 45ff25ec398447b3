"""Recipes by name: what they bring, what the user overrides, and ranges of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MODELS

import onnxq
from onnxq import OnnxqError, recipes
from onnxq import graph as graphs
from onnxq.arithmetic import fake_quantize, scale_and_zero_point
from onnxq.calibration import weight_ranges
from onnxq.config import build_knobs, parse_assignments
from onnxq.docstrings import knob_meanings
from onnxq.formats import FORMATS, NumberFormat
from onnxq.knobs import choices_of

FASHION = (MODELS / "fashion_resnet.onnx", MODELS / "fashion_calibration.npz")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_loads_and_cites_its_source(name: str) -> None:
    recipe = recipes.get(name).load()
    text = recipe.__doc__ or ""
    # Where there is no preprint, the pages or the identifier of the proceedings say which paper it is.
    assert "Source:" in text and any(mark in text for mark in ("arXiv", "doi ", "pp. "))
    assert set(knob_meanings(recipe)) == {field.name for field in dataclasses.fields(recipe)}
    recipe(**recipes.get(name).knobs)


def test_a_recipe_brings_formats_that_options_override() -> None:
    assert onnxq.quantize(*FASHION, recipe="fp8", samples=4).numbers["weights"] == "fp8 per channel"
    numbers = onnxq.quantize(*FASHION, recipe="gptq", weights="int3", samples=8).numbers
    assert numbers["weights"] == "int3 per channel" and numbers["activations"] == "float"


def test_knobs_of_a_named_recipe_are_its_own() -> None:
    numbers = onnxq.quantize(*FASHION, recipe="int8-minmax", samples=4).numbers
    assert numbers["recipe"] == "int8-minmax" and numbers["knobs"]["observer"] == "minmax"
    assert onnxq.quantize(*FASHION, recipe="default", samples=4).numbers["recipe"] == "int8"


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(OnnxqError, match="expected a recipe of int8, "):
        onnxq.quantize(*FASHION, recipe="adarund")


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8", "uint4"])
def test_the_least_error_is_no_larger_than_that_of_the_extremes(name: str) -> None:
    number_format = FORMATS[name]
    rows = np.random.default_rng(0).standard_t(4, (16, 300)).astype(np.float32)
    symmetric = number_format.signed

    def error(search: object) -> np.ndarray:
        low, high = search(rows, number_format, symmetric)  # type: ignore[operator]
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale, zero = scale_and_zero_point(low, high, number_format, symmetric=symmetric)
        return (np.abs(rows - fake_quantize(rows, scale, zero, number_format, axis=0)) ** power).sum(axis=1)

    power = 2.0
    quick, extreme = error(weight_ranges.best_of_few), error(weight_ranges.extremes)
    assert (quick <= extreme * (1 + 1e-5)).all()
    if number_format.bits in (3, 4) and symmetric:
        assert quick.sum() < 0.8 * extreme.sum()
    power = 2.4
    clipped, extreme = error(weight_ranges.least_error), error(weight_ranges.extremes)
    assert (clipped <= extreme * (1 + 1e-5)).all()
    if number_format.bits <= 4:
        assert clipped.sum() < (0.8 if symmetric else 0.9) * extreme.sum()


def test_a_weight_is_looked_at_once_in_each_format() -> None:
    seen = []

    def search(rows: np.ndarray, number_format: NumberFormat, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
        seen.append((number_format.name, symmetric))
        return weight_ranges.least_error(rows, number_format, symmetric)

    find = weight_ranges.once(weight_ranges.once(search))
    rows = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    for name, symmetric in (("int4", True), ("int8", True), ("int4", False)):
        number_format = FORMATS[name]
        for _ in range(2):
            found = find(rows.copy(), number_format, symmetric)
            wanted = weight_ranges.least_error(rows, number_format, symmetric)
            np.testing.assert_array_equal(found, wanted)
    assert seen == [("int4", True), ("int8", True), ("int4", False)]
    find(rows.reshape(8, 16), number_format, symmetric)
    find(rows + 1, number_format, symmetric)
    assert len(seen) == 5


def test_numbers_may_be_written_in_powers_of_ten() -> None:
    load = recipes.get("lsq").load()
    for text in ("1e-5", "1.0e-5", "0.00001"):
        assert build_knobs(load, parse_assignments([f"weight_rate={text}"]), "lsq").weight_rate == 1e-5
    with pytest.raises(OnnxqError, match="expected float"):
        build_knobs(load, parse_assignments(["weight_rate=fast"]), "lsq")


def test_a_knob_given_as_a_setting_is_told_where_it_belongs() -> None:
    with pytest.raises(OnnxqError, match="bias_correction") as caught:
        onnxq.quantize(*FASHION, bias_correction=False)
    assert "knobs={...}" in (caught.value.hint or "")


def test_unknown_weight_ranges_are_named(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="weight ranges"):
        onnxq.quantize(*FASHION, knobs={"weight_ranges": "mean"}, samples=4)


def test_words_that_are_no_choice_are_refused_before_anything_is_computed() -> None:
    """Of every recipe: the batches are never asked for, nor are inputs made."""

    def batches() -> Iterator[dict[str, np.ndarray]]:
        raise AssertionError("data was read")
        yield {}

    tried = set()
    for name, entry in recipes.RECIPES.items():
        for field in dataclasses.fields(entry.load()):
            words = choices_of(field)
            if words or field.name in ("observer", "weight_ranges"):
                tried.add(field.name)
                with pytest.raises(OnnxqError, match="found 'soup'"):
                    onnxq.quantize(FASHION[0], batches(), recipe=name, knobs={field.name: "soup"})
                for word in words:
                    assert getattr(build_knobs(entry.load(), {field.name: word}, name), field.name) == word
    assert {"observer", "weight_ranges", "partition", "distil", "optimizer", "solver", "taq"} <= tried


def test_the_ends_get_the_format_asked_for(tmp_path: Path) -> None:
    """int8 at the ends of an int4 model: the stored codes of those layers alone use the whole byte."""
    options = {"weights": "int4", "activations": "int8", "samples": 8, "target": "cpu"}
    plain = onnxq.quantize(*FASHION, **options)
    ended = onnxq.quantize(*FASHION, **options, first_last="int8")
    wide = {name for name, largest in largest_codes(ended.model).items() if largest > 8}
    assert all(largest <= 8 for largest in largest_codes(plain.model).values())
    assert 1 <= len(wide) <= 2 < len(largest_codes(ended.model))
    assert ended.numbers["sqnr_db"] > plain.numbers["sqnr_db"]


def test_the_ends_can_stay_float() -> None:
    numbers = onnxq.quantize(*FASHION, samples=8, target="cpu", first_last="float").numbers
    assert sum(reason == "its scheme is float" for reason in numbers["left_float"].values()) == 2


def test_a_format_of_the_ends_that_the_target_lacks_is_named() -> None:
    with pytest.raises(OnnxqError, match="fp8"):
        onnxq.quantize(*FASHION, samples=4, target="cpu", first_last="fp8")


def largest_codes(model: ir.Model) -> dict[str, int]:
    """The largest magnitude of the codes that each integer weight stores."""
    found = {}
    for node in model.graph:
        value = node.inputs[0] if graphs.is_dequantize(node) else None
        if value is None or value.const_value is None or not graphs.rank(value) or value.dtype == ir.DataType.INT32:
            continue
        found[value.name or ""] = int(np.abs(value.const_value.numpy().astype(np.int32)).max())
    return found
