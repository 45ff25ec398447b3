"""Fuse Gelu and HardSwish that an exporter wrote out as arithmetic."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs


class FuseActivations(InPlacePass):
    """Make one node of an activation function that is spread over several; the function stays as it was.

    Before::

        x ─► Div(√2) ─► Erf ─► Add(1) ─► Mul(x) ─► Mul(0.5) ─► y

    After::

        x ─► Gelu ─► y

    onnxruntime does the same when it loads a model, but not across Q/DQ: left alone, the arithmetic inside would be
    rounded to codes step by step. Of the rules for HardSwish, onnxscript has those for torch's ways of writing it.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fuse until nothing is left to fuse."""
        if not any(graphs.is_op(node, "Erf", "Tanh", "HardSigmoid", "Clip") for node in model.graph):
            return PassResult(model, False)
        from onnxscript.rewriter import pattern
        from onnxscript.rewriter.rules.common import _fuse_hardswish

        rules = [pattern.RewriteRule(shape, replacement) for shape, replacement in (*GELUS, *HARD_SWISHES)]
        count = pattern.RewriteRuleSet(rules, commute=True).apply_to_model(model)
        count += _fuse_hardswish.fuse_hardswish_rules().apply_to_model(model)
        if count:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(count))


def _gelu(op: Any, x: Any) -> Any:
    return op.Gelu(x)


def _tanh_gelu(op: Any, x: Any) -> Any:
    return op.Gelu(x, approximate="tanh")


def _one_plus_erf(op: Any, x: Any) -> Any:
    return op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0)


def _one_plus_erf_of_product(op: Any, x: Any) -> Any:
    return op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0)


def _one_plus_tanh(op: Any, x: Any) -> Any:
    cubic = op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715))
    return op.Add(op.Tanh(op.Mul(cubic, math.sqrt(2 / math.pi))), 1.0)


def _hard_swish(op: Any, x: Any) -> Any:
    return op.HardSwish(x)


def _scaled_then_clipped(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Clip(op.Add(op.Mul(x, 1 / 6), 0.5), 0.0, 1.0))


def _clipped_then_scaled(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Mul(op.Clip(op.Add(x, 3.0), 0.0, 6.0), 1 / 6))


def _halved_last(gate: Any) -> Any:
    return lambda op, x: op.Mul(op.Mul(x, gate(op, x)), 0.5)


def _halved_gate(gate: Any) -> Any:
    return lambda op, x: op.Mul(x, op.Mul(gate(op, x), 0.5))


def _halved_first(gate: Any) -> Any:
    return lambda op, x: op.Mul(op.Mul(x, 0.5), gate(op, x))


GELUS = [
    (form(gate), replacement)
    for gate, replacement in (
        (_one_plus_erf, _gelu),
        (_one_plus_erf_of_product, _gelu),
        (_one_plus_tanh, _tanh_gelu),
    )
    for form in (_halved_last, _halved_gate, _halved_first)
]

HARD_SWISHES = [(_scaled_then_clipped, _hard_swish), (_clipped_then_scaled, _hard_swish)]
