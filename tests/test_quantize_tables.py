"""Tables that tokens are looked up in: stored as bytes on a CPU, read back, and left alone where they have to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import model as models
from onnxq import retarget
from onnxq.errors import OnnxqError
from onnxq.passes.quantize_tables import QuantizeTables, RaiseTables
from onnxq.report.table import plain_lines
from onnxq.runtime import Session

ROWS, WIDTH = 600, 32
READER = """
<ir_version: 10, opset_import: ["" : 21]>
reader (int64[N,8] input_ids) => (float[N,8,48] y)
{
    [lookup] e = Gather (table, input_ids)
    [lookup_of_places] p = Gather (places, input_ids)
    s = Add (e, p)
    [first] a = MatMul (s, w1)
    r = Relu (a)
    [last] y = MatMul (r, w2)
}
"""
SHAPES = {"table": (ROWS, WIDTH), "places": (ROWS, WIDTH), "w1": (WIDTH, 64), "w2": (64, 48)}
TIED = f"""
<ir_version: 10, opset_import: ["" : 21]>
tied (int64[N,8] input_ids) => (float[N,8,{ROWS}] y)
{{
    [lookup] e = Gather (table, input_ids)
    [first] a = MatMul (e, w1)
    [turn] t = Transpose <perm = [1, 0]> (table)
    [last] y = MatMul (a, t)
}}
"""
TOKENS = {"input_ids": np.random.default_rng(3).integers(0, ROWS, (2, 8))}


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    return models.save(add_weights(READER, SHAPES), tmp_path / "reader.onnx")


def tables(model: ir.Model) -> dict[str, ir.DataType | None]:
    """What the tables of a model's lookups are stored in, by name."""
    values = [node.inputs[0] for node in model.graph if node.op_type == "Gather"]
    return {
        value.name or "": value.dtype for value in values if value is not None and "scale" not in (value.name or "")
    }


def test_bytes_on_a_cpu_and_floats_elsewhere(reader: Path, tmp_path: Path) -> None:
    sizes = {}
    for target, embeddings in (("cpu", None), ("cpu", "float"), ("tensorrt", None)):
        output = tmp_path / f"{target}_{embeddings}.onnx"
        result = onnxq.quantize(reader, target=target, embeddings=embeddings, output=output)
        as_bytes = target == "cpu" and embeddings is None
        wanted = {ir.DataType.INT8} if as_bytes else {ir.DataType.FLOAT}
        assert set(tables(result.model).values()) == wanted
        assert ("embeddings int8 per row" in " ".join(plain_lines(result.numbers))) == as_bytes
        sizes[target, embeddings] = output.stat().st_size
        if as_bytes:
            assert result.numbers["sqnr_db"] > 30
    saved = sizes["cpu", "float"] - sizes["cpu", None]
    assert saved > 0.9 * 2 * ROWS * (3 * WIDTH - 4)  # a byte for a float, and a scale for each row


@pytest.mark.parametrize("options", [{"weights": "int4:32"}, {"recipe": "gptq"}, {"recipe": "int8-dynamic"}])
def test_whatever_the_weights_become(reader: Path, options: dict[str, Any]) -> None:
    result = onnxq.quantize(reader, target="cpu", **options)
    assert set(tables(result.model).values()) == {ir.DataType.INT8}


def test_each_row_is_within_half_a_step_of_its_own() -> None:
    model = add_weights(READER, SHAPES)
    rows = model.graph.initializers["table"].const_value.numpy().copy()  # type: ignore[union-attr]
    rows *= np.logspace(-6, 6, ROWS, dtype=np.float32)[:, None]
    rows[7] = 0
    model.graph.initializers["table"].const_value = ir.tensor(rows, name="table")
    QuantizeTables()(model)
    scales = model.graph.initializers["table_scale"].const_value.numpy()  # type: ignore[union-attr]
    RaiseTables()(model)
    found = model.graph.initializers["table"].const_value.numpy()  # type: ignore[union-attr]
    assert np.all(np.abs(found - rows) <= 0.5001 * scales)
    assert not found[7].any()


def test_reading_back_changes_nothing(reader: Path) -> None:
    model = models.load(reader)
    QuantizeTables()(model)
    expected = Session(model).run(TOKENS)[0]
    RaiseTables()(model)
    assert [node.op_type for node in model.graph] == ["Gather", "Gather", "Add", "MatMul", "Relu", "MatMul"]
    np.testing.assert_array_equal(Session(model).run(TOKENS)[0], expected)


def test_a_table_that_is_read_twice_is_stored_once() -> None:
    model = add_weights(READER.replace("Gather (places,", "Gather (table,"), SHAPES)
    QuantizeTables()(model)
    assert len(tables(model)) == 1
    RaiseTables()(model)
    assert tables(model) == {"table": ir.DataType.FLOAT}
    assert sum(value.shape == (ROWS, WIDTH) for value in model.graph.initializers.values()) == 1


def test_small_shared_and_excluded_tables_stay_float(reader: Path) -> None:
    small = add_weights(READER, SHAPES | {"places": (16, WIDTH)})
    QuantizeTables()(small)
    assert tables(small) == {"table_quantized": ir.DataType.INT8, "places": ir.DataType.FLOAT}
    tied = add_weights(TIED, {"table": (ROWS, WIDTH), "w1": (WIDTH, WIDTH)})
    assert not QuantizeTables()(tied).modified  # the head would keep its floats
    result = onnxq.quantize(reader, target="cpu", exclude=("lookup",))
    assert tables(result.model) == {"table": ir.DataType.FLOAT, "places_quantized": ir.DataType.INT8}


def test_an_engine_holds_floats(reader: Path) -> None:
    with pytest.raises(OnnxqError, match="an engine holds its tables as floats"):
        onnxq.quantize(reader, target="tensorrt", embeddings="int8")


def test_tables_go_from_target_to_target(reader: Path, tmp_path: Path) -> None:
    path = tmp_path / "codes.onnx"
    onnxq.quantize(reader, target="cpu", output=path)
    expected = Session(path).run(TOKENS)[0]
    for target, dtype in (("tensorrt", ir.DataType.FLOAT), ("cpu", ir.DataType.INT8)):
        fixed = retarget.retarget(path, target).model
        assert set(tables(fixed).values()) == {dtype}
        assert sqnr_db(expected, Session(fixed, optimize=target == "cpu").run(TOKENS)[0]) > 30


def test_tables_of_onnxruntime_are_read(reader: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(reader), str(tmp_path / "theirs.onnx"))
    model = retarget.strip(tmp_path / "theirs.onnx")
    assert set(tables(model).values()) == {ir.DataType.FLOAT}
    assert sqnr_db(Session(reader).run(TOKENS)[0], Session(model).run(TOKENS)[0]) > 30
