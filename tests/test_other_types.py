"""What models have besides float32 tensors: float64, sequences among the outputs, maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from conftest import add_weights
from test_cli_errors import assert_two_lines, run

import onnxq
from onnxq import model as models

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
SEQUENCE = f"""{HEAD}
net (float[N,64] x) => (seq(float[N,64]) parts, float[N,64] y)
{{
    a = MatMul (x, w)
    b = Relu (a)
    y = MatMul (b, v)
    parts = SequenceConstruct (a, y)
}}
"""
DOUBLE = f"""{HEAD}
net (double[N,64] x) => (double[N,64] y)
{{
    a = MatMul (x, w)
    b = Relu (a)
    y = MatMul (b, v)
}}
"""
MAP = """<ir_version: 8, opset_import: ["" : 15, "ai.onnx.ml" : 1]>
net (float[N,4] x) => (seq(map(int64, float)) y)
{
    p = Softmax (x)
    y = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1, 2, 3]> (p)
}
"""


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
@pytest.mark.parametrize("recipe", ["int8", "mixed"])
def test_outputs_that_are_sequences_stay_and_others_are_judged(target: str, recipe: str, tmp_path: Path) -> None:
    path = models.save(add_weights(SEQUENCE, {"w": (64, 64), "v": (64, 64)}), tmp_path / "net.onnx")
    data = [{"x": np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)}]
    result = onnxq.quantize(path, data, target=target, recipe=recipe, output=tmp_path / "o.onnx")
    assert result.numbers["quantized_nodes"] == 2 and result.numbers["sqnr_db"] > 15
    written = ir.load(tmp_path / "o.onnx")
    assert [value.name for value in written.graph.outputs] == ["parts", "y"]
    assert isinstance(written.graph.outputs[0].type, ir.SequenceType)
    assert 15 < onnxq.compare(path, tmp_path / "o.onnx", data).sqnr_db < 60


def test_a_model_without_a_tensor_to_judge_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SEQUENCE.replace(", float[N,64] y)", ")")
    path = models.save(add_weights(text, {"w": (64, 64), "v": (64, 64)}), tmp_path / "net.onnx")
    assert_two_lines(*run(capsys, "quantize", path), "an output that is a tensor", "an output too")


def test_a_map_is_told_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(onnx.parser.parse_model(MAP), tmp_path / "net.onnx")
    assert_two_lines(*run(capsys, "quantize", tmp_path / "net.onnx"), "found a map", "zipmap")


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_a_float64_model_computes_in_float32(target: str, tmp_path: Path) -> None:
    model = ir.from_onnx_text(DOUBLE)
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name in ("w", "v"):
                array = np.random.default_rng(len(value.name)).standard_normal((64, 64))
                value.const_value, value.type = ir.Tensor(array, name=value.name), ir.TensorType(ir.DataType.DOUBLE)
                value.shape = ir.Shape(array.shape)
                model.graph.register_initializer(value)
    path = models.save(model, tmp_path / "net.onnx")
    data = [{"x": np.random.default_rng(0).standard_normal((8, 64))}]
    result = onnxq.quantize(path, data, target=target, output=tmp_path / "o.onnx")
    assert result.numbers["quantized_nodes"] == 2 and result.numbers["sqnr_db"] > 25
    written = ir.load(tmp_path / "o.onnx").graph
    assert written.inputs[0].dtype == written.outputs[0].dtype == ir.DataType.DOUBLE
    assert onnxq.compare(path, tmp_path / "o.onnx", data).sqnr_db > 25
