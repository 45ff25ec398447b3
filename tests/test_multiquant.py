"""One stored model, every width: what it costs in error, in bytes, and what is said when it is not one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DATA
from typer.testing import CliRunner

import onnxq
from onnxq import graph as graphs
from onnxq.arithmetic import fake_quantize, quantize, scale_and_zero_point
from onnxq.calibration.weight_ranges import least_error
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.formats import parse_format
from onnxq.model import read
from onnxq.weights.masters import TABLE, WIDTHS, export_width, master_nodes

UNTRAINED = {"train": False}


def clipped(rows: np.ndarray, bits: int) -> np.ndarray:
    number_format, _ = parse_format(f"int{bits}")
    low, high = least_error(rows, number_format, True, 2.0)
    scale, zero_point = scale_and_zero_point(low, high, number_format, symmetric=True)
    return fake_quantize(rows, scale, zero_point, number_format, axis=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_the_master_is_nearly_as_good_a_source_as_the_float_weight(bits: int) -> None:
    """Own scales per width cost at most 7 % of squared error; cutting off low bits costs far more."""
    rows = np.random.default_rng(0).standard_t(8, (16, 4096)).astype(np.float32)
    master = clipped(rows, 8)
    own = np.square(clipped(master, bits) - rows).sum()
    assert own <= 1.07 * np.square(clipped(rows, bits) - rows).sum()
    int8, _ = parse_format("int8")
    scale, zero_point = scale_and_zero_point(rows.min(axis=1), rows.max(axis=1), int8, symmetric=True)
    codes = quantize(rows, scale, zero_point, int8, axis=0).astype(np.int64)
    cut = (codes >> (8 - bits) << (8 - bits)) * scale[:, None]
    assert np.square(cut - rows).sum() > 2 * own


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_every_width_comes_out_of_one_file(network: Path, calibration: Path, tmp_path: Path, target: str) -> None:
    stored = tmp_path / "all.onnx"
    options = [
        "--recipe",
        "multiquant",
        "--set",
        "train=false",
        "--target",
        target,
        "--data",
        str(calibration),
        "-o",
        str(stored),
        "-q",
    ]
    done = CliRunner().invoke(app, ["quantize", str(network), *options])
    assert done.exit_code == 0, done.output
    plain = onnxq.quantize(network, calibration, target=target, output=tmp_path / "int8.onnx")
    assert stored.stat().st_size < 1.5 * plain.numbers["quantized_bytes"]
    sqnr = {}
    for bits in WIDTHS:
        output = tmp_path / f"{bits}.onnx"
        done = CliRunner().invoke(app, ["export", str(stored), "--bits", str(bits), "-o", str(output), "-q"])
        assert done.exit_code == 0, done.output
        opened = read(output)
        found = onnxq.compare(network, output, calibration, latency=False, layers=False)
        sqnr[bits] = found.sqnr_db
        for node in master_nodes(opened.graph):
            codes = node.inputs[0].const_value.numpy()
            assert -(2 ** (bits - 1)) <= codes.min() and codes.max() <= 2 ** (bits - 1) - 1
        assert not any(name.endswith("_scales") for name in opened.graph.initializers)
        assert any(graphs.is_dequantize(node) for node in opened.graph)
    narrow = [sqnr[bits] for bits in (2, 3, 4, 5)]
    assert narrow == sorted(narrow)
    assert min(sqnr[bits] for bits in (6, 7, 8)) > narrow[-1]  # from here on activations make most of the error
    assert sqnr[8] == pytest.approx(plain.numbers["sqnr_db"], abs=1)


def test_a_damaged_master_is_refused_and_nothing_is_written(network: Path, calibration: Path, tmp_path: Path) -> None:
    model = onnxq.quantize(network, calibration, recipe="multiquant", knobs=UNTRAINED).model
    scales = next(value for name, value in model.graph.initializers.items() if name.endswith("_scales"))
    reader = next(node for node in model.graph if graphs.is_quantize(node))
    reader.replace_input_with(1, scales)  # which the export of one width takes out
    ir.save(model, tmp_path / "master.onnx")
    output = tmp_path / "out.onnx"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "master.onnx"), "--bits", "4", "-o", str(output)])
    assert done.exit_code != 0 and isinstance(done.exception, OnnxqError) and not output.exists()


def test_scales_along_an_axis_that_the_codes_lack_are_refused(network: Path, calibration: Path) -> None:
    model = onnxq.quantize(network, calibration, recipe="multiquant", knobs=UNTRAINED).model
    master = next(node for node in model.graph if TABLE in node.metadata_props and "axis" in node.attributes)
    master.attributes["axis"] = ir.AttrInt64("axis", 7)
    with pytest.raises(OnnxqError, match="one scale for each width"):
        export_width(model, 4)


def test_what_is_no_master_is_refused(network: Path, calibration: Path) -> None:
    with pytest.raises(OnnxqError, match="master of all widths"):
        onnxq.quantize(network, calibration, recipe="multiquant", weights="int4")
    with pytest.raises(OnnxqError, match="found none"):
        export_width(onnxq.quantize(network, calibration).model, 4)
    with pytest.raises(OnnxqError, match="2 to 8"):
        export_width(onnxq.quantize(network, calibration, recipe="multiquant", knobs=UNTRAINED).model, 9)


def test_widths_of_a_real_network(shared_data: Path) -> None:
    model = DATA / "models" / "resnet20_cifar10.onnx"
    result = onnxq.quantize(model, recipe="multiquant", activations="float", synthesis="noise", knobs=UNTRAINED)
    assert result.numbers["sqnr_db"] > 30
    assert export_width(result.model, 4) == 20
