"""Weights of experts that a router chooses among: codes on a CPU, floats for TensorRT, read back by `strip`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights, sqnr_db

import onnxq
from onnxq import layer_nodes, retarget
from onnxq import model as models
from onnxq.passes.quantize_experts import QuantizeExperts
from onnxq.passes.quantize_tables import RaiseTables
from onnxq.runtime import Session

# Two of four experts for each row, as transformers exports them (`batched_mm`): the first product has its weights on
# the left and GatherND, the second on the right and Gather.
EXPERTS = """
<ir_version: 10, opset_import: ["" : 21]>
experts (float[N,64] x) => (float[N,48] y)
{
    two = Constant <value_ints = [2]> ()
    one = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    pairs = Constant <value_ints = [-1, 2, 64]> ()
    [first] h = MatMul (x, w_in)
    [router] r = MatMul (h, w_router)
    p = Softmax <axis = -1> (r)
    share, chosen = TopK (p, two)
    flat = Reshape (chosen, last)
    index = Unsqueeze (flat, one)
    [lookup_up] up = GatherND (w_up, index)
    twice = Unsqueeze (h, one)
    width = Constant <value_ints = [1, 2, 1]> ()
    spread = Expand (twice, width)
    rows = Constant <value_ints = [-1, 64, 1]> ()
    columns = Reshape (spread, rows)
    [expert_up] u = MatMul (up, columns)
    a = Relu (u)
    t = Transpose <perm = [0, 2, 1]> (a)
    [lookup_down] down = Gather (w_down, flat)
    [expert_down] d = MatMul (t, down)
    e = Reshape (d, pairs)
    weight = Unsqueeze (share, last)
    m = Mul (e, weight)
    s = ReduceSum <keepdims = 0> (m, one)
    added = Add (s, h)
    [head] y = MatMul (added, w_out)
}
"""
SHAPES = {"w_in": (64, 64), "w_router": (64, 4), "w_up": (4, 96, 64), "w_down": (4, 96, 64), "w_out": (64, 48)}
DATA = {"x": np.random.default_rng(5).standard_normal((32, 64)).astype(np.float32)}
LOOKUPS = ("lookup_up", "lookup_down")


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    return models.save(add_weights(EXPERTS, SHAPES), tmp_path / "experts.onnx")


def tables(model: ir.Model) -> list[ir.DataType | None]:
    """What the experts' weights are stored in, in the order of the products."""
    return [
        value.dtype for node in model.graph if layer_nodes.is_lookup(node) and (value := node.inputs[0]) is not None
    ]


@pytest.mark.parametrize(
    ("options", "bits", "least_db"),
    [
        ({}, 8, 25),
        ({"recipe": "int8-dynamic"}, 8, 25),
        ({"weights": "int8", "activations": "float"}, 8, 38),
        ({"recipe": "int4-weights", "weights": "int4:32"}, 4, 15),
    ],
)
def test_codes_on_a_cpu(experts: Path, tmp_path: Path, options: dict[str, Any], bits: int, least_db: float) -> None:
    output = tmp_path / "codes.onnx"
    result = onnxq.quantize(experts, [DATA], target="cpu", output=output, **options)
    looked_up = [node for node in result.model.graph if node.op_type == "GatherBlockQuantized"]
    assert {node.name for node in looked_up} == set(LOOKUPS)
    assert {node.attributes.get_int("bits") for node in looked_up} == {bits}
    assert not {"expert_up", "expert_down"} & result.numbers["left_float"].keys()
    floats = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert output.stat().st_size < floats * (bits + 1.5) / 32 + 20_000
    assert sqnr_db(Session(experts).run(DATA)[0], Session(output).run(DATA)[0]) > least_db


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_each_number_is_within_half_a_step_of_its_block(experts: Path, name: str) -> None:
    model = models.load(experts)
    before = model.graph.initializers["w_up"].const_value.numpy().copy()  # type: ignore[union-attr]
    QuantizeExperts(name=name)(model)
    scales = model.graph.initializers["w_up_scale"].const_value.numpy()  # type: ignore[union-attr]
    expected = Session(model).run(DATA)[0]
    RaiseTables()(model)
    after = model.graph.initializers["w_up"].const_value.numpy()  # type: ignore[union-attr]
    block = {"int8": 128, "int4": 32}[name]
    steps = np.repeat(np.abs(scales), block, axis=-1)[..., : before.shape[-1]]
    clipped = np.abs(before) >= steps * {"int8": 126, "int4": 6}[name]
    assert np.all((np.abs(after - before) <= 0.5001 * steps) | clipped)
    assert sqnr_db(before, after) > {"int8": 40, "int4": 20}[name]
    np.testing.assert_allclose(Session(model).run(DATA)[0], expected, rtol=1e-4, atol=1e-5)


def test_an_engine_holds_floats_and_says_why(experts: Path) -> None:
    result = onnxq.quantize(experts, [DATA], target="tensorrt")
    assert tables(result.model) == [ir.DataType.FLOAT] * 2
    left = result.numbers["left_float"]
    assert all("weights of experts" in left[name] for name in ("expert_up", "expert_down"))


def test_excluded_ones_stay_float(experts: Path) -> None:
    result = onnxq.quantize(experts, [DATA], target="cpu", exclude=("expert_up", "lookup_down"))
    assert tables(result.model) == [ir.DataType.FLOAT] * 2


def test_what_another_op_reads_stays_float(tmp_path: Path) -> None:
    text = EXPERTS.replace(
        "    [head] y = MatMul (added, w_out)",
        """    mean = ReduceMean <keepdims = 0> (x)
        scaled = Mul (w_up, mean)
        largest = ReduceMax <keepdims = 0> (scaled)
        all = Mul (added, largest)
        [head] y = MatMul (all, w_out)""",
    )
    model = models.load(models.save(add_weights(text, SHAPES), tmp_path / "read.onnx"))
    assert QuantizeExperts()(model).modified
    assert tables(model) == [ir.DataType.FLOAT, ir.DataType.UINT8]


def test_a_table_of_a_denoisers_steps_is_none_of_experts(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        steps (float[N,32,8,8] x, int64[1] step) => (float[N,32,8,8] y)
        {
            shift = Gather (table, step)
            y = Add (x, shift)
        }
        """
    model = models.load(models.save(add_weights(text, {"table": (1000, 32, 1, 1)}), tmp_path / "steps.onnx"))
    assert not QuantizeExperts()(model).modified


def test_from_target_to_target(experts: Path, tmp_path: Path) -> None:
    path = tmp_path / "codes.onnx"
    onnxq.quantize(experts, [DATA], target="cpu", weights="int8", activations="float", output=path)
    stripped = retarget.strip(path)
    assert tables(stripped) == [ir.DataType.FLOAT] * 2
    assert sqnr_db(Session(experts).run(DATA)[0], Session(stripped).run(DATA)[0]) > 38
