"""ONNX's own node cases through TorchGraph, each within the tolerance that ONNX gives it.

What cannot pass is listed below with the reason. A listed case that passes is an error too: the lists only shrink.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from onnxq.autograd.interpreter import TorchGraph
from onnxq.autograd.ops.operands import to_torch

OPS_LEFT_OUT = {
    "control flow": "If Loop Scan SequenceMap",
    "sequence or optional type": "SequenceInsert SplitToSequence OptionalGetElement OptionalHasElement",
    "text or image files": "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer ImageDecoder",
    "a loss: training graphs only": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "random": "Bernoulli RandomUniformLike",
    "signal processing": "DFT STFT BlackmanWindow HammingWindow HannWindow MelWeightMatrix",
    "boxes: what detectors do after the network": "NonMaxSuppression RoiAlign",
    "as many outputs as the data says": "Unique",
    "newer than opset 25": "BitCast CausalConvWithState LinearAttention",
    "older than opset 18": "Upsample",
}

DOMAINS_LEFT_OUT = {
    "ai.onnx.ml": "classical models",
    "ai.onnx.preview": "not an operator set yet",
    "ai.onnx.preview.training": "optimisers",
}

WITHOUT_WIDE_UNSIGNED = (
    "add", "sub", "div", "mod", "max", "min", "greater", "greater_equal", "less", "less_equal", "bitshift_left",
    "bitshift_right",
)  # fmt: skip

CASES_LEFT_OUT = {
    "sequence or optional type": "test_identity_sequence test_identity_opt",
    "text": "test_equal_string* test_cast_*STRING*",
    "torch does not compute this on unsigned integers of more than a byte": "test_bitwise_not_3d "
    + " ".join(f"test_{op}_uint{bits}" for op in WITHOUT_WIDE_UNSIGNED for bits in ("16", "32", "64"))
    + " test_greater_equal_uint??_expanded test_less_equal_uint??_expanded",
    "random": "test_training_dropout test_training_dropout_mask test_training_dropout_default*",
    "torch has no such type": "test_cast_e8m0_*",
    "torch has no type below a byte, so that like's type is not known": "test_castlike_FLOAT*_to_*INT2 "
    "test_castlike_FLOAT*_to_*INT4 test_castlike_FLOAT*_to_FLOAT4E2M1",
    "torch folds images only": "test_col2im_5d",
}

# Both sides round float16 and bfloat16 after each of several operations, in their own order: two units in the last
# place. The expected value of one case is an exact zero, a sum of numbers near 1: one unit of float32.
HALF_UNITS = {"float16": 2.0**-9, "bfloat16": 2.0**-6}
ABSOLUTE = {"test_basic_deform_conv_with_padding": 2.0**-22}


def left_out(case: Any) -> str | None:
    for node in case.model.graph.node:
        if node.domain in DOMAINS_LEFT_OUT:
            return DOMAINS_LEFT_OUT[node.domain]
        for reason, ops in OPS_LEFT_OUT.items():
            if node.op_type in ops.split():
                return reason
    for reason, patterns in CASES_LEFT_OUT.items():
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns.split()):
            return reason
    return None


def operand(data: Any) -> torch.Tensor:
    if isinstance(data, onnx.TensorProto):
        return to_torch(ir.serde.deserialize_tensor(data))
    if data is None or isinstance(data, list | dict):
        raise TypeError(f"expected a tensor, found {type(data).__name__}")
    return to_torch(ir.tensor(np.asarray(data)))


def compare(name: str, case: Any, found: torch.Tensor, data: Any) -> None:
    expected = numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else np.asarray(data)
    assert tuple(found.shape) == expected.shape, f"{name}: shape {tuple(found.shape)} instead of {expected.shape}"
    kind = expected.dtype.name
    held = {"int4": "int8", "uint4": "uint8", "int2": "int8", "uint2": "uint8", "float4_e2m1fn": "float32"}.get(
        kind, kind
    )
    assert str(found.dtype).removeprefix("torch.") == held, f"{name}: {found.dtype} instead of {kind}"
    np.testing.assert_allclose(
        found.to(torch.float64).numpy(),
        expected.astype(np.float64),
        rtol=max(case.rtol, HALF_UNITS.get(kind, 0.0)),
        atol=max(case.atol, ABSOLUTE.get(case.name, 0.0)),
    )


def problem(case: Any) -> str | None:
    """What is wrong with our result, or None."""
    try:
        graph = TorchGraph(ir.serde.deserialize_model(case.model), in_half=True)
        for inputs, outputs in case.data_sets:
            given = {name: operand(data) for name, data in zip(graph.input_names, inputs, strict=False)}
            with torch.no_grad():
                found = graph.run(given, graph.output_names)
            for (name, tensor), data in zip(found.items(), outputs, strict=False):
                compare(name, case, tensor, data)
    except Exception as error:  # noqa: BLE001 - whatever it is, the case does not pass
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, tuple[str | None, str | None]]]:
    """For each case why it is left out, and what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        yield {case.name: (left_out(case), problem(case)) for case in collect_testcases(None)}


def test_every_case_that_is_not_left_out_passes(results: dict[str, tuple[str | None, str | None]]) -> None:
    wrong = {name: found for name, (reason, found) in results.items() if reason is None and found is not None}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
    assert sum(found is None for _, found in results.values()) >= 1500


def test_no_case_that_is_left_out_passes(results: dict[str, tuple[str | None, str | None]]) -> None:
    passing = [name for name, (reason, found) in results.items() if reason is not None and found is None]
    assert not passing, f"these pass now, so they need no reason: {passing}"
